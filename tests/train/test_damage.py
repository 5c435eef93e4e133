"""What one rank cannot read counts on no rank."""

from pathlib import Path
from typing import Any

import pytest

from tests.launch import launch

pytestmark = pytest.mark.durability

SOUND = [0.0, 1.0, 1.0, 0.0]
MUTE = [0.0, 0.0, 0.0, 0.0]
TAIL = [0.0, 0.0]


@pytest.fixture(scope="module")
def agreed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of each case: trained tokens and weights on both ranks."""
    worker = Path(__file__).with_name("damage_worker.py")
    return launch(worker, ranks=2, timeout_s=120, folder=tmp_path_factory.mktemp("damage"))


@pytest.mark.parametrize(
    ("case", "trained", "first", "second"),
    [
        ("nothing", 10, [SOUND, SOUND, SOUND], [SOUND, SOUND]),
        ("a sample", 8, [SOUND, SOUND, MUTE], [SOUND, SOUND]),
        ("a picture", 6, [SOUND, MUTE, SOUND], [SOUND, MUTE]),
        ("everything", 1, [MUTE, MUTE, MUTE], [MUTE, MUTE]),
    ],
)
def test_ranks_leave_out_the_same_samples(
    agreed: dict[str, Any], case: str, trained: int, first: list, second: list
) -> None:
    weights = [[sum(part, []) + TAIL] for part in (first, second)]
    assert agreed[case][0] == agreed[case][1] == [trained, *weights]
