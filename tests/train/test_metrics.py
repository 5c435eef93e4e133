"""Rates of a step, the running mean, the time left, and the formats they are shown in."""

import json
import math

import pytest

from ghostvis_mega.train.metrics import Eta, Smoother, StepMetrics
from ghostvis_mega.utils.format import duration, percent, si
from ghostvis_mega.utils.hardware import cpu_name, device_peak
from tests.train.samples import make_step


def test_rates() -> None:
    m = make_step(tokens=6000, images=50, seconds=2.0)
    assert m.tokens_per_s == 3000
    assert m.images_per_s == 25


def test_other_is_what_no_phase_claims_and_never_negative() -> None:
    assert make_step(seconds=1.0, timing={"data": 0.25, "llm": 0.5}).other_s == pytest.approx(0.25)
    assert make_step(seconds=1.0, timing={"llm": 1.01}).other_s == 0.0


def test_mfu_counts_both_parts_over_all_devices() -> None:
    m = make_step(seconds=2.0, flops_llm=6e14, flops_vision=2e14)
    # 8e14 FLOP in 2 s are 4e14 FLOP/s; two devices of 1e15 can do 2e15.
    assert m.mfu(num_devices=2, peak_flops=1e15) == pytest.approx(0.2)
    assert m.mfu(num_devices=2, peak_flops=None) is None


def test_json_round_trip_and_strictness() -> None:
    m = make_step(loss=math.nan, grad_norm=math.inf, skipped=True)
    line = m.to_json({"mfu": math.nan, "tokens_per_s": 10.0})

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    row = json.loads(line, parse_constant=refuse)
    assert row["loss"] is None
    assert row["grad_norm"] is None
    assert row["mfu"] is None
    back = StepMetrics.from_json(line)
    assert math.isnan(back.loss)
    assert back.skipped
    assert back.lr == m.lr
    plain = make_step()
    assert StepMetrics.from_json(plain.to_json()) == plain


def test_lines_from_before_the_dispatch_was_told_are_read() -> None:
    row = json.loads(make_step().to_json())
    del row["dispatch"]
    assert StepMetrics.from_json(json.dumps(row)) == make_step(dispatch={})
    del row["flops_llm"]
    with pytest.raises(ValueError, match="no key 'flops_llm'"):
        StepMetrics.from_json(json.dumps(row))


@pytest.mark.parametrize("line", ["{}", "[1]", '{"step": 1', "3"])
def test_a_line_that_is_no_step_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match=r"no key|not a JSON object|delimiter"):
        StepMetrics.from_json(line)


def test_smoother_is_unbiased_and_ignores_what_is_not_finite() -> None:
    smoother = Smoother(decay=0.9)
    assert math.isnan(smoother.update(math.nan))
    assert smoother.update(4.0) == pytest.approx(4.0)
    assert smoother.update(math.inf) == pytest.approx(4.0)
    # Weights 0.9 and 1 for the older and the newer value.
    assert smoother.update(2.0) == pytest.approx((0.9 * 4 + 2) / 1.9)


def test_eta_leaves_out_the_first_step_and_outliers() -> None:
    eta = Eta()
    assert math.isnan(eta.seconds_left(5))
    eta.update(60.0)
    assert eta.seconds_left(5) == pytest.approx(300.0)
    eta.update(1.0)
    assert eta.seconds_left(5) == pytest.approx(5.0)
    for _ in range(8):
        eta.update(1.0)
    eta.update(500.0)
    assert eta.seconds_left(5) == pytest.approx(5.0)
    assert eta.seconds_left(0) == 0.0


def test_eta_follows_a_lasting_change() -> None:
    eta = Eta(window=4)
    for seconds in (1, 1, 1, 1, 3, 3, 3, 3):
        eta.update(float(seconds))
    assert eta.seconds_left(1) == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (7, "7"),
        (0.5, "0.50"),
        (950, "950"),
        (999.6, "1.00k"),
        (16_000, "16.0k"),
        (12_345, "12.3k"),
        (99_960, "100k"),
        (1_543_000, "1.54M"),
        (7.62e9, "7.62G"),
        (-2500, "-2.50k"),
        (math.nan, "nan"),
    ],
)
def test_si(value: float, text: str) -> None:
    assert si(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.0123, "12 ms"),
        (42, "42.0s"),
        (59.97, "1m00s"),
        (187, "3m07s"),
        (7500, "2h05m"),
        (273_600, "3d04h"),
        (math.nan, "-"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_percent() -> None:
    assert percent(0.4123) == "41.2 %"
    assert percent(0.4123, 0) == "41 %"


@pytest.mark.parametrize(
    ("name", "bf16", "fp8"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12, 1979e12),
        ("NVIDIA H100 PCIe", 756e12, 1513e12),
        ("NVIDIA H100 NVL", 835e12, 1671e12),
        ("NVIDIA H200", 989e12, 1979e12),
        ("NVIDIA GH200 480GB", 989e12, 1979e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, None),
        ("NVIDIA A100 80GB PCIe", 312e12, None),
        ("NVIDIA B200", 2250e12, 4500e12),
        ("NVIDIA GB200", 2500e12, 5000e12),
        ("NVIDIA L40S", 362e12, 733e12),
        ("NVIDIA L4", 121e12, 242e12),
    ],
)
def test_peaks(name: str, bf16: float, fp8: float | None) -> None:
    peak = device_peak(name)
    assert peak is not None
    assert (peak.bf16, peak.fp8) == (bf16, fp8)


@pytest.mark.parametrize(
    "name", ["AMD EPYC", "NVIDIA L40", "Tesla V100-SXM2-16GB", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"]
)
def test_no_peak_is_invented(name: str) -> None:
    assert device_peak(name) is None


def test_cpu_has_a_name() -> None:
    assert cpu_name().strip()
