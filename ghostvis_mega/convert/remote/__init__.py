"""Code that an export in the format `ghostvis` brings along; it imports transformers alone."""

from pathlib import Path

_HERE = Path(__file__).parent
_FILES = ("configuration_ghostvis.py", "modeling_ghostvis.py")


def code_files() -> dict[str, str]:
    """Content by file name; in an export the files import each other without this package."""
    return {
        name: (_HERE / name).read_text(encoding="utf-8").replace(f"from {__name__}.", "from .")
        for name in _FILES
    }
