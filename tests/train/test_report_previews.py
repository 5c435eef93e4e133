"""Previews outlive the process that made them, up to the step from which the run goes on."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ghostvis_mega.train.observers import Preview
from ghostvis_mega.train.report import HtmlReport
from ghostvis_mega.train.report.history import PreviewHistory
from ghostvis_mega.utils.errors import DataError
from tests.train.samples import make_png, make_preview, make_run, make_step

STEPS = (0, 10, 20)


def answer_of(step: int) -> str:
    return f"answer-after-{step}"


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """The page of a run that showed previews at `STEPS` and then died."""
    path = tmp_path / "report" / "index.html"
    report = HtmlReport(path)
    report.on_start(make_run())
    for step in STEPS:
        if step:
            report.on_step(make_step(step=step))
        report.on_preview(step, [make_preview(answer=answer_of(step))])
    assert shown(path) == set(STEPS)
    return path


def shown(page: Path) -> set[int]:
    """Steps whose previews the page shows."""
    text = page.read_text()
    return {step for step in (*STEPS, 30) if answer_of(step) in text}


def go_on(page: Path, *, start: int) -> HtmlReport:
    report = HtmlReport(page)
    report.on_start(make_run(start_step=start))
    return report


@pytest.mark.parametrize(("start", "kept"), [(10, {0, 10}), (15, {0, 10}), (20, {0, 10, 20})])
def test_a_resumed_run_shows_previews_up_to_its_start(page: Path, start: int, kept: set[int]):
    report = go_on(page, start=start)
    report.on_preview(30, [make_preview(answer=answer_of(30))])
    assert shown(page) == {*kept, 30}
    # Once more: what the second run dropped is gone, what it added is not.
    go_on(page, start=30).on_end({})
    assert shown(page) == {*kept, 30}


def test_a_fresh_run_begins_anew(page: Path):
    go_on(page, start=0).on_end({})
    assert shown(page) == set()
    go_on(page, start=20).on_end({})
    assert shown(page) == set()


def test_every_part_of_a_preview_comes_back(tmp_path: Path):
    preview = Preview(
        images_png=(make_png(3, 5), make_png(7, 2, grey=9)),
        question="was ist <b>das</b>?\n",
        answer="\u00e4 \U0001f426 \x00",
        truth="",
    )
    plain = make_preview(images_png=())
    PreviewHistory(tmp_path / "previews").begin(last_step=0)
    PreviewHistory(tmp_path / "previews").keep(4, [preview, plain])
    assert PreviewHistory(tmp_path / "previews").begin(last_step=4) == {4: [preview, plain]}


def test_a_step_that_is_shown_twice_is_kept_once(page: Path):
    go_on(page, start=10).on_preview(10, [make_preview(answer="second look")])
    go_on(page, start=10).on_end({})
    assert "second look" in page.read_text()
    assert shown(page) == {0}


def change(path: Path, **fields: object) -> None:
    document = json.loads(path.read_text())
    document["previews"][0] |= fields
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "Unterminated"),
        (lambda path: path.write_text("[]"), "list indices"),
        (lambda path: path.write_bytes(b"\xff"), "decode"),
        (lambda path: path.write_text('{"step": 11, "previews": []}'), "it is of step 11"),
        (lambda path: change(path, answer=3), "answer is 3, not a text"),
        (lambda path: change(path, images=["!"]), "base64"),
        (lambda path: change(path, images=["aGFsbG8="]), "neither PNG, JPEG nor WebP"),
    ],
)
def test_a_damaged_file_is_named(page: Path, damage: Callable[[Path], object], says: str):
    file = page.parent / "previews" / "step-00000010.json"
    damage(file)
    with pytest.raises(DataError, match=f"{file} does not hold the previews of step 10 .*{says}"):
        go_on(page, start=20)
    # It is not read where it does not count.
    go_on(page, start=5).on_end({})
    assert shown(page) == {0}
    assert not file.exists()


def test_other_files_beside_them_are_left_alone(page: Path):
    note = page.parent / "previews" / "step-00000010.json.bak"
    note.write_text("mine")
    go_on(page, start=0)
    assert note.read_text() == "mine"
