"""What is closed at the end of a `with` statement."""

from types import TracebackType
from typing import Self


class Closing:
    """Makes a class with `close()` a context manager."""

    def close(self) -> None:
        """Give back what is held; once or more."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
