"""The command: verdicts, refusals, launches that fail, and a run of somebody's own."""

import itertools
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from ghostvis_mega.cli.main import app
from ghostvis_mega.config import deepspeed, rules
from ghostvis_mega.config.load import read_run_config
from ghostvis_mega.perf.certify import drive
from ghostvis_mega.perf.certify.bars import NOISE_CAPS, noise_caps
from ghostvis_mega.perf.certify.compare import beside_noise
from ghostvis_mega.perf.certify.gpu_faults import GPU_FAULTS
from ghostvis_mega.perf.certify.gpu_layouts import LAYOUTS as GPU_LAYOUTS
from ghostvis_mega.perf.certify.own_settings import checked, load_own, not_read
from ghostvis_mega.perf.certify.report import Outcome, brief, exit_code, markdown, summary
from ghostvis_mega.perf.certify.request import Entry, Request, own_entries
from ghostvis_mega.perf.certify.truth import Truth
from ghostvis_mega.utils.launch import EXIT_HANG, device_environment
from ghostvis_mega.utils.worst import worst
from tests.launch import ROOT

GOOD = {
    "gradient_error": 1e-7,
    "gradient_name": "decoder.layers.0.mlp.linear_fc1.weight",
    "joint_error": 1e-7,
    "loss_error": 1e-8,
    "weight_error": 1e-7,
    "weight_name": "embedding.weight",
    "update_error": 1e-5,
    "update_name": "embedding.weight",
    "norm_error": 1e-8,
    "seconds": 1.0,
}

NOISE = {
    "joint_error": 1.2e-2,
    "loss_error": 1e-6,
    "weight_error": 0.1,
    "update_error": 0.1,
    "norm_error": 4e-3,
    "gradient_error": 0.04,
}
ROUNDED = GOOD | {
    "joint_error": 1.3e-2,
    "ratio": 1.44,
    "ratio_name": "tower.encoder.layers.1.layer_norm2.bias",
    "loss_error": 9e-5,
    "weight_error": 0.1,
    "update_error": 0.12,
    "update_ratio": 1.4,
    "update_ratio_name": "decoder.final_layernorm.weight",
    "norm_error": 1e-2,
    "noise": NOISE,
    "noise_name": "tower.encoder.layers.0.self_attn.q_proj.weight",
    "noise_caps": noise_caps(fp8=False),
}
"""Figures as GPUs gave them."""

RUN = """\
model: {{preset: vlm_tiny}}
data: {{train: {data}/train.gvd, seq_length: 128, augment: true, num_workers: 1}}
batch: {{global_size: 4}}
optim: {{warmup_steps: 5, lr: {{llm: 1.0e-3, vision: 1.0e-3, projector: 1.0e-3}}}}
deepspeed: {{llm: ds_configs/zero1.json}}
train: {{steps: 10, device: cpu}}
log: {{output: {folder}/run}}
"""


def run_cli(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["certify", *arguments])
    return result.exit_code, result.output


@pytest.mark.parametrize(
    "key", ["gradient_error", "loss_error", "weight_error", "update_error", "norm_error"]
)
@pytest.mark.parametrize("value", [2e-2, math.nan, math.inf])
def test_one_figure_over_its_bar_is_red(key: str, value: float) -> None:
    assert Outcome("a", row=GOOD).verdict == "fine"
    outcome = Outcome("a", row=GOOD | {key: value})
    assert outcome.verdict == "red"
    assert [figure["ok"] for figure in outcome.figures()].count(False) == 1


@pytest.mark.parametrize(
    ("key", "over"),
    [
        ("joint_error", 2.5e-2),
        ("ratio", 2.1),
        ("loss_error", 4e-4),
        ("weight_error", 0.31),
        ("norm_error", 4e-2),
        ("update_ratio", 3.1),
    ],
)
def test_every_figure_in_bf16_can_be_red(key: str, over: float) -> None:
    assert Outcome("a", row=ROUNDED).verdict == "fine"
    for value in (over, math.nan, math.inf):
        outcome = Outcome("a", row=ROUNDED | {key: value})
        assert outcome.verdict == "red"
        assert [figure["ok"] for figure in outcome.figures()].count(False) == 1


