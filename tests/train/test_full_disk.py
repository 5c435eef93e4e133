"""A full disk costs lines and exports, never training; a stop does not wait for an export."""

import errno
import json
import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ghostvis_mega import session
from ghostvis_mega.config.schema import LogConfig
from ghostvis_mega.data.bad_samples import BadSamples
from ghostvis_mega.session import Training
from ghostvis_mega.train.goodput import Goodput
from ghostvis_mega.train.guards import LEDGER, Guards
from ghostvis_mega.train.lines import LineFile
from ghostvis_mega.train.loop import Loop
from ghostvis_mega.train.observers import JsonLines
from ghostvis_mega.train.observers.build import Observers, make_observers
from ghostvis_mega.train.observers.jsonlines import read_metrics
from ghostvis_mega.train.signals import StopRequest
from ghostvis_mega.utils.errors import CheckpointError, DataError, TrainingError
from tests.train.samples import make_preview, make_run, make_step

pytestmark = pytest.mark.durability

WARNING = logging.WARNING


def test_lines_that_do_not_fit_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "run" / "ledger.jsonl"
    path.parent.mkdir()
    path.symlink_to("/dev/full")
    lines = LineFile(path)
    with caplog.at_level(WARNING):
        for step in range(3):
            lines.append({"step": step})
        assert lines.lost == 3
        assert caplog.text.count("No space left on device") == 1
        path.unlink()
        lines.append({"step": 3})
        lines.append({"step": 4})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [3, 4]
    assert "lines that were lost: 3" in caplog.text and lines.lost == 0


def test_an_observer_that_cannot_write_is_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    told: list[Any] = []

    class Broken:
        def on_step(self, m: Any) -> None:
            raise OSError("no space")

    class Sound:
        def on_step(self, m: Any) -> None:
            told.append(m)

    observers = Observers([Broken(), Sound()])  # type: ignore[list-item]
    with caplog.at_level(WARNING):
        observers.on_step(1)  # type: ignore[arg-type]
        observers.on_step(2)  # type: ignore[arg-type]
    assert told == [1, 2]
    assert caplog.text.count("Broken cannot write: no space") == 1


