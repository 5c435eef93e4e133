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


@pytest.mark.parametrize("inside", [True, False])
def test_without_a_gpu_training_starts_without_the_compiler(inside: bool) -> None:
    """Outside it is loaded: the control."""
    code = (
        "import contextlib, sys, torch; from ghostvis_mega.utils.imports import many_imports\n"
        "kept, torch.cuda.is_available = torch.compile, lambda: False\n"
        "with CONTEXT(): import ghostvis_mega.session\n"
        "print(torch.compile is kept, 'torch._inductor.compile_fx' in sys.modules)"
    )
    context = "many_imports" if inside else "contextlib.nullcontext"
    done = subprocess.run(
        [sys.executable, "-c", code.replace("CONTEXT", context)],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["True", str(not inside)]


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
