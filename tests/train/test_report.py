"""The HTML page: complete, self-contained, and safe whatever a model answers."""

import base64
import hashlib
import html
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from ghostvis_mega.train.observers import JsonLines, Preview
from ghostvis_mega.train.report import HtmlReport
from ghostvis_mega.train.report.charts import Chart, Series, draw_chart
from ghostvis_mega.train.report.curves import centred_mean, short_si
from ghostvis_mega.train.report.page import ReportData, render_page
from ghostvis_mega.train.report.timing import mean_timing
from ghostvis_mega.utils.html.pictures import picture_type
from ghostvis_mega.utils.html.scales import buckets, linear_ticks, log_ticks, step_ticks
from tests.train.samples import make_png, make_preview, make_run, make_step

HOSTILE = """</p></script><script>alert(1)</script>"'><img src=x onerror=alert(2)>"""
VOID = {"meta", "img", "line", "path", "br"}


class Page(HTMLParser):
    """Elements of a page with their attributes; fails on tags that are not closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> without a start"
        assert self._open.pop() == tag

    def count(self, tag: str, css: str | None = None) -> int:
        """Elements of a tag, with a class among theirs if one is named."""
        return sum(
            name == tag and (css is None or css in (attributes.get("class") or "").split())
            for name, attributes in self.elements
        )


def make_data(*, previews: dict[int, list[Preview]] | None = None, **run: Any) -> ReportData:
    """A run of 60 steps with two rounds of previews."""
    groups = {0: [make_preview(answer="blue")] * 8, 60: [make_preview()] * 8}
    return ReportData(
        run=make_run(**run),
        steps=[make_step(step=step, loss=3.0 / step) for step in range(1, 61)],
        previews=groups if previews is None else previews,
        summary={"heldout_accuracy": 0.931, "question_only_accuracy": 0.67, "seconds": 700.0},
    )


def test_page_holds_numbers_curves_cards_and_settings() -> None:
    text = render_page(make_data())
    page = Page(text)
    assert page.count("figure", "chart") == 6
    # Loss, norm, throughput and imbalance are drawn raw and smoothed; three modules have a learning
    # rate; bytes have a mean and a maximum.
    assert page.count("path", "curve") == 13
    assert page.count("path", "faint") == 4
    assert page.count("article", "card") == 16
    assert page.count("article", "good") == 8
    assert page.count("article", "bad") == 8
    assert page.count("details", "group") == 2
    assert page.count("img") == 16
    for expected in ("93.1 %", "67.0 %", "11m40s", "0 of 8 right", "8 of 8 right", "a/b.gvd"):
        assert expected in text, expected
    assert text.index("Before training") < text.index("Step 60")


def test_one_rank_has_no_curves_of_the_dispatch() -> None:
    alone = {"imbalance": 1.0, "sent_mean": 0.0, "sent_max": 0.0, "local_share": 1.0}
    for dispatch, charts in (({}, 4), (alone, 4), ({**alone, "sent_max": 1.0}, 6)):
        steps = [make_step(step=step, dispatch=dispatch) for step in (1, 2)]
        text = render_page(ReportData(run=make_run(), steps=steps))
        assert Page(text).count("figure", "chart") == charts


def test_small_pictures_grow_by_a_whole_factor_and_large_ones_are_left() -> None:
    pictures = (make_png(64, 32), make_png(336, 336))
    page = Page(render_page(make_data(previews={1: [make_preview(images_png=pictures)]})))
    small, large = [attributes for tag, attributes in page.elements if tag == "img"]
    assert (small["class"], small["width"], small["height"]) == ("tiny", "192", "96")
    assert "width" not in large


def test_nothing_outside_is_referenced() -> None:
    text = render_page(make_data())
    assert "http" not in re.sub(r'http-equiv="Content-Security-Policy"', "", text)
    page = Page(text)
    assert page.count("link") == 0
    for tag, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "action", "data"):
            value = attributes.get(name)
            assert value is None or value.startswith("data:image/"), (tag, name, value)
    assert "@import" not in text
    assert "url(" not in text


def test_hostile_texts_are_shown_and_never_markup() -> None:
    plain = Page(render_page(make_data(previews={1: [make_preview()]})))
    preview = make_preview(question=HOSTILE, answer=HOSTILE, truth=HOSTILE)
    data = make_data(
        previews={1: [preview]},
        name=HOSTILE,
        model=HOSTILE,
        layout=HOSTILE,
        device=HOSTILE,
        precision=HOSTILE,
        settings={HOSTILE: {HOSTILE: HOSTILE}},
        versions={HOSTILE: HOSTILE},
        parameters={HOSTILE: 1},
    )
    data.summary = {"status": HOSTILE}
    data.steps = [
        make_step(step=step, lr={HOSTILE: 1e-3, "llm": 1e-4}, timing={HOSTILE: 0.1})
        for step in (1, 2)
    ]
    text = render_page(data)
    page = Page(text)
    assert page.count("script") == plain.count("script")
    assert page.count("img") == 1
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert "<script>alert" not in text
    assert html.escape(HOSTILE) in text


def test_policy_allows_the_pages_own_script_and_no_other() -> None:
    text = render_page(make_data())
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None
    (script,) = re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in html.unescape(policy[1])
    assert "default-src 'none'" in html.unescape(policy[1])
    assert "unsafe-inline'; script" in html.unescape(policy[1])


def test_hover_data_is_json_with_one_text_a_point() -> None:
    text = render_page(make_data())
    blocks = re.findall(r'<script type="application/json">(.*?)</script>', text, flags=re.DOTALL)
    assert len(blocks) == 6
    for block in blocks:
        data = json.loads(block)
        assert len(data["step"]) == len(data["x"]) == 60
        assert all(len(series["text"]) == 60 for series in data["series"])
        assert data["x"] == sorted(data["x"])
        assert 0 < data["x"][0] < data["x"][-1] < 1


def test_a_page_without_steps_or_previews_is_still_a_page() -> None:
    text = render_page(ReportData(run=make_run()))
    assert Page(text).count("figure") == 0
    assert "running: step 0 of 100" in text


def test_the_loss_tile_is_the_mean_of_the_last_steps() -> None:
    losses = [9.0] * 80 + [2.0] * 20
    steps = [make_step(step=step, loss=loss) for step, loss in enumerate(losses, 1)]
    steps[-1] = make_step(step=100, loss=math.nan)
    text = render_page(ReportData(run=make_run(), steps=steps))
    assert '<p class="label">Loss</p><p class="value">2</p>' in text
    assert "from 9 at step 1" in text


def test_accuracy_is_never_shown_without_a_measurement() -> None:
    data = make_data()
    data.summary = None
    assert "measured at the end, if asked for" in render_page(data)
    data.summary = {"status": "finished"}
    assert "not measured in this run" in render_page(data)


def test_loss_that_is_never_finite_leaves_a_note() -> None:
    steps = [make_step(step=step, loss=math.nan) for step in (1, 2)]
    text = render_page(ReportData(run=make_run(), steps=steps))
    assert "no values yet" in text
    assert "nan" not in re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL)


def test_nan_breaks_a_curve_instead_of_bending_it() -> None:
    def draw(values: list[float]) -> str:
        series = Series("s", [1, 2, 3, 4, 5], values, "c1")
        text = draw_chart(Chart("t", (series,), str, str))
        path = re.search(r'<path class="curve c1" d="([^"]*)"', text)
        assert path is not None
        return path[1]

    assert draw([1, 2, 3, 4, 5]).count("M") == 1
    assert draw([1, 2, math.nan, 4, 5]).count("M") == 2


def test_higher_values_are_drawn_higher_on_both_scales() -> None:
    for values, is_log in (([1.0, 2.0, 3.0], False), ([0.01, 1.0, 100.0], True)):
        chart = Chart("t", (Series("s", [1, 2, 3], values, "c1"),), str, str, allow_log=True)
        text = draw_chart(chart)
        assert ("log scale" in text) == is_log
        path = re.search(r'<path class="curve c1" d="([^"]*)"', text)
        assert path is not None
        points = [tuple(map(float, p.split())) for p in re.split("[ML]", path[1])[1:]]
        assert [x for x, _ in points] == sorted(x for x, _ in points)
        heights = [y for _, y in points]
        assert heights == sorted(heights, reverse=True)
        # Equal distances in value (linear) or in ratio (log) are equal distances on the page.
        assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (500, "500"), (8000, "8k"), (2500, "2.5k"), (100_000, "100k"), (2e6, "2M")],
)
def test_short_si(value: float, text: str) -> None:
    assert short_si(value) == text


def test_throughput_ticks_are_short() -> None:
    text = render_page(make_data())
    (chart,) = re.findall(r"<figcaption>Useful tokens.*?</figure>", text, flags=re.DOTALL)
    labels = re.findall(r'class="ytick"[^>]*>([^<]*)<', chart)
    assert labels == ["0", "5k", "10k", "15k", "20k"]


def test_ticks_are_round_and_span_the_values() -> None:
    assert linear_ticks(0, 9.3) == [0, 2, 4, 6, 8, 10]
    assert linear_ticks(0, 1e-3) == pytest.approx([0, 2e-4, 4e-4, 6e-4, 8e-4, 1e-3])
    assert linear_ticks(3, 3)[0] <= 3 <= linear_ticks(3, 3)[-1]
    assert linear_ticks(0, 0)[0] == 0
    assert log_ticks(0.03, 40) == pytest.approx([0.01, 0.1, 1, 10, 100])
    assert step_ticks(0, 600) == [0, 100, 200, 300, 400, 500, 600]
    assert step_ticks(0, 3) == [0, 1, 2, 3]


def test_long_curves_are_cut_down_and_keep_their_spikes() -> None:
    values = [1.0] * 10_000
    values[5000] = 90.0
    points = buckets(range(1, 10_001), values, limit=400)
    assert len(points) == 400
    assert max(b.high for b in points) == 90.0
    assert points[-1].step == 10_000
    page = render_page(
        ReportData(run=make_run(), steps=[make_step(step=s) for s in range(1, 10_001)])
    )
    assert len(page) < 400_000


def test_centred_mean_keeps_ends_and_does_not_lag() -> None:
    line = [float(n) for n in range(10)]
    assert centred_mean(line, half=3) == pytest.approx(line)
    assert centred_mean([1.0, math.nan, 3.0], half=1)[1] == 2.0
    assert math.isnan(centred_mean([math.nan], half=1)[0])


def test_timing_leaves_out_the_first_step_and_orders_the_phases() -> None:
    steps = [
        make_step(step=1, seconds=50.0, timing={"llm": 49.0}),
        make_step(step=2, seconds=1.0, timing={"zzz": 0.1, "llm": 0.5, "data": 0.1}),
        make_step(step=3, seconds=2.0, timing={"zzz": 0.1, "llm": 1.5, "data": 0.1}),
    ]
    means = mean_timing(steps)
    assert list(means) == ["data", "llm", "zzz", "other"]
    assert means["llm"] == pytest.approx(1.0)
    assert means["other"] == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (make_png(1, 1), "image/png"),
        (b"\xff\xd8\xff\xe0", "image/jpeg"),
        (b"RIFF\x10\0\0\0WEBPVP8 ", "image/webp"),
    ],
)
def test_picture_types(data: bytes, kind: str) -> None:
    assert picture_type(data) == kind


def test_an_unknown_picture_is_an_error() -> None:
    with pytest.raises(ValueError, match="neither PNG, JPEG nor WebP"):
        picture_type(b"<svg onload=alert(1)>")


@pytest.mark.parametrize(
    ("answer", "correct"),
    [("Red", True), (" red. ", True), ("red red", False), ("", False), ("re", False)],
)
def test_what_counts_as_right(answer: str, correct: bool) -> None:
    assert make_preview(answer=answer).correct is correct


def test_observer_writes_when_due_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "report" / "index.html"
    report = HtmlReport(path, every=3)
    report.on_start(make_run(total_steps=4))
    report.on_step(make_step(step=2))
    assert not path.exists()
    report.on_step(make_step(step=3))
    assert "running: step 3 of 4" in path.read_text()
    report.on_preview(3, [make_preview()])
    assert Page(path.read_text()).count("article") == 1
    report.on_step(make_step(step=4))
    report.on_end({"status": "finished"})
    assert "finished: 4 of 4 steps" in path.read_text()
    assert {entry.name for entry in path.parent.iterdir()} == {"index.html", "previews"}


def test_writing_takes_a_small_part_of_a_run(tmp_path: Path) -> None:
    path = tmp_path / "index.html"
    report = HtmlReport(path, every=1)
    report.on_start(make_run())
    report.on_step(make_step(step=1))
    report.on_step(make_step(step=2))
    assert "running: step 1 of" in path.read_text(), "the second write came at once"
    report.on_end({"status": "stopped by SIGTERM"})
    assert "stopped by SIGTERM: 2 of" in path.read_text()


def test_a_resumed_run_shows_its_earlier_steps(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    earlier = JsonLines(metrics)
    earlier.on_start(make_run())
    for step in (1, 2, 3):
        earlier.on_step(make_step(step=step))
    path = tmp_path / "index.html"
    report = HtmlReport(path, every=1, history=metrics)
    report.on_start(make_run(start_step=2))
    report.on_step(make_step(step=3))
    data = json.loads(re.findall(r'"application/json">(.*?)</script>', path.read_text())[0])
    assert data["step"] == [1, 2, 3]
