"""Builds a recipe and prints a line after every block, so that a test can kill it in between."""

import sys
from pathlib import Path

from ghostvis_mega.data import writer
from ghostvis_mega.data.build import build
from ghostvis_mega.data.recipe import load_recipe

if __name__ == "__main__":
    writer.SHARD_BYTES = 40_000
    build(
        load_recipe(Path(sys.argv[1])),
        workers=int(sys.argv[2]),
        progress=lambda rows, rejected: print(rows, rejected, flush=True),
        checkpoint_seconds=0.0,
    )
    print("done", flush=True)
