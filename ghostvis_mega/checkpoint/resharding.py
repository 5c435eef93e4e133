"""Where the elements of one cut of a parameter lie in another.

A parameter is shared out between tensor-parallel ranks by rows or by columns, in equal parts; one
that stacks two matrices (gate and up) is shared out in each of them. ZeRO cuts a rank's part
further, anywhere; the reader puts those pieces together by itself. So whatever layout saved, and
whatever layout reads, elements are found in runs of the saved parts, with the memory of one
parameter's part.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch

from ghostvis_mega.checkpoint.manifest import Kind, ParameterInfo
from ghostvis_mega.checkpoint.reader import CheckpointReader


@dataclass(frozen=True)
class Part:
    """Elements of one tensor-parallel part of a parameter."""

    rank: int
    """Of the part; 0 where the parameter is not cut."""
    parts: int
    """Into how many the parameter is cut."""
    start: int
    """First element, row-major in the part."""
    length: int


def saved_runs(info: ParameterInfo, wanted: Part, *, saved: int) -> Iterator[Part]:
    """Runs of the saved parts that hold the wanted elements.

    Args:
        info: The parameter.
        wanted: Elements in the reader's cut.
        saved: Parts in which it was saved.

    Yields:
        For a parameter cut by rows its runs in the order of the wanted elements; for one cut by
        columns the rows that the wanted elements touch, of every saved part that has some of their
        columns.
    """
    if info.partition_dim is None or saved == wanted.parts:
        rank = 0 if info.partition_dim is None else wanted.rank
        yield Part(rank=rank, parts=saved, start=wanted.start, length=wanted.length)
    elif info.partition_dim == 0:
        yield from _rows(info, wanted, saved)
    else:
        first, last = _touched_rows(info, wanted)
        width, own = info.shape[1] // saved, info.shape[1] // wanted.parts
        for rank in range(saved):
            if rank * width < (wanted.rank + 1) * own and wanted.rank * own < (rank + 1) * width:
                yield Part(rank, saved, first * width, (last - first) * width)


def _rows(info: ParameterInfo, wanted: Part, saved: int) -> Iterator[Part]:
    stacked = prod(info.shape) // info.partition_parts
    mine, theirs = stacked // wanted.parts, stacked // saved
    at, end = wanted.start, wanted.start + wanted.length
    while at < end:
        matrix, inside = divmod(at, mine)
        rank, offset = divmod(wanted.rank * mine + inside, theirs)
        take = min(end - at, mine - inside, theirs - offset)
        yield Part(rank=rank, parts=saved, start=matrix * theirs + offset, length=take)
        at += take


def _touched_rows(info: ParameterInfo, wanted: Part) -> tuple[int, int]:
    assert len(info.shape) == 2 and info.partition_parts == 1, "cut by columns in a new way"
    width = info.shape[1] // wanted.parts
    return wanted.start // width, -(-(wanted.start + wanted.length) // width)


def missing_part(reader: CheckpointReader, kind: Kind, name: str, wanted: Part) -> str | None:
    """A sentence if the files do not hold all of these elements."""
    info, saved = reader.manifest.parameters[name], reader.tensor_parts(name)
    for run in saved_runs(info, wanted, saved=saved):
        problem = reader.missing(
            kind, name, tensor_rank=run.rank, start=run.start, length=run.length
        )
        if problem:
            return problem
    return None


def read_part(
    reader: CheckpointReader, kind: Kind, name: str, wanted: Part, *, prefix: str = ""
) -> torch.Tensor:
    """Elements of a part in any cut: [length] on the CPU, in the type in which they were saved.

    Args:
        reader: An open checkpoint.
        kind: Which files.
        name: Global name of the parameter.
        wanted: Elements in the reader's own cut.
        prefix: Of the tensors in optimizer files, such as `exp_avg/`.

    Raises:
        CheckpointError: The files do not hold all of them.
    """
    info, saved = reader.manifest.parameters[name], reader.tensor_parts(name)
    runs = list(saved_runs(info, wanted, saved=saved))
    found = [
        reader.read(
            kind, name, tensor_rank=run.rank, start=run.start, length=run.length, prefix=prefix
        )
        for run in runs
    ]
    if info.partition_dim == 1 and saved != wanted.parts:
        return _columns(info, wanted, runs, found)
    return found[0] if len(found) == 1 else torch.cat(found)


def _columns(
    info: ParameterInfo, wanted: Part, runs: list[Part], found: list[torch.Tensor]
) -> torch.Tensor:
    """The wanted columns out of whole rows of the saved parts."""
    first, last = _touched_rows(info, wanted)
    own = info.shape[1] // wanted.parts
    begin = wanted.rank * own
    rows = torch.empty((last - first, own), dtype=found[0].dtype)
    for run, values in zip(runs, found, strict=True):
        width = info.shape[1] // run.parts
        left, right = max(begin, run.rank * width), min(begin + own, (run.rank + 1) * width)
        block = values.view(last - first, width)
        rows[:, left - begin : right - begin] = block[
            :, left - run.rank * width : right - run.rank * width
        ]
    skipped = wanted.start - first * own
    return rows.view(-1)[skipped : skipped + wanted.length]
