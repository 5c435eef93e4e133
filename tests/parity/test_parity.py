"""Layouts of four ranks against one plain process; planted faults; skipped steps.

All in one launch.
"""

import re
from pathlib import Path
from typing import Any

import pytest

from ghostvis_mega.config.rules_pipeline import stage_layers
from ghostvis_mega.config.schema import ParallelConfig
from ghostvis_mega.perf.certify.bars import (
    GRADIENT_BAR,
    LOSS_BAR,
    NOISE_FACTOR,
    NORM_BAR,
    STEPS_FACTOR,
    UPDATE_BAR,
    WEIGHT_BAR,
)
from ghostvis_mega.perf.certify.faults import FAULTS, Fault, finding
from ghostvis_mega.perf.certify.layout import Layout
from ghostvis_mega.perf.certify.report import Outcome
from tests.launch import launch
from tests.parity.chosen import KEPT, LAYOUTS, ROUNDED, ROUNDED_FAULTS, SKIPS

# The first test waits for the launch, which has a limit of its own.
pytestmark = [pytest.mark.world_size(4), pytest.mark.timeout(1560)]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Rows of JSON by kind and name."""
    worker = Path(__file__).with_name("worker.py")
    return launch(worker, ranks=4, timeout_s=1500, folder=tmp_path_factory.mktemp("parity"))


def expected_modules(layout: Layout) -> set[str]:
    """Modules that a layout trains."""
    frozen = layout.problem.get("train", {}).get("freeze", [])
    connector = layout.problem.get("model", {}).get("connector", {}).get("kind")
    modules = {"llm", "vision", "projector"} | (
        {"resampler"} if connector == "perceiver_mlp" else set()
    )
    return modules - set(frozen)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_layout_equals_plain_process(measured: dict[str, Any], layout: Layout) -> None:
    row = measured["layouts"][layout.name]
    assert row["gradient_error"] <= GRADIENT_BAR, row["gradient_name"]
    assert row["weight_error"] <= WEIGHT_BAR, row["weight_name"]
    assert row["loss_error"] <= LOSS_BAR
    assert row["norm_error"] <= NORM_BAR
    assert row["update_error"] <= UPDATE_BAR, row["update_name"]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_optimizer_is_where_the_layout_says(measured: dict[str, Any], layout: Layout) -> None:
    modules = expected_modules(layout)
    engines = ({"llm"} & modules) | ({"vision"} if modules - {"llm"} else set())
    offloaded = measured["layouts"][layout.name]["offloaded"]
    assert offloaded == {engine: engine in layout.offload for engine in engines}


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_layers_are_on_the_stages_that_the_layout_says(
    measured: dict[str, Any], layout: Layout
) -> None:
    parallel = ParallelConfig(**layout.split.get("parallel", {}))
    num_layers = layout.problem.get("model", {}).get("llm", {}).get("num_layers", 4)
    expected = stage_layers(parallel, num_layers)
    assert expected is not None
    assert measured["layouts"][layout.name]["layers_per_stage"] == list(expected)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_comparison_has_substance(measured: dict[str, Any], layout: Layout) -> None:
    row = measured["layouts"][layout.name]
    norms = row["truth_norms"]
    assert set(norms) == expected_modules(layout)
    for module, norm in norms.items():
        if layout.kind == "text" and module != "llm":
            assert norm == 0.0
        else:
            assert norm > 1e-3, f"the batch teaches {module} nothing"


@pytest.mark.parametrize("layout", ROUNDED, ids=lambda layout: layout.name)
def test_bf16_is_held_to_the_noise_of_one_process(measured: dict[str, Any], layout: Layout) -> None:
    row = measured["rounded"][layout.name]
    assert 0 < row["joint_error"] <= NOISE_FACTOR * row["noise"]["joint_error"]
    assert row["noise"]["joint_error"] > 100 * GRADIENT_BAR, "the noise is that of fp32"
    assert Outcome(layout.name, row=row).verdict == "fine"


def test_broken_bf16_is_beyond_the_noise(measured: dict[str, Any]) -> None:
    ((name, row),) = measured["rounded, broken"].items()
    assert Outcome(name, row=row).verdict == "red"
    assert re.search(r"norm", row["ratio_name"])
    assert row["ratio"] > 10


@pytest.mark.parametrize("fault", ROUNDED_FAULTS, ids=lambda fault: fault.name)
def test_faults_of_the_gpu_set_are_seen_in_bf16(measured: dict[str, Any], fault: Fault) -> None:
    row = measured["rounded faults"][fault.name]
    found = finding(fault, row)
    assert found.seen and found.value > found.bar, found
    assert Outcome(fault.name, row=row, fault=fault).verdict == "fine"
    assert Outcome(fault.name, row=row).verdict == "red", "so broken a layout passes as fine"
    if fault.updates:
        assert row["ratio"] <= NOISE_FACTOR, "the first gradient shows it as well"
        assert row["update_ratio"] > 3 * STEPS_FACTOR


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_broken_layout_is_seen(measured: dict[str, Any], fault: Fault) -> None:
    row = measured["faults"][fault.name]
    found = finding(fault, row)
    assert found.seen, found
    assert Outcome(fault.name, row=row, fault=fault).verdict == "fine"
    # Shown without the fault's expressions as well: no layout that is broken so passes as fine.
    assert Outcome(fault.name, row=row).verdict == "red"
    if fault.updates:
        over = [figure for figure in Outcome("alone", row=row).figures() if figure["ok"] is False]
        assert [figure["name"].split(",")[0] for figure in over] == ["alone: worst update"]
        return
    # The steps that follow show it as well, also where no first gradient does.
    assert row["weight_error"] > 10 * WEIGHT_BAR
    assert row["norm_error"] > 10 * NORM_BAR


@pytest.mark.parametrize("layout", SKIPS, ids=lambda layout: layout.name)
def test_nan_on_one_rank_skips_the_step_everywhere(
    measured: dict[str, Any], layout: Layout
) -> None:
    row = measured["skips"][layout.name]
    everywhere = {"loss": True, "embeddings": True, "vision gradient": True}
    assert row["skipped"] == everywhere
    assert row["unchanged"] == everywhere
    assert row["finite_loss"]["vision gradient"], "the norm alone must be enough for a skip"
    assert not row["finite_loss"]["embeddings"]


@pytest.mark.parametrize("layout", SKIPS, ids=lambda layout: layout.name)
def test_steps_after_a_skip_equal_a_run_without_it(
    measured: dict[str, Any], layout: Layout
) -> None:
    row = measured["skips"][layout.name]
    assert not row["good_skipped"]
    assert row["loss_error"] <= LOSS_BAR
    assert row["norm_error"] <= NORM_BAR
    assert row["weight_error"] <= WEIGHT_BAR


@pytest.mark.parametrize("name", KEPT)
def test_traces_of_a_skipped_step_would_show(measured: dict[str, Any], name: str) -> None:
    row = measured["kept"][name]
    assert row["good_skipped"] or row["weight_error"] > 10 * WEIGHT_BAR
