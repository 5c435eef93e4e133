"""With the switch equal runs have equal bits; one disturbed bit is seen."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ghostvis_mega.perf.determinism import Bits, compare_bits
from ghostvis_mega.utils.determinism import VARIABLES, environment_problems
from tests.launch import ROOT, launch


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("determinism")
    worker = Path(__file__).with_name("determinism_worker.py")
    return launch(worker, ranks=2, timeout_s=150, folder=folder)


def verdicts(first: Bits, second: Bits) -> dict[str, bool]:
    rows = compare_bits(first, second, first)
    return {row["name"]: row["ok"] for row in rows if row["ok"] is not None}


@pytest.mark.world_size(2)
def test_equal_runs_have_equal_bits(runs: dict[str, Any]) -> None:
    assert len(set(runs["first"]["losses"])) == len(runs["first"]["losses"]) == 4
    assert set(verdicts(runs["first"], runs["second"]).values()) == {True}


@pytest.mark.world_size(2)
def test_noise_in_the_last_bits_is_seen_everywhere(runs: dict[str, Any]) -> None:
    found = verdicts(runs["first"], runs["noisy"])
    assert len(found) == 3
    assert set(found.values()) == {False}
    # It is noise in the last bits: nobody would see it in the loss as it is printed.
    first, noisy = (float.fromhex(runs[name]["losses"][0]) for name in ("first", "noisy"))
    assert noisy == pytest.approx(first, rel=1e-4)


@pytest.mark.world_size(2)
def test_the_switch_refuses_what_cannot_be_reproduced(runs: dict[str, Any]) -> None:
    before, after = runs["unreproducible"]
    assert before == "allowed"
    assert "does not have a deterministic implementation" in after


@pytest.mark.world_size(2)
def test_the_switch_says_what_it_set(runs: dict[str, Any]) -> None:
    told = runs["settings"]
    assert told["deterministic_algorithms"] == "True"
    assert told["cpu_threads"] == "1"
    assert {name: told[name] for name in VARIABLES} == VARIABLES


def make_bits(**changes: Any) -> Bits:
    values = {"losses": ["0x1.8p+1"], "norms": ["0x1.0p+0"], "state": "a" * 64, "step_s": 0.5}
    return Bits(**(values | changes))


@pytest.mark.parametrize(
    "changes",
    [{"losses": ["0x1.8000000000001p+1"]}, {"norms": ["0x1.0000000000001p+0"]}, {"state": "b"}],
)
def test_one_different_bit_is_red(changes: dict[str, Any]) -> None:
    assert list(verdicts(make_bits(), make_bits()).values()) == [True] * 3
    assert list(verdicts(make_bits(), make_bits(**changes)).values()).count(False) == 1


def test_the_cost_is_told() -> None:
    rows = compare_bits(make_bits(), make_bits(step_s=0.6), make_bits(step_s=0.4))
    assert rows[-1]["name"] == "cost of the switch"
    assert rows[-1]["value"] == pytest.approx(25.0)


@pytest.mark.parametrize(
    ("environment", "word"),
    [
        ({"CUBLAS_WORKSPACE_CONFIG": ":0:0"}, "CUBLAS_WORKSPACE_CONFIG=:0:0"),
        ({"NVTE_ALLOW_NONDETERMINISTIC_ALGO": "1"}, "NVTE_ALLOW_NONDETERMINISTIC_ALGO=1"),
        *(
            ({"NCCL_ALGO": value}, f"NCCL_ALGO={value}")
            for value in (
                "NVLS,Ring",
                "^Ring",
                "^Tree",
                "^NVLS",
                "^nvls,NVLSTree,CollNetDirect",
                "^NVLS,NVLSTree,CollNetDirect,CollNetChain,Other",
                "CollnetDirect",
                "allreduce:Ring",
                "Ring;allreduce:NVLS",
                "Rings",
                "^",
                "",
            )
        ),
    ],
)
def test_an_environment_that_contradicts_is_refused(environment: dict[str, str], word: str) -> None:
    (problem,) = environment_problems(environment)
    assert word in problem
    assert environment_problems(VARIABLES) == environment_problems({}) == []


@pytest.mark.parametrize(
    "value",
    ["Ring", "tree", "Tree,Ring,PAT", "^nvls,nvlstree,collnetdirect,CollnetChain,Tree"],
)
def test_algorithms_that_rule_out_sums_in_switches_are_allowed(value: str) -> None:
    assert environment_problems({"NCCL_ALGO": value}) == []


@pytest.mark.slow
@pytest.mark.parametrize(("options", "code"), [([], 0), (["--fault", "noise"], 1)])
def test_the_command(easy_vqa: Path, options: list[str], code: int) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "ghostvis_mega", "bench", "determinism", "--json"),
            *("--steps", "3", "examples/configs/vlm_tiny_easyvqa.yaml", *options),
            *(f"data.train={easy_vqa}/train.gvd", f"data.heldout={easy_vqa}/test.gvd"),
            *("batch.global_size=2", "data.seq_length=128"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stderr[-3000:]
    oks = [row["ok"] for row in json.loads(done.stdout) if row["ok"] is not None]
    assert oks == [code == 0] * 3
