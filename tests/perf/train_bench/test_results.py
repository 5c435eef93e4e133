"""Figures follow from known steps; a broken comparison is red."""

import dataclasses
from typing import Any

import pytest

from ghostvis_mega.perf.train_bench.progress import summary_lines
from ghostvis_mega.perf.train_bench.results import (
    DATA_WAIT,
    LOSS_LAST,
    MFU,
    MFU_FP8,
    STEP_MAX_S,
    STEP_MIN_S,
    STEP_S,
    TFLOPS,
    TFLOPS_VISION,
    TOKENS,
    RowResult,
    StepRecord,
    failed,
    ratio_figures,
    row_figures,
    row_values,
    settled_bars,
)
from ghostvis_mega.perf.train_bench.rows import Bar, Ratio, Row


def record(seconds: float, *, loss: float = 1.0, tokens: int = 1000, **changes: Any) -> StepRecord:
    values = {
        "trained_tokens": tokens,
        "images": 0,
        "flops_llm": 4e12,
        "flops_vision": 0.0,
        "data_s": 0.1 * seconds,
        "sections": {"llm": 0.5 * seconds},
    }
    return StepRecord(loss=loss, tokens=tokens, seconds=seconds, **(values | changes))


def result(
    *seconds: float, name: str = "a", processes: int = 1, warm_up: int = 1, **changes: Any
) -> RowResult:
    steps = [record(s, loss=9.0 - n, **changes) for n, s in enumerate(seconds)]
    return RowResult(name=name, kind="ours", processes=processes, warm_up=warm_up, steps=steps)


def value(found: RowResult, name: str) -> float:
    return row_values(found)[name][0]


def test_medians_of_known_times() -> None:
    # The warm-up's 100 s count nowhere; the median of 1, 2, 4 is 2 and no mean of them.
    found = result(100.0, 4.0, 1.0, 2.0, processes=2)
    assert (value(found, STEP_S), value(found, STEP_MIN_S), value(found, STEP_MAX_S)) == (2, 1, 4)
    assert value(found, TOKENS) == 1000 / 2.0 / 2
    assert value(found, TFLOPS) == pytest.approx(4 / 2.0 / 2)
    assert value(found, DATA_WAIT) == pytest.approx(10.0)
    assert value(found, "time in llm") == pytest.approx(50.0)
    everything = result(100.0, 4.0, 1.0, 2.0, processes=2, warm_up=0)
    assert value(everything, STEP_S) == 3.0


def test_a_rate_is_the_median_of_each_steps_own() -> None:
    """Batches with pictures differ: 100 tokens in 1 s and 900 in 3 s are 100 and 300 a second."""
    steps = [record(1.0, tokens=100), record(3.0, tokens=900, loss=0.5)]
    found = RowResult(name="a", kind="ours", steps=steps)
    assert value(found, TOKENS) == 200


def test_mfu_is_of_the_devices_own_peak() -> None:
    found = result(9.0, 2.0)
    assert MFU not in row_values(found)
    h100 = dataclasses.replace(found, device="NVIDIA H100 80GB HBM3", on_gpu=True, fp8=True)
    assert value(h100, MFU) == pytest.approx(100 * 2e12 / 989e12)
    assert value(h100, MFU_FP8) == pytest.approx(100 * 2e12 / 1979e12)
    unknown = dataclasses.replace(h100, device="Some GPU")
    assert MFU not in row_values(unknown)


def test_pictures_count_apart() -> None:
    found = result(9.0, 2.0, images=6, flops_vision=2e12)
    assert value(found, TFLOPS) == pytest.approx(3.0)
    assert value(found, TFLOPS_VISION) == pytest.approx(1.0)
    assert value(found, "pictures") == 3.0


def test_efficiency_counts_the_tower_and_is_red_where_it_is_low() -> None:
    """Text: 4 TFLOP in 2 s. With pictures: 4 + 2 TFLOP in 3 s is as efficient, in 4 s is not."""
    text = result(9.0, 2.0, name="text")
    ratio = Ratio("VLM", "text", 0.95)
    for seconds, expected, ok in ((3.0, 1.0, True), (4.0, 0.75, False)):
        vlm = result(9.0, seconds, name="VLM", images=6, flops_vision=2e12)
        by_flops, by_tokens = ratio_figures([text, vlm], [ratio])
        assert by_flops["value"] == pytest.approx(expected)
        assert by_flops["ok"] is ok
        assert by_tokens["value"] == pytest.approx(2.0 / seconds)
        assert by_tokens["ok"] is None