@pytest.mark.parametrize("key", NOISE)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_noise_that_is_no_number_grants_nothing(key: str, value: float) -> None:
    assert Outcome("a", row=ROUNDED | {"noise": NOISE | {key: value}}).verdict == "red"


@pytest.mark.parametrize("key", NOISE_CAPS)
def test_what_all_get_wrong_is_not_granted_as_noise(key: str) -> None:
    shared = {"joint_error": 0.9, "loss_error": 0.9, "norm_error": 0.9, "gradient_error": 0.9}
    row = ROUNDED | {"joint_error": 0.9, "loss_error": 0.9, "norm_error": 0.9}
    for caps in (noise_caps(fp8=False), noise_caps(fp8=True)):
        one = NOISE | {key: shared[key]}
        assert Outcome("a", row=ROUNDED | {"noise": one, "noise_caps": caps}).verdict == "red"
        everything = row | {"noise": NOISE | shared, "noise_caps": caps}
        assert Outcome("a", row=everything).verdict == "red"


def test_nan_is_the_worst_wherever_it_stands() -> None:
    figures = {"a": 1.0, "b": math.nan, "c": math.inf}
    assert max(figures.values()) != figures["b"], "what is shown here is what max() loses"
    for order in itertools.permutations(figures.items()):
        assert worst(order)[0] == "b"
    assert worst([("a", 1.0), ("c", math.inf), ("d", -math.inf)]) == ("c", math.inf)


def test_a_parameter_without_noise_of_its_own_is_held_to_a_share_of_the_joint() -> None:
    zeros = {"a": torch.zeros(1), "b": torch.zeros(1)}
    changes = squares = {"a": 1.0, "b": 1.0}
    truth = Truth([1.0], [1.0], zeros, zeros, squares, changes, zeros)
    right = {"a": 1.2e-2, "b": 1e-6}
    own = {"a": 1e-2, "b": 1e-9}
    noise = NOISE | {"gradients": own, "updates": own}
    row = {"gradients": right, "updates": right}
    assert beside_noise(row, noise, truth)["ratio_name"] == "a"
    assert beside_noise(row | {"gradients": {"a": 1e-2, "b": 1e-2}}, noise, truth)["ratio"] > 2
    assert beside_noise(row, noise, truth)["update_ratio"] == pytest.approx(1)
    never = row | {"updates": {"a": 1.2e-2, "b": 1.0}}
    assert beside_noise(never, noise, truth)["update_ratio_name"] == "b"
    assert beside_noise(never, noise, truth)["update_ratio"] > 80
    # NaN second, in the row and in the noise.
    for gradients, its in (((1.0, math.nan), (1.0, 1.0)), ((1.0, 1.0), (1.0, math.nan))):
        row, its = dict(zip("ab", gradients, strict=True)), dict(zip("ab", its, strict=True))
        found = beside_noise(
            {"gradients": row, "updates": row}, noise | {"gradients": its, "updates": its}, truth
        )
        assert math.isnan(found["ratio"]) and math.isnan(found["update_ratio"])


def test_nothing_that_did_not_run_is_fine() -> None:
    fine, failed = Outcome("a", row=GOOD), Outcome("b", failure="rank 1: ValueError: no")
    skipped = Outcome("c", not_run="needs 8 processes")
    assert exit_code([fine]) == 0
    assert exit_code([fine, skipped]) == 0
    assert exit_code([fine, failed]) == 1
    assert exit_code([skipped]) == 1
    assert summary([fine, failed, skipped]) == "1 of 3 layouts fine, 1 NOT fine, 1 not run"
    table = markdown([fine, failed, skipped], command="certify")
    assert "rank 1: ValueError: no" in table
    assert "needs 8 processes" in table
    assert [row["ok"] for row in skipped.figures()] == [None]


