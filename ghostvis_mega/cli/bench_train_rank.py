"""One rank of one row of `ghostvis bench train`, as its launcher starts it."""

import os
from pathlib import Path

from ghostvis_mega.perf.train_bench.launches import ORDER_VARIABLE, Order
from ghostvis_mega.utils.logging import setup_logging

_LONGEST = 300
"""Characters of a reason: CUDA's tell the state of the allocator at length."""


def one_sentence(error: BaseException) -> str:
    """What an error says, on one line that is not too long."""
    text = " ".join(str(error).split())
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def main() -> None:
    """Time the row that the environment names."""
    rank = int(os.environ["RANK"])
    setup_logging(rank=rank)
    order = Order.read(Path(os.environ[ORDER_VARIABLE]))
    from ghostvis_mega.perf.train_bench.execute import execute
    from ghostvis_mega.session import local_device, open_world

    try:
        with open_world(order.run, device=local_device(order.run)) as world:
            execute(order, world.groups, device=world.device, watchdog=world.watchdog)
    except BaseException as error:
        # For the table; the traceback follows in the rank's output.
        order.reason(rank).write_text(one_sentence(error), encoding="utf-8")
        raise


if __name__ == "__main__":
    main()
