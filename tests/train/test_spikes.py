"""Clean losses raise no alarm, spikes do, and nothing spoils the statistics."""

import math
import random
from collections.abc import Callable, Iterator

import pytest

from ghostvis_mega.config.schema import GuardsConfig
from ghostvis_mega.train.spikes import SpikeDetector

pytestmark = pytest.mark.durability

STEPS = 10_000
WINDOW = GuardsConfig().spike_window
SIGMA = GuardsConfig().spike_sigma


def steady(draw: random.Random) -> Iterator[float]:
    return (2.0 + 0.1 * draw.gauss(0, 1) for _ in range(STEPS))


def falling(draw: random.Random) -> Iterator[float]:
    return (12 * (step + 1) ** -0.3 + 0.05 * draw.gauss(0, 1) for step in range(STEPS))


def skewed(draw: random.Random) -> Iterator[float]:
    return (1.5 * math.exp(0.15 * draw.gauss(0, 1)) for _ in range(STEPS))


def wandering(draw: random.Random) -> Iterator[float]:
    level = 0.0
    for _ in range(STEPS):
        level = 0.98 * level + 0.02 * draw.gauss(0, 1)
        yield 2.0 + level + 0.05 * draw.gauss(0, 1)


def two_kinds(draw: random.Random) -> Iterator[float]:
    """Every fifth batch is of harder data."""
    for _ in range(STEPS):
        hard = draw.random() < 0.2
        yield (2.3 + 0.15 * draw.gauss(0, 1)) if hard else (2.0 + 0.1 * draw.gauss(0, 1))


STREAMS = {
    steady: 0.1,
    falling: 0.05,
    skewed: 0.23,
    wandering: None,
    two_kinds: 0.17,
}
"""Standard deviation of what scatters; None where it is not one number."""


def alarms(losses: Iterator[float], *, sigma: float = SIGMA) -> int:
    detector, found = SpikeDetector(window=WINDOW, sigma=sigma), 0
    for loss in losses:
        if detector.is_spike(loss):
            found += 1
        else:
            detector.take(loss)
    return found


@pytest.mark.parametrize("stream", STREAMS, ids=lambda stream: stream.__name__)
def test_at_most_one_false_alarm_in_ten_thousand_steps(stream: Callable) -> None:
    assert alarms(stream(random.Random(5))) <= 1


def test_a_threshold_too_low_would_be_seen() -> None:
    assert alarms(steady(random.Random(5)), sigma=2.5) > 10


@pytest.mark.parametrize("stream", [s for s, sd in STREAMS.items() if sd], ids=lambda s: s.__name__)
def test_ten_sigma_are_always_a_spike(stream: Callable) -> None:
    detector = SpikeDetector(window=WINDOW, sigma=SIGMA)
    clean = stream(random.Random(6))
    level = {falling: lambda step: 12 * (step + 1) ** -0.3, skewed: lambda step: 1.52}
    tried = 0
    for step, loss in enumerate(clean):
        # While the curve still falls steeply its slope counts as scatter.
        if step >= 2000 and step % 20 == 0:
            centre = level.get(stream, lambda step: 2.05)(step)
            assert detector.is_spike(centre + 10 * STREAMS[stream]), step
            tried += 1
        detector.take(loss)
    assert tried == 400


def test_a_run_of_spikes_does_not_become_the_rule() -> None:
    draw = random.Random(1)
    detector = SpikeDetector(window=64, sigma=SIGMA)
    for _ in range(64):
        detector.take(2 + 0.1 * draw.gauss(0, 1))
    assert not detector.is_spike(2.1)
    for _ in range(5):
        assert detector.is_spike(4.0)
        detector.take(4.0)
    assert detector.is_spike(4.0)


def test_too_few_losses_judge_nothing_and_no_number_never_enters() -> None:
    detector = SpikeDetector(window=64, sigma=SIGMA)
    for _ in range(15):
        detector.take(1.0)
    assert not detector.is_spike(1e9)
    detector.take(1.0)
    assert detector.is_spike(1e9)
    for bad in (math.nan, math.inf):
        with pytest.raises(AssertionError):
            detector.take(bad)


def test_what_is_remembered_can_be_handed_on() -> None:
    draw = random.Random(2)
    one, other = (SpikeDetector(window=64, sigma=SIGMA) for _ in range(2))
    for _ in range(100):
        one.take(draw.random())
    other.restore(one.losses)
    assert other.losses == one.losses and len(one.losses) == 64
    assert other.score(3.0) == one.score(3.0) != 0.0
    one.forget()
    assert one.score(3.0) == 0.0
