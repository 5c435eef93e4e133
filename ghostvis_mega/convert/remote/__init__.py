"""Code that an export in the format `ghostvis` brings along; it imports transformers alone."""

from pathlib import Path

_HERE = Path(__file__).parent
CODE_FILES = (_HERE / "configuration_ghostvis.py", _HERE / "modeling_ghostvis.py")