class Launches:
    """Stands for the ranks: runs entries until one that fails, and remembers the calls."""

    def __init__(self, bad: dict[str, str | int]):
        self.bad, self.calls = bad, []

    def __call__(self, argv: list[str], *, processes: int, device: str, timeout_s: float) -> int:
        request = Request.read(Path(argv[-1]))
        self.calls.append((processes, [entry.name for entry in request.entries]))
        assert {entry.ranks for entry in request.entries} == {processes}
        journal = drive.Journal(request.folder)
        for entry in request.entries:
            why = self.bad.get(entry.name)
            if why == "before it begins":
                return 1
            journal.begin(entry)
            if isinstance(why, int):
                return why
            if why is not None:
                drive.note_error(request.folder, rank=2, text=why)
                return 1
            journal.end(entry, GOOD)
        return 0


def drive_with(
    bad: dict[str, str | int], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Launches, dict[str, Outcome]]:
    launches = Launches(bad)
    monkeypatch.setattr(drive, "launch_self", launches)
    entries = (Entry("a", 2), Entry("b", 4), Entry("c", 2), Entry("d", 2), Entry("e", 4))
    request = Request(set="cpu", entries=entries, steps=3, folder=folder)
    found = drive.certify(request, device="cpu", progress=lambda text: None)
    return launches, {entry.name: outcome for entry, outcome in found.items()}


def test_what_came_out_is_told_layout_by_layout() -> None:
    layer = "decoder.layers.0.mlp.linear_fc1.weight"
    assert brief(Outcome("a", row=GOOD)) == f"a: fine, gradient 1.0e-07, worst {layer}, 1.0 s"
    off = GOOD | {"norm_error": 1e-3}
    assert brief(Outcome("a", row=off)).startswith("a: RED, gradient 1.0e-07")
    worst_of = "tower.encoder.layers.1.layer_norm2.bias (1.4 x)"
    told = f"b: fine, gradient 1.30e-02 (1.08 x noise), worst {worst_of}, 1.0 s"
    assert brief(Outcome("b", row=ROUNDED)) == told


def test_a_layout_that_raises_is_red_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches, found = drive_with({"c": "ValueError: no", "e": EXIT_HANG}, tmp_path, monkeypatch)
    assert launches.calls == [(2, ["a", "c", "d"]), (2, ["d"]), (4, ["b", "e"])]
    verdicts = {name: outcome.verdict for name, outcome in sorted(found.items())}
    assert verdicts == {"a": "fine", "b": "fine", "c": "red", "d": "fine", "e": "red"}
    assert found["c"].failure == "rank 2: ValueError: no"
    assert "hangs" in str(found["e"].failure)


