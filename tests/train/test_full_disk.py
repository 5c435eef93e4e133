"""A full disk costs lines and exports, never training; a stop does not wait for an export."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ghostvis_mega import session
from ghostvis_mega.session import Training
from ghostvis_mega.train.guards import Guards
from ghostvis_mega.train.lines import LineFile
from ghostvis_mega.train.observers.build import Observers
from ghostvis_mega.train.signals import StopRequest
from ghostvis_mega.utils.errors import CheckpointError

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