def full(path: Path) -> Path:
    """A place that exists and takes no byte."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to("/dev/full")
    return path


def no_room(*args: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_run_begins_on_a_full_disk_and_writes_once_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = LogConfig(output=tmp_path / "run")
    metrics = settings.output / "metrics.jsonl"
    make_observers(settings, rank=0).on_start(make_run())
    earlier = JsonLines(metrics)
    for step in (1, 2, 3):
        earlier.on_step(make_step(step=step))

    class Tool:
        """Needs room to begin."""

        def on_start(self, run: Any) -> None:
            no_room()

        def on_step(self, m: Any) -> None:
            raise AssertionError("it has not begun")

    observers = make_observers(settings, rank=0)
    observers.members += (Tool(),)
    preview = [make_preview()]
    with monkeypatch.context() as patch, caplog.at_level(WARNING):
        for name in ("mkdir", "open", "fsync", "write", "replace"):
            patch.setattr(os, name, no_room)
        patch.setattr("builtins.open", refusing_writes(open))
        observers.on_start(make_run(start_step=2))
        observers.on_step(make_step(step=3, loss=7.0))
        observers.on_preview(3, preview)
    assert "Tool cannot begin: [Errno 28]" in caplog.text
    assert "HtmlReport cannot write: [Errno 28]" in caplog.text
    assert [m.step for m in read_metrics(metrics, last_step=9)] == [1, 2]
    observers.on_step(make_step(step=4))
    observers.on_preview(4, preview)
    assert [m.step for m in read_metrics(metrics, last_step=9)] == [1, 2, 4]
    assert "lines that were lost: 1" in caplog.text
    page = (settings.output / "report" / "index.html").read_text()
    assert page.count(preview[0].question) >= 1


def refusing_writes(opened: Any) -> Any:
    """`open` on a disk without room."""

    def of(path: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
        if set(mode) & set("wxa+"):
            no_room()
        return opened(path, mode, *rest, **more)

    return of


def test_damage_that_cannot_be_listed_still_counts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = full(tmp_path / "run" / "rejected.jsonl")
    found = BadSamples(path, budget=0.0, num_samples=10, rank=0)
    with caplog.at_level(WARNING):
        for number in range(found.limit):
            found.note("image", number, key="", problem="a cut file")
    assert found.count == found.limit
    assert caplog.text.count("No space left on device") == 1
    path.unlink()
    found.note("image", 0, key="", problem="again")
    with pytest.raises(DataError, match="more than data.bad_sample_budget allows"):
        found.note("image", found.limit, key="", problem="one more")
    other = BadSamples(path, budget=0.0, num_samples=10, rank=1)
    assert other.count == 1 and "not ours" not in caplog.text


def training(output: Path) -> Training:
    """A run whose folder is `output`, without an engine."""
    run = SimpleNamespace(
        log=SimpleNamespace(output=output),
        model_dump=lambda mode: {},
    )
    world = SimpleNamespace(groups=SimpleNamespace(rank=0))
    return Training(run, world, stop=StopRequest())  # type: ignore[arg-type]


def test_a_summary_without_room_is_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = training(tmp_path)
    told.write_summary({"loss": 1.5})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"loss": 1.5}
    monkeypatch.setattr(os, "fsync", no_room)
    with caplog.at_level(WARNING):
        told.write_summary({"loss": 2.5})
    assert "cannot be written: [Errno 28]" in caplog.text and "'loss': 2.5" in caplog.text
    assert json.loads((tmp_path / "summary.json").read_text()) == {"loss": 1.5}


def test_a_run_that_gives_up_says_why_with_and_without_its_folder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    # Such a line is left by a launch that was killed in the middle of it.
    (run / LEDGER).write_text('{"step": 4}\n{"step": 5, "cau\n{"step": 9}\n')
    with caplog.at_level(WARNING):
        place = training(run).give_up(9)
        assert place == f"all there is to know is in {run / 'stopped-after-step-00000009'}"
        assert "has a torn line" in caplog.text
        (tmp_path / "file").write_text("")
        assert training(tmp_path / "file").give_up(9) == ""
    assert "what explains this stop could not be written: [Errno 20]" in caplog.text
    bundle = json.loads((run / "stopped-after-step-00000009" / "bundle.json").read_text())
    assert [row["step"] for row in bundle["left_out"]] == [4, 9]
    for told, said in (("", "these steps."), ("it is in x", "these steps (it is in x).")):
        loop = object.__new__(Loop)
        loop.guards = SimpleNamespace(skipped_in_a_row=3)  # type: ignore[assignment]
        loop.goodput = Goodput(None)
        loop.give_up = lambda done, told=told: told  # type: ignore[misc]
        with pytest.raises(TrainingError) as error:
            loop.refuse(9, SimpleNamespace(cause="a loss"))  # type: ignore[arg-type]
        assert "steps 7 to 9 were left out, the last for a loss" in str(error.value)
        assert str(error.value).endswith(said)


def test_an_export_in_mid_run_may_fail_the_last_may_not_and_a_stop_has_none(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    exports: list[int] = []

    class Failing:
        def __init__(self, run: Any):
            pass

        def save(self, engine: Any, *, step: int) -> None:
            exports.append(step)
            raise CheckpointError("the export failed")

    monkeypatch.setattr(session, "Exporter", Failing)
    saved: list[int] = []
    run = SimpleNamespace(
        checkpoint=SimpleNamespace(export_hf="saves"), train=SimpleNamespace(steps=9)
    )
    world = SimpleNamespace(watchdog=SimpleNamespace(alive=lambda what: None))
    training = Training(run, world, stop=StopRequest())  # type: ignore[arg-type]
    save = training.saving(SimpleNamespace(save=saved.append, engine=None))  # type: ignore[arg-type]
    with caplog.at_level(WARNING):
        save(3)
    assert "the export failed. Training goes on" in caplog.text
    with pytest.raises(CheckpointError):
        save(9)
    training.stop.agree(15, done=5)
    save(5)
    assert (saved, exports) == ([3, 9, 5], [3, 9])


@pytest.mark.parametrize(("change", "kept"), [(4, True), (5, False), (8, False), (9, True)])
def test_going_back_across_a_change_of_data_forgets_its_losses(
    tmp_path: Path, change: int, kept: bool
) -> None:
    run = SimpleNamespace(
        guards=SimpleNamespace(spike_window=8, spike_sigma=7.0),
        data=SimpleNamespace(blend_changes=[SimpleNamespace(step=change)]),
        log=SimpleNamespace(output=tmp_path),
    )
    guards = Guards(run, places=(), rank=0)  # type: ignore[arg-type]
    guards.before(8)
    guards.go_back({"losses": [1.0, 2.0]}, steps=5)
    assert guards.spikes.losses == ([1.0, 2.0] if kept else [])
