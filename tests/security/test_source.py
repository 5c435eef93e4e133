"""No construct that runs code from a data file, a checkpoint or a shell string."""

import ast
from pathlib import Path

import pytest

pytestmark = pytest.mark.durability

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("ghostvis_mega", "tools", "examples", "tests")
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal"}
UNSAFE_CALLS = {
    "eval": "runs text as code",
    "exec": "runs text as code",
    "compile": "makes code of text",
    "__import__": "imports by a computed name",
    "os.system": "runs a shell",
    "os.popen": "runs a shell",
    "yaml.load": "can construct objects; use safe_load",
    "yaml.unsafe_load": "constructs objects",
    "yaml.full_load": "constructs objects",
}
UNSAFE_METHODS = {"extractall": "writes where the archive says", "extract": "as extractall"}
UNSAFE_KEYWORDS = {"shell", "trust_remote_code", "allow_pickle"}
OWN_CODE = {
    "tests/convert/demo_answers.py",
    "tests/convert/test_quantize.py",
    "tests/convert/test_stock_programs.py",
    "tests/generate/test_engine.py",
}
"""Tests in which stock transformers loads an export of ours with the code that we wrote into it."""


def dotted(node: ast.AST) -> str:
    """`a.b.c` of a name or attribute chain, else an empty text."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        head = dotted(node.value)
        return f"{head or '?'}.{node.attr}"  # of a call or an item: `load(path).eval`
    return ""


def call_findings(call: ast.Call) -> list[str]:
    name = dotted(call.func)
    keywords = {k.arg: k.value for k in call.keywords}
    found = []
    # `re.compile` and a method called eval (torch modules) are other things: whole names only.
    if name in UNSAFE_CALLS:
        found.append(f"{name}: {UNSAFE_CALLS[name]}")
    method = call.func.attr if isinstance(call.func, ast.Attribute) else ""
    if method in UNSAFE_METHODS:
        found.append(f"{method}: {UNSAFE_METHODS[method]}")
    for keyword in UNSAFE_KEYWORDS & {k for k in keywords if k}:
        value = keywords[keyword]
        if not (isinstance(value, ast.Constant) and value.value is False):
            found.append(f"{keyword} is not False")
    if name in ("torch.load", "torch.serialization.load"):
        safe = keywords.get("weights_only")
        if not (isinstance(safe, ast.Constant) and safe.value is True):
            found.append("torch.load without weights_only=True")
    if None in keywords and name in ("torch.load", "subprocess.run", "subprocess.Popen"):
        found.append(f"{name} with **keywords hides what it allows")
    return found


def findings(text: str) -> list[str]:
    """What is unsafe in one module, with its line."""
    found = []
    for node in ast.walk(ast.parse(text)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        found += [
            f"line {node.lineno}: imports {name}"
            for name in names
            if name.split(".")[0] in UNSAFE_MODULES or name in UNSAFE_CALLS or name == "torch.load"
        ]
        if isinstance(node, ast.Call):
            found += [f"line {node.lineno}: {text}" for text in call_findings(node)]
    return found


def sources() -> list[Path]:
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    return sorted([*found, ROOT / "setup.py"])


def test_there_is_something_to_look_at():
    assert any(path.name == "load.py" for path in sources())


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_source_is_safe(path: Path):
    found = findings(path.read_text(encoding="utf-8"))
    if path.relative_to(ROOT).as_posix() in OWN_CODE:
        assert any("trust_remote_code" in text for text in found), "no exception needed"
        found = [text for text in found if "trust_remote_code" not in text]
    assert found == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads",
        "def f():\n    import dill",
        "eval('1')",
        "exec(code)",
        "import yaml\nyaml.load(text)",
        "from yaml import load",
        "archive.extractall(folder)",
        "import subprocess\nsubprocess.run(line, shell=True)",
        "subprocess.run(line, **options)",
        "AutoModel.from_pretrained(path, trust_remote_code=flag)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=safe)",
        "from torch import load",
        "numpy.load(path, allow_pickle=True)",
        "os.system(line)",
        "open_archive(path).extractall(folder)",
        "torch.load(path, **options)",
    ],
)
def test_each_unsafe_construct_is_noticed(text: str):
    assert findings(text)


@pytest.mark.parametrize(
    "text",
    [
        "model.eval()",
        "load(path).eval()",
        "import re\nre.compile('a')",
        "import yaml\nyaml.safe_load(text)",
        "torch.load(path, weights_only=True)",
        "subprocess.run([a, b], check=True)",
        "from_pretrained(path, trust_remote_code=False)",
    ],
)
def test_safe_relatives_pass(text: str):
    assert findings(text) == []
