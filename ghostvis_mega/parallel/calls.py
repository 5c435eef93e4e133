"""What this rank has called of others, and how long it waited for them: cheap enough for every
step.

While a `CallWatch` is open the methods of torch's `ProcessGroup` and `Work` are wrapped, as
`parallel.trace` does it, but little is noted: how many calls each group has had and the latest one.
That is what tells, when ranks hang, who has not come to a call that others wait in. Calls of
background threads are left out.
"""

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypedDict

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup, Work

from ghostvis_mega.parallel.trace_calls import POINT_TO_POINT, TRACED, caller


class GroupCalls(TypedDict):
    """Calls that all members of a group make."""

    label: str
    ranks: list[int]
    calls: int


class LastCall(TypedDict):
    """The call that a rank made last, to a group or to one rank of it."""

    what: str
    group: str
    number: int
    """Of the group's calls; 0 for a message to one rank."""
    place: str
    seconds: float
    """Since it was made."""
    returned: bool
    """Whether Python has gone on; kernels on a GPU may still wait."""


class CallWatch:
    """Counts while used as a context manager."""

    def __init__(self) -> None:
        self.labels: dict[str, str] = {}
        """Names for groups, by torch's name of the group; others go by their description."""
        self.waiting: Callable[[], AbstractContextManager[None]] | None = None
        """Gives a context around each call and each wait for one; None: nothing is timed."""
        self._groups: dict[str, GroupCalls] = {}
        self._last: tuple[str, str, str, int, float, Any] | None = None
        self._returned = True
        self._originals: list[tuple[type, str, Any]] = []

    def __enter__(self) -> "CallWatch":
        for name in TRACED:
            if name in ProcessGroup.__dict__:
                self._wrap(ProcessGroup, name, self._call)
        self._wrap(Work, "wait", self._wait)
        return self

    def __exit__(self, *_: object) -> None:
        for owner, name, original in reversed(self._originals):
            setattr(owner, name, original)
        self._originals.clear()

    @property
    def groups(self) -> dict[str, GroupCalls]:
        """Calls by torch's name of the group."""
        return {
            key: GroupCalls(label=self._label(key), ranks=calls["ranks"], calls=calls["calls"])
            for key, calls in self._groups.items()
        }

    def _label(self, key: str) -> str:
        return self.labels.get(key) or self._groups[key]["label"] or key

    @property
    def last(self) -> LastCall | None:
        """The latest call; None before the first."""
        if self._last is None:
            return None
        name, what, key, number, since, place = self._last
        return LastCall(
            what=f"{name} of {what}",
            group=self._label(key),
            number=number,
            place=place,
            seconds=time.monotonic() - since,
            returned=self._returned,
        )

    def _wrap(self, owner: type, name: str, wrapper: Callable) -> None:
        original = getattr(owner, name)
        self._originals.append((owner, name, owner.__dict__[name]))
        setattr(owner, name, wrapper(name, original))

    def _call(self, name: str, original: Callable) -> Callable:
        def call(group: ProcessGroup, *args: Any, **keywords: Any) -> Any:
            if _in_background():
                return original(group, *args, **keywords)
            self._note(name, group, args)
            self._returned = False
            with self.waiting() if self.waiting is not None else nullcontext():
                result = original(group, *args, **keywords)
            self._returned = True
            return result

        call.__name__ = name
        return call

    def _wait(self, name: str, original: Callable) -> Callable:
        def wait(work: Work, *args: Any, **keywords: Any) -> Any:
            if _in_background():
                return original(work, *args, **keywords)
            self._returned = False
            with self.waiting() if self.waiting is not None else nullcontext():
                result = original(work, *args, **keywords)
            self._returned = True
            return result

        wait.__name__ = name
        return wait

    def _note(self, name: str, group: ProcessGroup, args: tuple[Any, ...]) -> None:
        key = group.group_name
        calls = self._groups.get(key)
        if calls is None:
            ranks = dist.get_process_group_ranks(group)
            label = group.group_desc.lower().removesuffix("_group")
            calls = self._groups[key] = GroupCalls(label=label, ranks=ranks, calls=0)
        number = 0
        if name not in POINT_TO_POINT:
            number = calls["calls"] = calls["calls"] + 1
        self._last = (name, _amount(args), key, number, time.monotonic(), caller())


def _in_background() -> bool:
    """Whether a thread of ours calls that does not train, such as the one that writes checkpoints.

    Backward passes on a GPU call from threads that Python has not started and knows as dummies.
    """
    thread = threading.current_thread()
    return thread is not threading.main_thread() and not thread.name.startswith("Dummy-")


def _amount(args: tuple[Any, ...]) -> str:
    """Elements and kind of the first tensor that a call was given."""
    given: Any = args[0] if args else None
    while isinstance(given, list | tuple) and given:
        given = given[0]
    if not isinstance(given, torch.Tensor):
        return "nothing"
    return f"{given.numel()} {str(given.dtype).removeprefix('torch.')}"
