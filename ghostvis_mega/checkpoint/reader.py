"""Reads elements of parameters out of a checkpoint's files, wherever they lie."""

from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ghostvis_mega.checkpoint.manifest import Kind, digest_problem, read_manifest
from ghostvis_mega.model.shards import unshard
from ghostvis_mega.utils.closing import Closing
from ghostvis_mega.utils.errors import CheckpointError
from ghostvis_mega.utils.files import unnoticed

_DIGEST_THREADS = 4
FP8_PREFIX = "fp8/"
"""Of what delayed FP8 scaling remembers, in the files of the random generators."""


@dataclass(frozen=True)
class Place:
    """Consecutive elements of a parameter inside one file's tensor of its name."""

    file: str
    start: int
    length: int
    held: int
    """Elements that the tensor should have in all."""


class CheckpointReader(Closing):
    """An open checkpoint; use it in a `with` statement.

    Args:
        path: Its directory.
        moved: Told of bytes that were read, from any thread.

    Raises:
        CheckpointError: No sound manifest.
    """

    def __init__(self, path: Path, *, moved: Callable[[int], None] = unnoticed):
        self.path, self._moved = path, moved
        self.manifest = read_manifest(path)
        self._open = ExitStack()
        self._files: dict[str, Any] = {}
        self._index: dict[tuple[Kind, str, int], list[tuple[int, int, str]]] = defaultdict(list)
        for file, info in self.manifest.files.items():
            for name, (start, length) in info.slices.items():
                cut = self.manifest.parameters[name].partition_dim is not None
                key = (info.kind, name, info.tensor_rank if cut else 0)
                self._index[key].append((start, length, file))
        for places in self._index.values():
            places.sort()

    def close(self) -> None:
        """Close its files."""
        self._files.clear()
        self._open.close()

    def files(self, *kinds: Kind) -> list[str]:
        """Names of the files of these kinds (of all, if none is given), in one fixed order."""
        infos = self.manifest.files
        return sorted(name for name in infos if not kinds or infos[name].kind in kinds)

    def damage(self, names: list[str]) -> list[str]:
        """Sentences about those files whose size or SHA-256 is wrong; reads them whole."""
        infos = self.manifest.files
        with ThreadPoolExecutor(_DIGEST_THREADS, thread_name_prefix="digest") as pool:
            found = pool.map(
                lambda name: digest_problem(self.path, name, infos[name], moved=self._moved), names
            )
            return [problem for problem in found if problem]

    def missing(
        self, kind: Kind, name: str, *, tensor_rank: int, start: int, length: int
    ) -> str | None:
        """A sentence if the files do not hold all of these elements."""
        at = start
        for first, count, _ in self._index.get((kind, name, tensor_rank), []):
            if first <= at < first + count:
                at = first + count
        if at >= start + length:
            return None
        return (
            f"{self.path} holds no {kind} of {name} at element {at} of tensor-parallel part "
            f"{tensor_rank}"
        )

    def read(
        self,
        kind: Kind,
        name: str,
        *,
        tensor_rank: int,
        start: int,
        length: int,
        prefix: str = "",
    ) -> torch.Tensor:
        """Elements of one tensor-parallel part of a parameter: [length] on the CPU, as saved.

        Args:
            kind: Which files.
            name: Global name of the parameter.
            tensor_rank: Of the part; 0 where the parameter is not cut.
            start: First element, row-major in the part.
            length: Number of elements.
            prefix: Of the tensors in optimizer files, such as `exp_avg/`.
        """
        pieces = []
        places = self.places(kind, name, tensor_rank=tensor_rank, start=start, length=length)
        for place in places:
            saved = self._tensor(place.file, prefix + name)
            if saved.numel() != place.held:
                raise CheckpointError(
                    f"{self.path / place.file}: {prefix}{name} has {saved.numel()} elements, "
                    f"the manifest says {place.held}"
                )
            self._moved(place.length * saved.itemsize)
            pieces.append(saved.view(-1)[place.start : place.start + place.length])
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def places(
        self, kind: Kind, name: str, *, tensor_rank: int, start: int, length: int
    ) -> list[Place]:
        """Where elements of one tensor-parallel part of a parameter lie, in their order.

        Raises:
            CheckpointError: The files do not hold all of them.
        """
        wanted = {"tensor_rank": tensor_rank, "start": start, "length": length}
        if problem := self.missing(kind, name, **wanted):
            raise CheckpointError(problem)
        places, at = [], start
        for first, count, file in self._index[kind, name, tensor_rank]:
            if first <= at < first + count and at < start + length:
                end = min(first + count, start + length)
                places.append(Place(file=file, start=at - first, length=end - at, held=count))
                at = end
        return places

    def tensor_parts(self, name: str) -> int:
        """Into how many tensor-parallel parts a parameter's weight is cut."""
        if self.manifest.parameters[name].partition_dim is None:
            return 1
        return 1 + max((key[2] for key in self._index if key[:2] == ("weights", name)), default=0)

    def weight(self, name: str) -> torch.Tensor:
        """One parameter whole, put together from all tensor-parallel parts, on the CPU."""
        info = self.manifest.parameters[name]
        numel = 1
        for size in info.shape:
            numel *= size
        if info.partition_dim is None:
            return self._part(name, 0, info.shape, numel)
        count = self.tensor_parts(name)
        shape = list(info.shape)
        shape[info.partition_dim] //= count
        parts = [self._part(name, rank, shape, numel // count) for rank in range(count)]
        return unshard(parts, name, gated=info.partition_parts == 2)

    def _part(self, name: str, tensor_rank: int, shape: list[int], numel: int) -> torch.Tensor:
        flat = self.read("weights", name, tensor_rank=tensor_rank, start=0, length=numel)
        return flat.view(shape)

    @staticmethod
    def random_file(rank: int) -> str:
        """Where a rank keeps the states of its random generators."""
        return f"random-{rank:05d}.safetensors"

    def random_state(self, rank: int) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Tensors and texts that a rank saved of its random generators."""
        name = self.random_file(rank)
        file = self._file(name)
        keys = file.keys()
        return {key: self._tensor(name, key) for key in keys}, dict(file.metadata() or {})

    def fp8_state(self) -> dict[str, torch.Tensor]:
        """Scales and histories of every quantised layer, of the first rank that saved it."""
        found: dict[str, torch.Tensor] = {}
        for name in self.files("random"):
            for key in self._file(name).keys():  # noqa: SIM118 - a file is no mapping
                if key.startswith(FP8_PREFIX) and key not in found:
                    found[key] = self._tensor(name, key)
        return found

    def _file(self, name: str) -> Any:
        if name not in self._files:
            try:
                opened = safe_open(self.path / name, framework="pt", device="cpu")
                self._files[name] = self._open.enter_context(opened)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{self.path / name} cannot be read: {error}") from error
        return self._files[name]

    def _tensor(self, file: str, key: str) -> torch.Tensor:
        try:
            return self._file(file).get_tensor(key)
        except SafetensorError as error:
            raise CheckpointError(f"{self.path / file}: {key}: {error}") from error


def whole_damage(path: Path) -> list[str]:
    """Sentences about everything that is wrong with a checkpoint; reads it whole."""
    try:
        with CheckpointReader(path) as reader:
            return reader.damage(reader.files())
    except CheckpointError as error:
        return [str(error)]
