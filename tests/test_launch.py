"""The launcher of multi-rank tests names the rank that hangs or fails and leaves no process."""

import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ghostvis_mega.utils import launch as launcher
from ghostvis_mega.utils.launch import EXIT_HANG, launch_self
from tests.launch import ROOT, RankError, RankHang, launch

WORKER = Path(__file__).parent / "parity" / "sleeper.py"


def processes_of(folder: Path) -> list[int]:
    """Running processes that were started by `launch` with this folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (entry / "environ").exists():
            try:
                environment = (entry / "environ").read_bytes()
            except (PermissionError, ProcessLookupError, FileNotFoundError):
                continue
            if f"LAUNCH_FOLDER={folder}".encode() in environment:
                found.append(int(entry.name))
    return found


def wait_until(true: Callable[[], bool]) -> None:
    """Up to a minute, which a busy machine may need."""
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end, "in vain"
        time.sleep(0.1)


@pytest.mark.world_size(4)
def test_hang_is_killed_and_named(tmp_path: Path) -> None:
    with pytest.raises(RankHang) as caught:
        launch(WORKER, ranks=4, timeout_s=25, folder=tmp_path, args=["hang"])
    message = str(caught.value)
    assert "hangs on rank 2:" in message
    assert re.search(r"rank 2 is in asleep_forever \(sleeper\.py:\d+\)", message)
    for rank in (0, 1, 3):
        assert re.search(
            rf"rank {rank} waits for others in .*called by main \(sleeper\.py:\d+\)", message
        )
    assert processes_of(tmp_path) == []


@pytest.mark.world_size(2)
def test_failing_rank_is_named_and_ends_the_others(tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"(?s)rank 1 of 2 ended with 1.*rank 1 has had enough"):
        launch(WORKER, ranks=2, timeout_s=60, folder=tmp_path, args=["fail"])
    assert processes_of(tmp_path) == []


def test_a_command_starts_itself_as_ranks(capfd: pytest.CaptureFixture[str]) -> None:
    """Rank 0 alone writes, and exit codes come through."""
    code = launch_self(["--help"], processes=2, device="cpu", timeout_s=60)
    out, err = capfd.readouterr()
    assert code == 0
    assert out.count("Usage: ghostvis") == 1
    assert err == ""


def test_a_command_that_fails_on_its_ranks_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    code = launch_self(["no-such-command"], processes=2, device="cpu", timeout_s=60)
    _, err = capfd.readouterr()
    assert code == 2
    assert re.search(r"ghostvis_mega: rank [01] of 2 ended with 2", err)


def test_a_command_that_does_not_end_is_a_hang(capfd: pytest.CaptureFixture[str]) -> None:
    code = launch_self(["--help"], processes=1, device="cpu", timeout_s=0.0)
    _, err = capfd.readouterr()
    assert code == EXIT_HANG
    assert "ghostvis_mega did not end within 0 s" in err


def test_no_rank_outlives_a_launcher_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "sleeper.py"
    script.write_text("import time; time.sleep(600)")
    start = (
        "import sys; from pathlib import Path; from ghostvis_mega.utils.launch import run_ranks; "
        "run_ranks([sys.argv[1]], ranks=2, timeout_s=600, folder=Path(sys.argv[2]), environment={})"
    )
    command = [sys.executable, "-c", start, str(script), str(tmp_path / "ranks")]
    ranks = tmp_path / "ranks"
    with subprocess.Popen(command, cwd=ROOT) as launcher:
        wait_until(lambda: len(processes_of(ranks)) == 2)
        time.sleep(0.5)  # until they run the script
        launcher.kill()
    wait_until(lambda: processes_of(ranks) == [])


class Ending:
    """A process that is seen to run `looks` times and has then ended with `code`."""

    def __init__(self, code: int, *, looks: int):
        self.code, self.looks = code, looks
        self.returncode: int | None = None

    def poll(self) -> int | None:
        self.looks -= 1
        if self.looks < 0:
            self.returncode = self.code
        return self.returncode


@pytest.mark.parametrize("looks", range(8))
def test_a_rank_that_fails_between_two_looks_is_noticed(
    looks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "_POLL_S", 0.0)
    with pytest.raises(RankError, match="rank 0 of 1 ended with 11"):
        launcher.wait_ranks("x", [Ending(11, looks=looks)], tmp_path, 60.0)
    launcher.wait_ranks("x", [Ending(0, looks=looks)], tmp_path, 60.0)
