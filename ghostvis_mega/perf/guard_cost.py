"""What looking for NaN, infinities and loss spikes costs a step: time, reads by the host, calls."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from ghostvis_mega.config.schema import RunConfig
from ghostvis_mega.data.batch import GlobalBatch
from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.engine import step as step_module
from ghostvis_mega.engine import zero as zero_module
from ghostvis_mega.engine.step import StepInput, TrainEngine
from ghostvis_mega.parallel.calls import CallWatch
from ghostvis_mega.parallel.groups import Groups
from ghostvis_mega.train.feed import Feed
from ghostvis_mega.train.guards import Guards
from ghostvis_mega.utils.figures import Figure, at_most, measured
from ghostvis_mega.utils.timing import SectionTimer

SHARE_BAR = 0.005
"""Of a step."""
_LEAST_STEP_S = 0.1
"""The bar holds from there on; a shorter step is of a model for tests."""
_READS = frozenset(
    ("item", "tolist", "cpu", "numpy", "nonzero", "equal", "is_nonzero")
    + ("__bool__", "__float__", "__int__", "__index__")
)
"""Functions of tensors whose answer the host waits for."""
_FIRST = 3
"""Steps that are not measured: kernels are chosen and memory is taken."""


class HostReads(TorchFunctionMode):
    """Counts how often this thread waits for a number that the device computes."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count and go on."""
        self.count += getattr(func, "__name__", "") in _READS
        return func(*args, **(kwargs or {}))


class Pair(NamedTuple):
    """A step with guards and one without: seconds, or reads and calls."""

    guarded: Any
    plain: Any
    own_s: float
    """What the guards took in the guarded one."""


@dataclass
class GuardedSteps:
    """Steps of a run with and without guards.

    Args:
        run, groups, device: Of the run.
        calls: Open; counts this process's calls to others.
    """

    run: RunConfig
    groups: Groups
    device: torch.device
    calls: CallWatch
    done: int = 0
    left_out: int = 0
    """Steps that the guards refused, which would be cheaper than others."""
    host_s: list[float] = field(default_factory=list)
    """Of each guarded step, what the guards' decisions take on the host."""

    def __post_init__(self) -> None:
        self.engine = TrainEngine(self.run, self.groups, device=self.device)
        self.feed = Feed(self.run, self.groups, Dataset.open(self.run.data.train))
        self.guards = Guards(self.run, places=self.groups.places, rank=self.groups.rank)
        self.timer = SectionTimer(self.device)

    def fill_window(self) -> None:
        """Let the spike detector remember as many losses as it ever will: the dearest case."""
        loss = self._loss
        window = self.run.guards.spike_window
        self.guards.spikes.restore([loss * (1 + 0.1 * (n % 7 - 3)) for n in range(window)])

    def pair(self, *, counted: bool = False) -> "Pair":
        """The same batch with guards and without: seconds, or, where they are `counted`, reads by
        the host and calls to groups."""
        batch, work = self.feed.get(self.done)
        found = []
        for guarded in (True, False):
            calls = self._calls()
            with HostReads() if counted else contextlib.nullcontext() as reads:
                seconds = self._step(batch, work, guarded=guarded)
            found.append((reads.count, self._calls() - calls) if reads is not None else seconds)
        self.done += 1
        own_s = self.timer.read().get("checks", 0.0) + sum(self.host_s)
        self.host_s.clear()
        return Pair(guarded=found[0], plain=found[1], own_s=own_s)

    def _step(self, batch: GlobalBatch, work: StepInput, *, guarded: bool) -> float:
        """One step; its seconds, from its data being there to the decision about the next."""
        self._wait()
        began = time.perf_counter()
        with self._timed_checks() if guarded else without_checks(self.device):
            if guarded:
                self._on_host(lambda: self.guards.before(self.done))
            accept = self._accept if guarded else None
            result = self.engine.step(work, step=self.done, accept=accept)
        if guarded:
            corpus = self.feed.corpus
            self._on_host(lambda: self.guards.after(self.done, result, batch, work.windows, corpus))
            self.left_out += result.skipped
        self._loss = result.loss
        self._wait()
        self.engine.timer.read()
        return time.perf_counter() - began

    def _calls(self) -> int:
        return sum(group["calls"] for group in self.calls.groups.values())

    def _accept(self, loss: float) -> bool:
        return self._on_host(lambda: self.guards.accept(loss))

    def _on_host[T](self, action: Callable[[], T]) -> T:
        began = time.perf_counter()
        result = action()
        self.host_s.append(time.perf_counter() - began)
        return result

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _timed_checks(self) -> contextlib.ExitStack:
        honest = step_module.not_finite

        def timed(*args: Any, **keywords: Any) -> torch.Tensor:
            with self.timer.section("checks"):
                return honest(*args, **keywords)

        return _checks_are(timed)


def without_checks(device: torch.device) -> contextlib.ExitStack:
    """Steps inside take every number for finite."""
    zero = torch.zeros((), device=device)
    return _checks_are(lambda *args, **keywords: zero)


def _checks_are(replacement: Callable[..., torch.Tensor]) -> contextlib.ExitStack:
    with contextlib.ExitStack() as stack:
        for module in (step_module, zero_module):
            stack.enter_context(mock.patch.object(module, "not_finite", replacement))
        return stack.pop_all()


@contextlib.contextmanager
def guarded_steps(
    run: RunConfig, groups: Groups, *, device: torch.device, calls: CallWatch
) -> Iterator[GuardedSteps]:
    """A model whose steps can be taken with and without guards."""
    steps = GuardedSteps(run, groups, device, calls)
    try:
        yield steps
    finally:
        steps.feed.close()
        steps.engine.close()


def measure_guards(
    run: RunConfig,
    groups: Groups,
    *,
    device: torch.device,
    calls: CallWatch,
    steps: int,
    progress: Callable[[str], None],
) -> list[Figure]:
    """Rows of what guards cost; collective.

    Args:
        run: Settings; `log.output` should be a scratch folder.
        groups, device, calls: Of this rank.
        steps: Of each kind, in turn.
        progress: Told what is being done.
    """
    with guarded_steps(run, groups, device=device, calls=calls) as taken:
        for number in range(_FIRST):
            progress(f"pair {number + 1}, not measured")
            taken.pair()
        taken.fill_window()
        progress("counting")
        counted = taken.pair(counted=True)
        pairs = []
        for number in range(steps):
            progress(f"pair {number + 1} of {steps}")
            pairs.append(taken.pair())
        left_out = taken.left_out
    (reads, called), (plain_reads, plain_called) = counted.guarded, counted.plain
    step_s, plain_s = median(p.guarded for p in pairs), median(p.plain for p in pairs)
    share = median(p.own_s / p.guarded for p in pairs)
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, share)
    bar = SHARE_BAR if step_s >= _LEAST_STEP_S else None
    return [
        measured("step with guards", step_s, "s"),
        measured("step without", plain_s, "s"),
        measured("step with over without, minus 1", step_s / plain_s - 1, ""),
        at_most("time in guards, share of a step", max(shares), "", bar),
        measured("reads by the host in a step without guards", plain_reads, ""),
        at_most("more reads with guards", reads - plain_reads, "", 0),
        measured("calls to groups in a step without guards", plain_called, ""),
        at_most("more calls with guards", called - plain_called, "", 0),
        at_most("steps that the guards left out", left_out, "", 0),
    ]
