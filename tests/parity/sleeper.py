"""A worker whose rank 2 never reaches the collective that all others wait in."""

import sys
import time

import torch
import torch.distributed as dist


def asleep_forever() -> None:
    """What the watchdog has to name."""
    while True:
        time.sleep(3600)


def fail() -> None:
    """An error on one rank only."""
    raise ValueError("rank 1 has had enough")


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    if rank == 2 and sys.argv[1] == "hang":
        asleep_forever()
    if rank == 1 and sys.argv[1] == "fail":
        fail()
    dist.all_reduce(torch.ones(1))


if __name__ == "__main__":
    main()
