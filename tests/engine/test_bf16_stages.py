"""In BF16 every ZeRO stage reduces fp32 gradients exactly; stages 1 and 2 take the same step."""

from pathlib import Path
from typing import Any

import pytest

from tests.launch import launch

pytestmark = [pytest.mark.world_size(2), pytest.mark.timeout(540)]

STAGES = ["stage 1", "stage 2", "stage 3", "stage 1 on the host", "stage 2 on the host"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    worker = Path(__file__).with_name("bf16_stages_worker.py")
    return launch(worker, ranks=2, timeout_s=500, folder=tmp_path_factory.mktemp("bf16"))


@pytest.mark.parametrize("name", STAGES)
def test_reduction_keeps_fp32(measured: dict[str, Any], name: str) -> None:
    assert measured[name]["reduction_error"] <= 1e-6


@pytest.mark.parametrize("name", ["buckets in BF16", "sums in BF16"])
def test_bf16_on_the_way_would_be_seen(measured: dict[str, Any], name: str) -> None:
    assert measured[name]["reduction_error"] > 1e-4


@pytest.mark.parametrize("place", ["", " on the host"])
def test_stages_1_and_2_take_the_same_step(measured: dict[str, Any], place: str) -> None:
    first, second = measured[f"stage 1{place}"], measured[f"stage 2{place}"]
    assert first["losses"] == second["losses"]
    assert first["norms"] == pytest.approx(second["norms"], rel=1e-6)
    assert first["weights"] == second["weights"]


@pytest.mark.parametrize("name", STAGES)
def test_a_closed_engine_is_let_go(measured: dict[str, Any], name: str) -> None:
    assert measured[name]["held"] == 0


@pytest.mark.parametrize("name", STAGES)
def test_all_stages_learn_alike(measured: dict[str, Any], name: str) -> None:
    row = measured[name]
    assert row["losses"][0] == measured["stage 2"]["losses"][0]
    assert row["losses"] == pytest.approx(measured["stage 2"]["losses"], rel=1e-3)
    assert row["losses"][-1] < row["losses"][0]
    assert all(norm > 1e-3 for norm in row["norms"])


def test_gradients_summed_by_the_gemm_are_those_of_autograd(measured: dict[str, Any]) -> None:
    plain, fused = measured["stage 2"], measured["fused"]
    assert fused["calls"] > 50
    assert fused["losses"] == pytest.approx(plain["losses"], rel=2e-3)
    # Autograd rounds each micro-batch's gradient to BF16 before it adds it up; the GEMM does not.
    assert fused["norms"] == pytest.approx(plain["norms"], rel=5e-3)
    assert fused["norms"] != plain["norms"]
    assert fused["reduction_error"] <= 1e-6
    assert measured["fused, stage 1"]["weights"] == fused["weights"]


@pytest.mark.parametrize("stage", [1, 2])
def test_sums_of_the_gemm_go_to_an_optimizer_on_the_host(
    measured: dict[str, Any], stage: int
) -> None:
    """There DeepSpeed's own reduction takes them."""
    row, fused = measured[f"fused, stage {stage} on the host"], measured["fused"]
    assert row["reduction_error"] <= 1e-6
    assert row["losses"] == pytest.approx(fused["losses"], rel=1e-4)
    assert row["norms"] == pytest.approx(fused["norms"], rel=1e-4)
    assert row["norms"] != measured[f"stage {stage} on the host"]["norms"]


def test_the_fused_tower_trains_as_its_modules(measured: dict[str, Any]) -> None:
    plain, fused = measured["stage 2"], measured["fused tower"]
    assert fused["losses"] == pytest.approx(plain["losses"], rel=2e-3)
    assert fused["norms"] == pytest.approx(plain["norms"], rel=5e-3)
    assert fused["norms"] != plain["norms"]
    assert fused["reduction_error"] <= 1e-6


def test_a_gemm_that_adds_nothing_would_be_seen(measured: dict[str, Any]) -> None:
    right, wrong = measured["fused"]["norms"][0], measured["fused, forgetful"]["norms"][0]
    assert abs(right - wrong) > 1e-4 * right
