"""Actions that all ranks carry out, or all ranks report as failed."""

from collections.abc import Callable

import torch.distributed as dist

from ghostvis_mega.utils.errors import CheckpointError, FolderTakenError


def on_every_rank[T](action: Callable[[], T], *, group: dist.ProcessGroup | None = None) -> list[T]:
    """Run `action` on all ranks and return all results, by rank; collective.

    Without a process group there is one rank.

    Args:
        action: What it raises of OSError and CheckpointError counts as its failure.
        group: Of all ranks; by default the one that training uses as well.

    Raises:
        CheckpointError: It failed on some rank; raised on all of them, so that none waits for one
            that is gone. FolderTakenError stays one.
    """
    result: T | None = None
    failure: str | None = None
    taken = False
    try:
        result = action()
    except (OSError, CheckpointError) as error:
        failure, taken = str(error), isinstance(error, FolderTakenError)
    outcomes: list[tuple[T | None, str | None, bool] | None] = [(result, failure, taken)]
    if dist.is_initialized():
        outcomes = [None] * dist.get_world_size()
        dist.all_gather_object(outcomes, (result, failure, taken), group=group)
    if failures := [o[1] for o in outcomes if o is not None and o[1] is not None]:
        kind = FolderTakenError if any(o[2] for o in outcomes if o is not None) else CheckpointError
        # Ranks that share a cause say the same.
        raise kind("; ".join(dict.fromkeys(failures)))
    return [outcome[0] for outcome in outcomes]


def on_first_rank[T](action: Callable[[], T], *, group: dist.ProcessGroup | None = None) -> T:
    """Run `action` on rank 0 alone; all ranks get its result or its failure; collective."""
    first = not dist.is_initialized() or dist.get_rank() == 0
    return on_every_rank(lambda: action() if first else None, group=group)[0]
