"""A signal asks a run to save and to stop; the ranks agree on it before a step.

Slurm sends SIGTERM to what it preempts or cancels, and `slurm/common.sh` sends SIGUSR1 some time
before the time limit. Either may reach one rank, some, or every process of the job; in all cases
every rank finishes the step it is in, all stop before the same next one, save, and end with
`EXIT_REQUEUE`: the steps done are all in the checkpoint, and the same command goes on from there.

The process that reads data ahead does so in threads (`train.feed`), which no signal reaches.
"""

import logging
import signal
from types import FrameType

log = logging.getLogger(__name__)

EXIT_REQUEUE = 85
"""Exit code of a run that was asked to stop and has saved: start it again to go on. No shell, no
signal (128 + n) and none of our other ends (1, 2, 3, 70) uses it."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """What this process was asked for, and what all ranks have agreed on.

    A request may arrive at any time, also before the ranks have met; nothing is done about it but
    to remember it.
    """

    def __init__(self) -> None:
        self.asked = 0
        """Number of the signal that this process was sent, 0 without one."""
        self.agreed = 0
        """Number of the signal for which all ranks stop, 0 while none does."""

    @classmethod
    def on_signals(cls) -> "StopRequest":
        """A request that `SIGNALS` sent to this process make from now on; main thread only."""
        request = cls()

        def ask(number: int, frame: FrameType | None) -> None:
            # Nothing else: this may run between any two lines, also of the logging module.
            request.asked = number

        for number in SIGNALS:
            signal.signal(number, ask)
        return request

    def agree(self, number: int, *, done: int) -> None:
        """Take over what the ranks have agreed on after `done` steps; 0: go on."""
        self.agreed = number
        if number:
            log.info("stopping after step %d: %s", done, self.reason)

    @property
    def reason(self) -> str:
        """Such as `stopped by SIGTERM`."""
        return f"stopped by {signal.Signals(self.agreed).name}"
