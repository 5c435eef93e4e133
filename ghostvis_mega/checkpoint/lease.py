"""Which launch a run folder belongs to: the one that started last.

Two launches that save into one folder would remove each other's half-written checkpoints. Nobody
asks whether the launch before still lives, which no file can tell: a new one takes the folder over,
and one that finds it taken stops. So what a dead launch left behind never keeps a run from
starting.
"""

import json
import socket
from pathlib import Path

from ghostvis_mega.utils.errors import CheckpointError, FolderTakenError
from ghostvis_mega.utils.files import atomic_write_json, read_small

LEASE_FILE = "launch.json"


class Lease:
    """The hold of one launch on a run folder; its first rank alone reads and writes.

    Args:
        folder: Of the run, `log.output`.
        launch: Its name, which no other has.
    """

    def __init__(self, folder: Path, *, launch: str):
        self.path = folder / LEASE_FILE
        self._own = {"launch": launch, "host": socket.gethostname()}

    def take(self) -> None:
        """Take the folder over, from whomever.

        Raises:
            CheckpointError: The file cannot be written, so that two launches could not tell whose
                the folder is.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_json(self.path, self._own)
        except OSError as error:
            raise CheckpointError(
                f"{self.path}, which says whose this folder is, cannot be written: "
                f"{error.strerror}. Make room or name another log.output"
            ) from error

    def check(self) -> None:
        """Nothing, while the folder is this launch's; also where the file is gone.

        Raises:
            FolderTakenError: Another launch has it.
            CheckpointError: The file says nothing.
        """
        try:
            found = json.loads(read_small(self.path))
        except FileNotFoundError:
            return
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{self.path} cannot be read: {error}") from error
        if found != self._own:
            raise FolderTakenError(
                f"{self.path.parent} now belongs to {_named(found)}, which started later than this "
                f"one, {_named(self._own)}. This one stops, since each would remove what the other "
                "saves; give runs that live at the same time a log.output of their own"
            )


def _named(document: object) -> str:
    if not isinstance(document, dict):
        return "a launch without a name"
    return f"launch {document.get('launch')} on {document.get('host')}"
