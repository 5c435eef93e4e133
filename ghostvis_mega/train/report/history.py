"""Previews beside the report page, so that a resumed run's page still shows the earlier ones.

One file a step, `step-00000010.json`, each written whole or not at all:
`{"step": 10, "previews": [{"images": [base64, ...], "question", "answer", "truth"}, ...]}`.
"""

import base64
import json
import re
from pathlib import Path
from typing import Any

from ghostvis_mega.train.observers.base import Preview
from ghostvis_mega.utils.errors import DataError
from ghostvis_mega.utils.files import atomic_write_json
from ghostvis_mega.utils.html.pictures import picture_type

_FILE_NAME = re.compile(r"step-([0-9]{8,})\.json")
_TEXTS = ("question", "answer", "truth")


class PreviewHistory:
    """The previews of one run in a folder of their own."""

    def __init__(self, folder: Path):
        self._folder = folder

    def begin(self, *, last_step: int) -> dict[int, list[Preview]]:
        """Previews up to `last_step` by step; later ones are deleted, as the run makes them anew.

        A fresh run, with `last_step` 0, keeps none.

        Raises:
            DataError: a file that is kept does not hold previews.
        """
        kept = {}
        for path in sorted(self._folder.iterdir()) if self._folder.is_dir() else ():
            match = _FILE_NAME.fullmatch(path.name)
            if match is None:
                continue
            step = int(match[1])
            if last_step > 0 and step <= last_step:
                kept[step] = _read(path, step)
            else:
                path.unlink()
        return kept

    def keep(self, step: int, previews: list[Preview]) -> None:
        """Write the previews of a step."""
        # Not before: a disk that is full at the start may have room by then.
        self._folder.mkdir(parents=True, exist_ok=True)
        document = {"step": step, "previews": [_to_json(preview) for preview in previews]}
        atomic_write_json(self._folder / f"step-{step:08d}.json", document)


def _to_json(preview: Preview) -> dict[str, Any]:
    pictures = [base64.b64encode(data).decode("ascii") for data in preview.images_png]
    return {"images": pictures, **{name: getattr(preview, name) for name in _TEXTS}}


def _read(path: Path, step: int) -> list[Preview]:
    try:
        document = json.loads(path.read_bytes())
        if document["step"] != step:
            raise ValueError(f"it is of step {document['step']!r}")
        return [_from_json(entry) for entry in document["previews"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{path} does not hold the previews of step {step} ({error}); "
            "move the file away to go on without them"
        ) from error


def _from_json(entry: dict[str, Any]) -> Preview:
    texts = {name: entry[name] for name in _TEXTS}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise ValueError(f"{name} is {text!r}, not a text")
    pictures = tuple(base64.b64decode(text, validate=True) for text in entry["images"])
    for data in pictures:
        # The page refuses anything else, but could not name this file.
        picture_type(data)
    return Preview(images_png=pictures, **texts)
