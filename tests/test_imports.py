"""Packages import only packages to their left, and what must be quick does not import torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "ghostvis_mega"
ORDER = (
    "config",
    "data",
    "model",
    "parallel",
    "engine",
    "train",
    "checkpoint",
    "convert",
    "generate",
    "eval",
    "rl",
)
PLACES = (*ORDER, "perf", "utils", "cli")
WITHOUT_TORCH = (
    "ghostvis_mega.config.load",
    "ghostvis_mega.config.rules",
    "ghostvis_mega.config.deepspeed",
    "ghostvis_mega.data.manifest",
    "ghostvis_mega.parallel.plan",
    "ghostvis_mega.train.preflight",
    "ghostvis_mega.model.flops",
    "ghostvis_mega.cli.main",
)
HEAVY = ("torch", "deepspeed", "megatron", "transformers", "numpy")


def imported_modules(tree: ast.AST) -> list[tuple[int, str]]:
    """(line, dotted name) of every absolute import, also inside functions."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
            # `from ghostvis_mega import data` names a package in the alias.
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def may_import(importer: str, imported: str) -> bool:
    """Whether the arrow between two packages of ghostvis_mega points to the left."""
    if importer == imported or imported == "utils" or importer == "cli":
        return True
    if importer == "utils" or imported in ("perf", "cli"):
        return False
    if importer == "perf":
        return ORDER.index(imported) <= ORDER.index("train")
    return ORDER.index(imported) < ORDER.index(importer)


def wrong_arrows(importer: str, text: str) -> list[str]:
    """Imports of `text`, a module of the package `importer`, that point to the right."""
    wrong = []
    for line, name in imported_modules(ast.parse(text)):
        parts = name.split(".")
        if parts[0] != "ghostvis_mega" or parts[1:] in ([], ["__version__"]):
            continue
        # The module beside the packages that wires them stands to the right of all but `cli`.
        if importer == "cli" and parts[1] == "session":
            continue
        if parts[1] not in PLACES or not may_import(importer, parts[1]):
            wrong.append(f"line {line}: {importer} imports {parts[1]}")
    return wrong


def modules() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if p.parent != PACKAGE)


def test_every_package_has_its_place():
    names = {p.name for p in PACKAGE.iterdir() if p.is_dir() and any(p.glob("*.py"))}
    assert names <= set(PLACES)


def test_arrows_point_to_the_left():
    wrong = []
    for path in modules():
        importer = path.relative_to(PACKAGE).parts[0]
        text = path.read_text(encoding="utf-8")
        wrong += [f"{path.relative_to(ROOT)} {arrow}" for arrow in wrong_arrows(importer, text)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("importer", "text"),
    [
        ("config", "from ghostvis_mega.data import manifest"),
        ("data", "def f():\n    import ghostvis_mega.engine.step"),
        ("utils", "from ghostvis_mega.config.schema import RunConfig"),
        ("perf", "from ghostvis_mega import checkpoint"),
        ("train", "from ghostvis_mega.perf import estimate"),
        ("rl", "from ghostvis_mega.cli.main import main"),
    ],
)
def test_an_arrow_to_the_right_is_noticed(importer: str, text: str):
    assert len(wrong_arrows(importer, text)) == 1


def test_imports_are_absolute():
    # What is shipped beside exported weights is a package of its own there.
    shipped = PACKAGE / "convert" / "remote"
    relative = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in modules()
        if path.parent != shipped
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert not relative, "the walk above would not see these: " + ", ".join(relative)


def test_package_files_import_nothing():
    """Else naming one module of a package would load them all."""
    busy = [
        str(path.relative_to(ROOT))
        for path in (PACKAGE / "__init__.py", *PACKAGE.glob("*/__init__.py"))
        if imported_modules(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not busy


def heavy_after(statement: str) -> list[str]:
    code = f"import sys; {statement}; print(*[m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def test_settings_and_checks_do_not_import_torch():
    assert heavy_after("import " + ", ".join(WITHOUT_TORCH)) == []


def test_training_does_not_import_transformers():
    """Which reads 3,000 files: a third of a start on a CPU."""
    found = heavy_after(
        "import torch, ghostvis_mega.session; "
        "from ghostvis_mega.config.load import load_run_config; "
        "from ghostvis_mega.engine.build import build_encoder; "
        "run = load_run_config('examples/configs/vlm_tiny_easyvqa.yaml', []); "
        "made = build_encoder(run, device=torch.device('cpu'), dtype=torch.float32); "
        "size = run.model.vision.image_size; "
        "made(torch.zeros(1, 3, size, size, dtype=torch.uint8)).sum().backward()"
    )
    assert {"torch", "megatron", "deepspeed"} <= set(found)
    assert "transformers" not in found


def test_a_heavy_import_is_noticed():
    assert "numpy" in heavy_after("import numpy")


def test_model_code_is_single_device_code():
    """torch.distributed stays out of model/; Megatron's layers get their groups from outside."""
    wrong = []
    for path in sorted((PACKAGE / "model").glob("*.py")):
        for line, name in imported_modules(ast.parse(path.read_text(encoding="utf-8"))):
            if name.startswith("torch.distributed"):
                wrong.append(f"{path.relative_to(ROOT)}:{line}")
    assert not wrong
