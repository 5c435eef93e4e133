"""One handler for the whole process: which ranks speak, in which format, and who has to be quiet.

Library modules only do `log = logging.getLogger(__name__)`; entry points call `setup_logging` once.
"""

import logging
import sys
import threading
import traceback
import warnings
from types import TracebackType
from typing import TextIO

from ghostvis_mega.utils.secrets import find_secrets, hide

LIBRARY = "ghostvis_mega"

CHATTER = (
    # Megatron-Core names absent accelerators at import; the layer spec in use is logged by us.
    ("Transformer Engine and Apex are not installed", UserWarning, "megatron"),
    ("Apex is not installed", UserWarning, "megatron"),
    ("The following imports from `dynamic_context.py`", DeprecationWarning, "megatron"),
    ("full scope is deprecated", UserWarning, "megatron"),
    ("invalid escape sequence", SyntaxWarning, ""),
    ("Detected a Jax installation", RuntimeWarning, "transformer_engine"),
    # DeepSpeed's choice of collectives, said anew at every step.
    ("`torch.distributed.(all_gather_into|reduce_scatter)_tensor` is dep", FutureWarning, "torch"),
)
"""Warnings about facts that we report ourselves: start of the message, class, module."""


class RankFormatter(logging.Formatter):
    """`12:34:56 [rank] message`; anything above INFO also carries its level and its origin.

    Values of secrets are hidden, also in tracebacks.
    """

    def __init__(self, *, rank: int):
        super().__init__(datefmt="%H:%M:%S")
        self._secrets = find_secrets()
        head = f"%(asctime)s [{rank}] "
        self._plain = logging.Formatter(head + "%(message)s", datefmt=self.datefmt)
        self._marked = logging.Formatter(
            head + "%(levelname)s %(name)s: %(message)s", datefmt=self.datefmt
        )

    def format(self, record: logging.LogRecord) -> str:
        """Format one record."""
        ordinary = record.levelno <= logging.INFO
        return hide((self._plain if ordinary else self._marked).format(record), self._secrets)


class RankHandler(logging.StreamHandler):
    """The handler that `setup_logging` installs; a class of its own so that it is found again."""


class MinimumLevel(logging.Filter):
    """Drops records below a level, whatever level the logger's owner sets later on import."""

    def __init__(self, level: int):
        super().__init__()
        self.level = level

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record passes."""
        return record.levelno >= self.level


def setup_logging(*, rank: int, verbose: bool = False, stream: TextIO | None = None) -> None:
    """Install the handler; a second call replaces what the first one did.

    Rank 0 logs our INFO (DEBUG when `verbose`) and everybody's warnings. Other ranks log our
    warnings and everybody's errors, so that one third-party warning is not printed once a rank.

    Args:
        rank: global rank of this process.
        verbose: log DEBUG of our own modules on rank 0.
        stream: where to write; standard error by default.
    """
    root = logging.getLogger()
    for handler in [h for h in root.handlers if isinstance(h, RankHandler)]:
        root.removeHandler(handler)
    handler = RankHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(RankFormatter(rank=rank))
    root.addHandler(handler)

    ours = logging.DEBUG if verbose else logging.INFO
    others = logging.WARNING if rank == 0 else logging.ERROR
    root.setLevel(others)
    logging.getLogger(LIBRARY).setLevel(ours if rank == 0 else logging.WARNING)
    logging.captureWarnings(True)
    for message, category, module in CHATTER:
        warnings.filterwarnings("ignore", message=message, category=category, module=module)
    sys.excepthook = _tell_uncaught
    threading.excepthook = _tell_uncaught_of_thread
    adopt_deepspeed_logger()
    _quieten("DeepSpeed", others)
    # Says on every import, on machines without a GPU, that there is no GPU.
    _quieten("torch.utils.cpp_extension", logging.ERROR)


def _tell_uncaught(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """As Python does by itself, without the values of secrets."""
    sys.stderr.write(hide("".join(traceback.format_exception(kind, error, trace))))


def _tell_uncaught_of_thread(told: threading.ExceptHookArgs) -> None:
    if told.exc_value is not None and not isinstance(told.exc_value, SystemExit):
        name = "a thread" if told.thread is None else told.thread.name
        sys.stderr.write(f"Exception in thread {name}:\n")
        _tell_uncaught(told.exc_type, told.exc_value, told.exc_traceback)


def adopt_deepspeed_logger() -> None:
    """Take away the handler that DeepSpeed's import gives its logger.

    It would write to standard output, between what a command prints there; only ours decides.
    """
    logger = logging.getLogger("DeepSpeed")
    logger.handlers.clear()
    logger.propagate = True


def _quieten(name: str, level: int) -> None:
    logger = logging.getLogger(name)
    for old in [f for f in logger.filters if isinstance(f, MinimumLevel)]:
        logger.removeFilter(old)
    logger.addFilter(MinimumLevel(level))