def test_a_launch_that_cannot_start_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches, found = drive_with({"a": "before it begins"}, tmp_path, monkeypatch)
    assert launches.calls == [(2, ["a", "c", "d"]), (4, ["b", "e"])]
    assert [found[name].verdict for name in "abcde"] == ["red", "fine", "red", "red", "fine"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--layouts", "gpu"], "needs 2 GPUs"),
        (["--layouts", "gpu", "--ranks-per-gpu", "4"], "no GPU to share"),
        (["--layouts", "cpu", "--ranks-per-gpu", "4"], "no GPU to share"),
        (["--layouts", "tpu"], "needs RUN.yaml"),
        ([], "needs RUN.yaml"),
        (["--layouts", "cpu", "--only", "no such layout"], "fits none of"),
        (["--layouts", "cpu", "--only", "("], "no regular expression"),
        (["--layouts", "cpu", "--processes", "3"], "No layout runs on 3 processes"),
        (["run.yaml", "--layouts", "cpu"], "has a model of its own"),
        (["run.yaml", "--faults"], "--layouts cpu or gpu"),
        (["--layouts", "gpu", "--faults", "--only", "TP2"], "needs 2 GPUs"),
        (["run.yaml", "--layouts", "none.yaml"], "no such file"),
        (["run.yaml", "--layouts", "/"], "cannot be read"),
        (["--layouts", "cpu", "--output", "/dev/null/table"], "cannot be written"),
        (["run.yaml"], "run.yaml"),
    ],
)
def test_wrong_settings_end_with_2(arguments: list[str], words: str) -> None:
    code, output = run_cli(*arguments)
    assert (code, words in output) == (2, True), output


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"LOCAL_WORLD_SIZE": "2"}, "spans several machines"),
        ({"LOCAL_WORLD_SIZE": "4"}, "Hide them"),
    ],
)
def test_a_launcher_that_cannot_be_joined_ends_with_2(
    environment: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ghostvis_mega.utils.hardware.has_cuda_device", lambda: True)
    for name, value in ({"RANK": "0", "WORLD_SIZE": "4"} | environment).items():
        monkeypatch.setenv(name, value)
    code, output = run_cli("--layouts", "cpu")
    assert (code, words in output) == (2, True), output


@pytest.mark.parametrize("field", ["checkpoint.weights", "checkpoint.resume"])
def test_what_a_run_begins_with_is_not_read_and_that_is_said(
    field: str, easy_vqa: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run.yaml"
    run.write_text(RUN.format(data=easy_vqa, folder=tmp_path))
    override = f"{field}={tmp_path / 'nothing-is-there'}"
    entry = Entry("a", 1)
    plain = Request(set="own", entries=(entry,), steps=3, folder=tmp_path, config=run)
    given = replace(plain, overrides=(override,))
    assert load_own(checked(given), entry) == load_own(checked(plain), entry)
    assert not_read(plain) == []
    (sentence,) = not_read(given)
    assert override in sentence and "random weights" in sentence


def test_nor_is_what_of_it_would_be_read(easy_vqa: Path, tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text(RUN.format(data=easy_vqa, folder=tmp_path))
    entry, given = Entry("a", 1), (f"checkpoint.weights={tmp_path}", "checkpoint.weights_of=[llm]")
    plain = Request(set="own", entries=(entry,), steps=3, folder=tmp_path, config=run)
    own = load_own(checked(replace(plain, overrides=given)), entry)
    assert own == load_own(checked(plain), entry)


def test_a_run_of_ones_own_has_the_time_that_it_says(easy_vqa: Path, tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text(RUN.format(data=easy_vqa, folder=tmp_path))
    entries = (Entry("a", 1),)
    own = Request(set="own", entries=entries, steps=3, folder=tmp_path, config=run)
    assert drive.patience_s(own) == 600
    for given, patience in ((5000, 5000), (10, drive.HANG_S)):
        changed = replace(own, overrides=(f"train.timeout_s={given}",))
        assert drive.patience_s(changed) == patience
        assert drive.limit_s(changed) > (changed.steps + 1) * patience
    shipped = Request(set="cpu", entries=entries, steps=3, folder=tmp_path)
    assert drive.limit_s(replace(shipped, steps=300)) > 10 * drive.limit_s(shipped)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("layouts: []", "must hold one key"),
        ("layouts: [{name: a, override: []}]", "unknown key override"),
        ("layouts: [{name: a, overrides: parallel.tensor=2}]", "no list of section.key=value"),
        ("layouts: [{name: a, ranks: 0}]", "no number of processes"),
        ("layouts: [{name: a}, {name: a}]", "two layouts have the name"),
        ("layouts: [", "not valid YAML"),
        (
            "layouts: [{name: a}, {name: b, overrides: [parallel.tensor=3]}]",
            "layout 'b': parallel.tensor=3 does not divide",
        ),
    ],
)
def test_wrong_layout_files_end_with_2(
    given: str, words: str, easy_vqa: Path, tmp_path: Path
) -> None:
    run, layouts = tmp_path / "run.yaml", tmp_path / "layouts.yaml"
    run.write_text(RUN.format(data=easy_vqa, folder=tmp_path))
    layouts.write_text(given)
    code, output = run_cli(str(run), "--layouts", str(layouts))
    assert (code, words in output) == (2, True), output


def test_gpu_set_is_what_the_documents_say() -> None:
    names = [layout.name for layout in GPU_LAYOUTS]
    assert len(set(names)) == len(names)
    assert sum(layout.ranks == 2 for layout in GPU_LAYOUTS) >= 12
    assert sum(layout.ranks == 4 for layout in GPU_LAYOUTS) >= 8


def test_gpu_set_is_allowed_on_gpus(tmp_path: Path) -> None:
    from ghostvis_mega.perf.certify.breaking import BREAKS
    from ghostvis_mega.perf.certify.problem import run_of

    assert all(fault.name in BREAKS for fault in GPU_FAULTS)
    for layout in (*GPU_LAYOUTS, *(fault.layout for fault in GPU_FAULTS)):
        run = run_of(layout, tmp_path)
        found = rules.find_problems(run, world_size=layout.ranks, device="cuda")
        found += deepspeed.find_problems(run, world_size=layout.ranks)
        assert found == [], layout.name


@pytest.mark.parametrize("file", ["two_processes.yaml", "four_processes.yaml"])
def test_shipped_layouts_are_allowed_for_the_demo(
    file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    tiny = "examples/configs/vlm_tiny_easyvqa.yaml"
    for entry in own_entries(Path("examples/certify") / file, ranks=1):
        loaded = read_run_config(tiny, entry.overrides)
        assert loaded.config is not None and loaded.problems == []
        assert entry.ranks == {"two": 2, "four": 4}[file.split("_")[0]]
        assert rules.find_problems(loaded.config, world_size=entry.ranks, device="cpu") == []
        assert deepspeed.find_problems(loaded.config, world_size=entry.ranks) == []


@pytest.mark.timeout(300)
@pytest.mark.world_size(2)
def test_a_run_of_ones_own(easy_vqa: Path, tmp_path: Path) -> None:
    """Own model, own data, shipped layouts; one layout that needs more processes than there are."""
    given = yaml.safe_load((ROOT / "examples/certify/two_processes.yaml").read_text())
    given["layouts"].append({"name": "DP3", "ranks": 3})
    run, layouts = tmp_path / "run.yaml", tmp_path / "layouts.yaml"
    run.write_text(RUN.format(data=easy_vqa, folder=tmp_path))
    layouts.write_text(yaml.safe_dump(given))
    only = "DP2, ZeRO-2|TP2 without|CP2|DP3"
    done = subprocess.run(
        [sys.executable, "-m", "ghostvis_mega", "certify", str(run), "data.augment=false"]
        + ["--layouts", str(layouts), "--processes", "2", "--only", only, "--json"]
        + ["--output", str(tmp_path / "kept")],
        cwd=ROOT,
        env=os.environ | device_environment("cpu"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    assert all(row.keys() == {"name", "value", "unit", "bar", "ok"} for row in rows)
    held = [row for row in rows if row["bar"] is not None]
    assert len(held) == 3 * 5
    assert all(row["ok"] and 0 <= row["value"] <= row["bar"] for row in held)
    assert any(row["value"] > 0 for row in held), "compared with itself"
    assert [row["ok"] for row in rows if re.search("^DP3: not run", row["name"])] == [None]
    kept = (tmp_path / "kept" / "table.md").read_text()
    assert "3 of 4 layouts fine, 1 not run" in kept
    told = re.findall("^certify: (.*): fine, gradient", done.stderr, re.MULTILINE)
    assert len(told) == 3, "each layout's verdict is told when it is known"
    assert not (tmp_path / "run").exists(), "a certificate writes nothing where the run would"
