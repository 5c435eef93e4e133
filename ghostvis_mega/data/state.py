"""What a checkpoint remembers of the data: identities, no position; the step is the position.

The state is below 1 KB of JSON for up to a dozen datasets. It tells a resumed run that it would
read another stream than the one it continues.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

from ghostvis_mega.data.source import BatchSource
from ghostvis_mega.utils.errors import CheckpointError
from ghostvis_mega.utils.files import canonical_json

VERSION = 1
_DIGITS = 16
_SETTINGS = {
    "seed": "train.seed",
    "global_size": "batch.global_size",
    "seq_length": "data.seq_length",
    "packing": "data.packing",
    "tokens_per_image": "the model's tokens per image",
    "segment_align": "the alignment of samples (2 * parallel.context)",
}
_ABSENT = {"segment_align": 1}
"""What a state means that does not say it."""


def describe(source: BatchSource) -> dict[str, Any]:
    """The state of a source: JSON types only."""
    datasets = [
        {
            "name": dataset.path.name[:32],
            "digest": dataset.manifest.digest[:_DIGITS],
            "plan": source.params.digest(dataset),
        }
        for dataset in source.corpus.datasets
    ]
    phases = [
        [
            phase.start // source.global_size,
            hashlib.sha256(canonical_json(phase.quotas)).hexdigest()[:_DIGITS],
        ]
        for phase in source.order.phases
    ]
    state = {
        "version": VERSION,
        "seed": source.params.seed,
        "global_size": source.global_size,
        "seq_length": source.params.seq_length,
        "packing": source.packing,
        "tokens_per_image": source.params.tokens_per_image,
        "datasets": datasets,
        "blend": phases,
    }
    if source.params.segment_align != _ABSENT["segment_align"]:
        state["segment_align"] = source.params.segment_align
    return state


def identity(source: BatchSource) -> str:
    """16 hex digits of the datasets that sample and image numbers count over."""
    digests = [dataset.manifest.digest for dataset in source.corpus.datasets]
    return hashlib.sha256(canonical_json(digests)).hexdigest()[:_DIGITS]


def check(state: dict[str, Any], source: BatchSource, *, step: int) -> None:
    """Compare a checkpoint's state with the source that would continue it.

    Weights that change at `step` or later may differ: nothing of them has been read.

    Raises:
        CheckpointError: names every difference.
    """
    problems = list(_differences(state, describe(source), step=step))
    if problems:
        raise CheckpointError(
            "this checkpoint continues another stream of data: "
            + "; ".join(problems)
            + ". Restore those settings and files, or begin a new run with log.output elsewhere."
        )


def _differences(old: dict[str, Any], new: dict[str, Any], *, step: int) -> Iterator[str]:
    if not isinstance(old, dict) or old.get("version") != VERSION:
        version = old.get("version") if isinstance(old, dict) else old
        yield f"its data state has version {version!r}, this program reads {VERSION}"
        return
    for key, name in _SETTINGS.items():
        before, now = old.get(key, _ABSENT.get(key)), new.get(key, _ABSENT.get(key))
        if before != now:
            yield f"{name} was {before} and is {now}"
    yield from _dataset_differences(old.get("datasets"), new["datasets"])
    if _begun(old.get("blend"), step) != _begun(new["blend"], step):
        yield f"the weights of data.blend before step {step} were others"


def _dataset_differences(old: object, new: Sequence[dict[str, Any]]) -> Iterator[str]:
    if not isinstance(old, list) or len(old) != len(new):
        count = len(old) if isinstance(old, list) else 0
        yield f"it read {count} datasets and there are {len(new)}"
        return
    for number, (before, now) in enumerate(zip(old, new, strict=True)):
        if before.get("digest") != now["digest"]:
            yield (
                f"dataset {number} was {before.get('name')} with digest {before.get('digest')} and "
                f"is {now['name']} with digest {now['digest']}"
            )
        elif before.get("plan") != now["plan"]:
            yield f"the pack plan of {now['name']} was {before.get('plan')} and is {now['plan']}"


def _begun(phases: object, step: int) -> list[Any]:
    """Phases of which something was read before `step`; the first always."""
    if not isinstance(phases, list):
        return []
    return [list(phase) for number, phase in enumerate(phases) if number == 0 or phase[0] < step]
