"""The fused loss with a vocabulary of 152,064 cut over tensor ranks, with and without sequence
parallelism."""

from pathlib import Path
from typing import Any

import pytest

from tests.launch import launch

pytestmark = [pytest.mark.world_size(4), pytest.mark.timeout(300)]

BAR = 1e-6
LAYOUTS = ["TP1", "TP2", "TP2(SP)", "TP4", "TP4(SP)"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    worker = Path(__file__).with_name("loss_worker.py")
    return launch(worker, ranks=4, timeout_s=240, folder=tmp_path_factory.mktemp("loss"))


@pytest.mark.parametrize("rows", [16, 20, 1000])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradients_are_exact(measured: dict[str, Any], layout: str, rows: int) -> None:
    assert max(measured[f"{layout}, {rows} rows"]) <= BAR
    # The path that it replaces is measured by the same code.
    assert max(measured[f"{layout}, unfused"]) <= 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensor_ranks_meet_once_a_chunk(measured: dict[str, Any], layout: str) -> None:
    assert measured[f"{layout}, calls"] == 3


@pytest.mark.parametrize("layout", ["TP4", "TP4(SP)"])
@pytest.mark.parametrize(
    "name", ["statistics of one rank", "last chunk dropped", "padding not masked"]
)
def test_a_broken_loss_would_be_seen(measured: dict[str, Any], layout: str, name: str) -> None:
    assert max(measured[f"{layout}, nothing broken"]) <= BAR
    assert min(measured[f"{layout}, {name}"]) > 5e-2
