"""The exceptions users can see. Everything else that is raised is our own bug."""


class GhostVisError(Exception):
    """Base of all errors whose message is written for the person who runs the command."""


class ConfigError(GhostVisError, ValueError):
    """One or more wrong settings; `problems` holds one sentence for each."""

    def __init__(self, problems: list[str]):
        self.problems = list(problems)
        count = len(self.problems)
        head = (
            "1 problem in the configuration:"
            if count == 1
            else f"{count} problems in the configuration:"
        )
        super().__init__(
            "\n".join([head, *(f"  {i}. {text}" for i, text in enumerate(self.problems, 1))])
        )


class DataError(GhostVisError, ValueError):
    """A data file that breaks its format; the message names the file, the place and the rule."""


class CheckpointError(GhostVisError, RuntimeError):
    """A checkpoint that is missing, incomplete or does not fit the run."""


class DamagedCheckpointError(CheckpointError):
    """A complete checkpoint whose files are not what was saved; an older one may do."""


class FolderTakenError(CheckpointError):
    """The folder belongs to another launch, so that this one must not write there."""


class TrainingError(GhostVisError, RuntimeError):
    """A run that cannot go on learning; its last checkpoint is as it was."""


class MissingDependencyError(GhostVisError, ImportError):
    """An optional package is needed; the message holds the pip line that installs it."""

    def __init__(self, package: str, *, needed_for: str, extra: str):
        super().__init__(f"{needed_for} needs {package}: pip install -e '.[{extra}]'")