def test_a_ratio_that_cannot_be_had_misses_its_bar() -> None:
    broken = failed(Row("text"), "OutOfMemoryError: CUDA out of memory.")
    vlm = result(9.0, 2.0, name="VLM")
    (figure,) = ratio_figures([broken, vlm], [Ratio("VLM", "text", 0.95)])
    assert figure["value"] is None
    assert figure["ok"] is False
    assert ratio_figures([vlm], [Ratio("VLM", "text", 0.95)]) == []  # --only VLM
    assert row_figures(broken)[0]["ok"] is False
    assert "out of memory" in row_figures(broken)[0]["value"]


def best(*over: str) -> Ratio:
    return Ratio("a | b", " | ".join(over), 1.1, label="ours / peers")


def test_the_best_of_several_is_compared_with_the_best_of_several() -> None:
    found = [result(9.0, s, name=n) for n, s in (("a", 4.0), ("b", 2.0), ("c", 8.0), ("d", 3.0))]
    by_flops, by_tokens, rows = ratio_figures(found, [best("c", "d")])
    assert by_flops["name"] == "ours / peers, model FLOPs"
    assert by_flops["value"] == pytest.approx(1.5) == by_tokens["value"]
    assert (by_flops["ok"], rows["value"]) == (True, "b / d")
    slower = [result(9.0, 2.9, name="d") if r.name == "d" else r for r in found[:1] + found[2:]]
    assert ratio_figures(slower, [best("c", "d")])[0]["ok"] is False


def test_a_promise_over_several_is_judged_where_all_were_asked_for() -> None:
    found = [result(9.0, s, name=n) for n, s in (("a", 2.0), ("c", 8.0))]
    (by_flops, *_) = ratio_figures(found, [best("c", "d")])
    assert (by_flops["value"], by_flops["bar"], by_flops["ok"]) == (pytest.approx(4.0), None, None)
    # One that does not fit has had its chance.
    tried = failed(Row("d", may_not_fit=True), "OutOfMemoryError: CUDA out of memory.")
    assert ratio_figures([*found, tried], [best("c", "d")])[0]["ok"] is True
    nobody = [found[0], tried, dataclasses.replace(tried, name="c")]
    assert ratio_figures(nobody, [best("c", "d")])[0]["ok"] is False


def test_only_want_of_memory_is_excused() -> None:
    for reason, excused in (("OutOfMemoryError: CUDA out of memory.", True), ("no NCCL", False)):
        for may in (True, False):
            found = failed(Row("a", may_not_fit=may), reason)
            (figure,) = row_figures(found)
            assert figure["ok"] is (None if excused and may else False)
            assert reason in summary_lines(found)[0]


def test_a_bar_of_several_is_for_the_fastest() -> None:
    found = [result(9.0, s, name=n) for n, s in (("a", 4.0), ("b", 2.0))]
    (bar,) = settled_bars([Bar("a | b", TFLOPS, least=1.5)], found)
    assert (bar.row, bar.least) == ("b", 1.5)
    assert settled_bars([Bar("a | b", TFLOPS)], found[:1])[0].row == "a"


def test_a_row_is_told_in_few_lines() -> None:
    found = dataclasses.replace(
        result(9.0, 4.0, 2.0),
        allocated_bytes=3 << 30,
        trace=[{"name": "GEMM", "value": 51.23, "unit": "%"}],
    )
    told = "\n".join(summary_lines(found))
    assert len(summary_lines(found)) == 4
    for part in ("useful tokens 375 /s/GPU", "step, slowest 4 s", "peak allocated 3 GiB"):
        assert part in told
    assert "loss of the last step 7 nats" in told
    assert "GEMM 51.2 %" in told


@pytest.mark.parametrize(("losses", "ok"), [((2.0, 1.0), True), ((1.0, 1.0), False)])
def test_what_does_not_learn_is_no_row(losses: tuple[float, float], ok: bool) -> None:
    found = RowResult(name="a", kind="hf", steps=[record(1.0, loss=loss) for loss in losses])
    (figure,) = (f for f in row_figures(found) if f["name"] == f"a: {LOSS_LAST}")
    assert figure["ok"] is ok


def test_bars_are_for_their_row() -> None:
    bars = [Bar("a", TFLOPS, least=3.0), Bar("b", TFLOPS, least=1.0), Bar("a", DATA_WAIT, most=0.5)]
    judged = {
        figure["name"]: figure["ok"]
        for figure in row_figures(result(9.0, 2.0), bars)
        if figure["ok"] is not None
    }
    assert judged == {f"a: {TFLOPS}": False, f"a: {DATA_WAIT}": False, f"a: {LOSS_LAST}": True}


def test_a_result_is_read_as_it_was_written(tmp_path) -> None:
    found = result(9.0, 2.0, images=3)
    found.write(tmp_path / "result.json")
    assert RowResult.read(tmp_path / "result.json") == found
