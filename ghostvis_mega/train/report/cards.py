"""Previews as cards: the picture, the question, what the model answered and the truth."""

import html
import struct

from ghostvis_mega.train.observers.base import Preview
from ghostvis_mega.utils.html.pictures import data_uri, picture_type

_PICTURE_PX = 200
"""Small pictures are enlarged by a whole factor up to this width, so that pixels stay even."""


def draw_previews(previews: dict[int, list[Preview]]) -> str:
    """One foldable group a step, in order; the first and the last are open, to be compared."""
    steps = sorted(previews)
    opened = {steps[0], steps[-1]} if steps else set()
    return "".join(_group(step, previews[step], is_open=step in opened) for step in steps)


def _group(step: int, previews: list[Preview], *, is_open: bool) -> str:
    correct = sum(p.correct for p in previews)
    dots = "".join(f'<i class="{"good" if p.correct else "bad"}"></i>' for p in previews)
    title = "Before training" if step == 0 else f"Step {step}"
    return (
        f'<details class="group"{" open" if is_open else ""}><summary><b>{title}</b>'
        f'<span class="dots">{dots}</span>'
        f'<span class="count">{correct} of {len(previews)} right</span></summary>'
        f'<div class="cards">{"".join(_card(p) for p in previews)}</div></details>'
    )


def _card(preview: Preview) -> str:
    pictures = "".join(_picture(data) for data in preview.images_png)
    verdict, mark = ("good", "&#10003;") if preview.correct else ("bad", "&#10007;")
    answer = html.escape(preview.answer.strip()) or "<em>(empty)</em>"
    return (
        f'<article class="card {verdict}"><div class="pictures">{pictures}</div>'
        f'<p class="question">{html.escape(preview.question)}</p>'
        f'<p class="answer"><span class="mark">{mark}</span><span>{answer}</span></p>'
        f'<p class="truth"><span>truth</span> {html.escape(preview.truth)}</p></article>'
    )


def _picture(data: bytes) -> str:
    size = ""
    if picture_type(data) == "image/png":
        # IHDR is always the first chunk: width and height stand at a fixed place.
        width, height = struct.unpack(">II", data[16:24])
        if 0 < width <= _PICTURE_PX // 2:
            factor = _PICTURE_PX // width
            size = f' class="tiny" width="{width * factor}" height="{height * factor}"'
    return f'<img{size} alt="" src="{data_uri(data)}">'
