"""`python -m ghostvis_mega check`: one report, exit code 2, within seconds and without torch."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ghostvis_mega.train.preflight import check_run, load_checked
from ghostvis_mega.utils.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def run_check(*arguments: str | Path) -> tuple[subprocess.CompletedProcess[str], float]:
    """Run the command in a process of its own that cannot import torch."""
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['deepspeed'] = None; "
        "from ghostvis_mega.cli.main import main; main()"
    )
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, "check", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done, time.monotonic() - start


def test_a_wrong_run_gives_one_report_and_exit_code_2(run_file):
    wrong = [
        "data.packng=true",
        "train.steps=0",
        "parallel.tensor=4",
        "model.vision.image_size=6",
        "deepspeed.llm=ds_configs/zero3.json",
        "data.train=datasets/nowhere.gvd",
    ]
    done, seconds = run_check(run_file, *wrong, "--world-size", "8")
    assert done.returncode == 2, done.stderr
    assert seconds < 5
    expected = [
        "Did you mean data.packing?",
        "train.steps=0",
        "does not divide model.llm.num_kv_heads=2",
        "model.vision.image_size=6",
        "hangs for the vision engine",
        "data.train: datasets/nowhere.gvd is not a directory",
    ]
    for text in expected:
        assert text in done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""


def test_a_right_run_shows_its_plan(run_file):
    done, seconds = run_check(run_file, "parallel.pipeline=2", "--world-size", "4")
    assert done.returncode == 0, done.stderr
    assert seconds < 5
    assert "4 processes = TP 1 x PP 2 x DP 2" in done.stdout
    assert "8 micro-batches of 1" in done.stdout
    assert "ZeRO, llm engine" in done.stdout


def test_the_plan_shows_uneven_stages(run_file):
    uneven = (
        "parallel.pipeline=4",
        "model.llm.num_layers=8",
        "parallel.first_stage_layers=1",
        "parallel.last_stage_layers=1",
    )
    done, _ = run_check(run_file, *uneven, "--world-size", "4")
    assert "1 + 3 + 3 + 1 on the stages" in done.stdout, done.stderr
    done, _ = run_check(run_file, *uneven, "--world-size", "4", "--json")
    assert json.loads(done.stdout)["layout"]["layers_per_stage"] == [1, 3, 3, 1]


def test_the_plan_as_json(run_file):
    done, _ = run_check(run_file, "train.freeze=[vision]", "--json", "--world-size", "2")
    plan = json.loads(done.stdout)
    assert plan["ok"] and plan["layout"]["data"] == 2
    assert plan["batch"]["micro_batches"] == 8
    assert plan["trained"] == ["llm", "projector"]
    assert plan["zero_stages"] == {"llm": 1, "vision": 1}
    done, _ = run_check(run_file, "train.freeze=[vison]", "--json")
    answer = json.loads(done.stdout)
    assert done.returncode == 2 and not answer["ok"] and len(answer["problems"]) == 1


def test_the_plan_tells_the_memory_of_a_gpu(run_file, tmp_path):
    (tmp_path / "zero2.json").write_text('{"zero_optimization": {"stage": 2}}')
    on_gpu = (
        "train.precision=bf16",
        f"deepspeed.llm={tmp_path / 'zero2.json'}",
        "train.recompute=auto",
        "train.device=cuda",
        "model.vision.image_size=32",
    )
    done, _ = run_check(run_file, *on_gpu)
    assert done.returncode == 0, done.stderr
    assert "train.recompute: the first of these that fits, with " in done.stdout
    done, _ = run_check(run_file, *on_gpu, "--json")
    memory = json.loads(done.stdout)["gpu_memory"]
    totals = [memory["bytes"][mode]["total"] for mode in ("none", "selective", "full")]
    assert memory["pictures"] > 0 and sorted(totals, reverse=True) == totals
    done, _ = run_check(run_file, *on_gpu, "train.recompute=selective")
    assert " = weights " in done.stdout and "train.recompute: selective" in done.stdout
    done, _ = run_check(run_file, "--json")
    assert json.loads(done.stdout)["gpu_memory"] is None, "nobody knows it in fp32"


def test_memory_that_nobody_knows_chooses_nothing(run_file):
    wrong = ("train.recompute=auto", "train.device=cuda", "data.packing=false")
    done, _ = run_check(run_file, *wrong)
    assert done.returncode == 2
    assert "there is no prediction for train.precision=fp32. Set none, selective" in done.stderr
    done, _ = run_check(run_file, "train.recompute=auto", "--device", "cpu")
    assert done.returncode == 0, done.stderr


def test_the_module_is_the_command(run_file):
    command = [sys.executable, "-m", "ghostvis_mega", "check", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "Examples:" in done.stdout


@pytest.mark.parametrize(
    ("data", "setting", "field", "fix"),
    [
        ({"vocab_size": 4000}, "", "model.llm.vocab_size=512", "Use at least 4000"),
        ({"samples": 8}, "", "batch.global_size=16", "Use at most 8"),
        ({"trained_tokens": 0}, "", "no trained token", "Ingest it"),
        ({"images": 0}, "train.freeze=[llm]", "holds no image", "do not freeze llm"),
        ({}, "model.preset=qwen25_small", "holds 4 images", "vlm_"),
        ({"specials": ("pad", "im_start", "im_end")}, "", "tokenizer.specials.image", "must be"),
        ({"tokenizer": b"other"}, "", "tokenised with another tokenizer", "Ingest it again"),
        ({"template": "plain"}, "", "the chat template chatml", "Ingest both"),
        ({}, "data.tokenizer=README.md", "is not the tokenizer that made", "Remove it"),
        ({}, "data.tokenizer=nowhere.model", "data.tokenizer=nowhere.model is not", "Remove it"),
        ({}, "data.heldout=nowhere.gvd", "data.heldout: nowhere.gvd", "tools.preprocess"),
        ({}, "checkpoint.resume=nowhere", "checkpoint.resume=nowhere", "no manifest.json"),
        ({}, "checkpoint.weights_of=[llm]", "checkpoint.weights_of", "Name the checkpoint"),
        ({}, "checkpoint.weights=nowhere", "checkpoint.weights=nowhere", "no manifest.json"),
        ({}, "log.output=README.md/run", "log.output=README.md/run", "README.md is a file"),
    ],
    ids=lambda v: str(v)[:30],
)
def test_data_and_places_are_checked(run_file, make_dataset, data, setting, field, fix):
    if data:
        make_dataset(run_file.parent / "train.gvd", **data)
    overrides = [setting] if setting else []
    with pytest.raises(ConfigError) as error:
        load_checked(run_file, overrides, world_size=1, device="cpu")
    found = error.value.problems
    assert any(field in text and fix in text for text in found), "\n".join(found)


def test_a_copy_is_not_held_out(run_file, make_dataset):
    make_dataset(run_file.parent / "test.gvd")
    with (run_file.parent / "train.gvd" / "manifest.json").open("rb") as file:
        (run_file.parent / "test.gvd" / "manifest.json").write_bytes(file.read())
    with pytest.raises(ConfigError, match="is a copy of data.train"):
        load_checked(run_file, world_size=1, device="cpu")


def test_a_missing_tracker_is_named_with_its_pip_line(run_file, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install -e '.\[wandb\]'"):
        load_checked(run_file, ["log.wandb=offline"], world_size=1, device="cpu")


def test_a_right_run_passes(run_file):
    run = load_checked(run_file, world_size=2, device="cpu")
    check_run(run, world_size=2, device="cpu")
    with pytest.raises(ConfigError, match="16 is no multiple of 3"):
        check_run(run, world_size=3, device="cpu")


def test_an_offloaded_optimizer_is_shown_with_the_memory_it_takes(run_file):
    arguments = (run_file, "deepspeed.llm=ds_configs/zero2_offload.json", "--world-size", "4")
    done, _ = run_check(*arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("stage 2, optimizer on the host: ") == 2
    plan = json.loads(run_check(*arguments, "train.precision=bf16", "--json")[0].stdout)
    trained = sum(count for name, count in plan["parameters"].items() if name != "llm")
    assert plan["host_bytes"]["vision"] == -(-trained * 18 // 4)
    assert json.loads(run_check(run_file, "--json")[0].stdout)["host_bytes"] == {}


@pytest.mark.parametrize("asked", ["train.fp8=tensorwise", "train.device=cuda"])
def test_a_run_for_gpus_is_checked_as_one_on_any_machine(run_file, asked):
    gpu = ["train.precision=bf16", "deepspeed.llm=ds_configs/zero2.json", asked]
    done, _ = run_check(run_file, *gpu)
    assert done.returncode == 0, done.stderr
    assert ("one scale for a whole tensor" in done.stdout) == ("tensorwise" in asked)
    done, _ = run_check(run_file, *gpu, "--device", "cpu")
    assert done.returncode == 2
    assert "GPU" in done.stderr or "CUDA" in done.stderr
