"""A process of training starts without what it does not need at once."""

import gc
import subprocess
import sys

import pytest

from ghostvis_mega.utils.imports import many_imports
from tests.launch import ROOT


def test_nobody_collects_inside_and_what_is_there_stays_untouched() -> None:
    collections = sum(each["collections"] for each in gc.get_stats())
    frozen = gc.get_freeze_count()
    try:
        with pytest.raises(ImportError), many_imports():
            kept = [[] for _ in range(20_000)]
            assert sum(each["collections"] for each in gc.get_stats()) == collections
            raise ImportError
        assert gc.isenabled() and gc.get_freeze_count() > frozen + len(kept)
    finally:
        gc.unfreeze()


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("session", ("transformers", "accelerate", "wandb", "datasets", "matplotlib")),
        # They are started often, and drills fork what they have imported.
        ("checkpoint.rewrite", ("megatron", "deepspeed", "transformers")),
        ("checkpoint.drill_crash", ("megatron", "deepspeed", "transformers")),
        ("checkpoint.drill_corrupt", ("megatron", "deepspeed", "transformers")),
    ],
)
def test_what_a_module_does_not_need_is_not_imported(module: str, heavy: tuple[str, ...]) -> None:
    code = "import sys, ghostvis_mega.MODULE; print([n for n in HEAVY if n in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code.replace("MODULE", module).replace("HEAVY", repr(heavy))],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "[]"
