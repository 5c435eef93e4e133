"""Verdicts of figures against their bars."""

import math

import pytest
import typer

from ghostvis_mega.cli.output import conclude
from ghostvis_mega.utils.figures import any_missed, at_least, at_most, measured


@pytest.mark.parametrize(
    ("value", "below", "above"),
    [(1.0, True, False), (2.0, True, True), (3.0, False, True), (math.nan, False, False)],
)
def test_a_bar_is_kept_up_to_and_with_itself(value: float, below: bool, above: bool) -> None:
    assert at_most("a", value, "s", 2.0)["ok"] is below
    assert at_least("a", value, "s", 2.0)["ok"] is above


def test_without_a_bar_there_is_no_verdict() -> None:
    for figure in (at_most("a", 1.0, "s", None), at_least("a", 1.0, "s", None), measured("a", 1.0)):
        assert figure["ok"] is None and not any_missed([figure])


def test_commands_end_with_1_for_a_missed_bar_alone(capsys: pytest.CaptureFixture[str]) -> None:
    kept, missed = at_most("kept", 1, "s", 2), at_most("missed", 3, "s", 2)
    conclude([kept, measured("free", 1)], title="", as_json=True)
    assert '"free"' in capsys.readouterr().out
    for show in (True, False):
        with pytest.raises(typer.Exit) as exit_info:
            conclude([kept, missed], title="", as_json=True, show=show)
        assert exit_info.value.exit_code == 1
        assert ('"missed"' in capsys.readouterr().out) is show
