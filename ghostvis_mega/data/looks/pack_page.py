"""Packed sequences as one page: a ribbon of the whole, then every sample with its pictures."""

import html
from collections.abc import Mapping, Sequence

from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.looks.pack_view import ImageView, PackView, SegmentView, TokenView
from ghostvis_mega.data.looks.thumbnails import thumbnail
from ghostvis_mega.utils.format import percent
from ghostvis_mega.utils.html.page import facts, read_resource, render_page, section
from ghostvis_mega.utils.html.pictures import data_uri

COLOURS = 6
RIBBON_WIDTH, RIBBON_HEIGHT, TARGET_HEIGHT = 1124, 34, 8
_ID_EVERY = 8
_SHOWN = {"<0x0A>": "\u23ce", "\n": "\u23ce"}


def page_pictures(dataset: Dataset, packs: Sequence[PackView]) -> dict[int, bytes]:
    """The encoded pictures that the page shows."""
    wanted = sorted({image.image_id for pack in packs for image in pack.images})
    return {image_id: thumbnail(dataset, image_id) for image_id in wanted}


def render_packs(name: str, packs: Sequence[PackView], pictures: Mapping[int, bytes]) -> str:
    """The whole page; `name` is the dataset's."""
    title = html.escape(name)
    pairs = [
        ("Sequence", f"{packs[0].seq_length:,} positions"),
        ("Shown", ", ".join(f"pack {pack.number}" for pack in packs)),
    ]
    header = (
        '<header><p class="brand">GhostVis-Mega <span>pack viewer</span></p>'
        f"<h1>{title}</h1>{facts(pairs)}{_key()}</header>"
    )
    return render_page(
        title=f"{name} packs",
        body=header + "".join(_pack(pack, pictures) for pack in packs),
        style=read_resource(__package__, "packs.css"),
    )


def _key() -> str:
    """What the marks of the tokens mean."""
    marks = (
        ('class="target"', "word", "trained: the model must predict it"),
        ("", "word", "context"),
        ('class="special"', "&lt;|im_end|&gt;", "only the template can write it"),
        ('data-p="8"', "word", "position id of every eighth token; point at one for all numbers"),
    )
    items = "".join(
        f'<span><span class="tokens"><i {attribute}>{sample}</i></span> {meaning}</span>'
        for attribute, sample, meaning in marks
    )
    return f'<p class="marks">{items}</p>'


def _pack(pack: PackView, pictures: Mapping[int, bytes]) -> str:
    samples = [segment for segment in pack.segments if segment.sample is not None]
    padding = pack.seq_length - pack.used
    pairs = [
        ("Useful positions", f"{pack.used:,} ({percent(pack.used / pack.seq_length, 2)})"),
        ("Samples", f"{len(samples)}"),
        (
            "Image places",
            f"{len(pack.images)} of {len({i.image_id for i in pack.images})} pictures",
        ),
        ("Trained tokens", f"{pack.weight:.0f}"),
        ("Longest segment", f"{pack.max_seqlen:,}"),
        ("Padding", f"{padding:,}"),
    ]
    borders = " ".join(str(border) for border in pack.cu_seqlens)
    body = (
        f'<div class="panel">{facts(pairs)}{_ribbon(pack)}'
        f'<p class="borders"><b>cu_seqlens</b> {borders}</p></div>'
    )
    body += "".join(
        _segment(pack, place, segment, pictures) for place, segment in enumerate(pack.segments)
    )
    return section(f"Pack {pack.number}", body)


def _ribbon(pack: PackView) -> str:
    """The sequence drawn to scale: segments, pictures inside them, trained positions below."""
    scale = RIBBON_WIDTH / pack.seq_length
    height = RIBBON_HEIGHT + 3 + TARGET_HEIGHT
    parts = []
    for place, segment in enumerate(pack.segments):
        x, width = segment.start * scale, (segment.end - segment.start) * scale
        css = "pad" if segment.sample is None else f"s{place % COLOURS}"
        shape = (
            f'<rect class="{css}" x="{x:.2f}" y="0" width="{max(0.6, width - 0.8):.2f}" '
            f'height="{RIBBON_HEIGHT}"><title>{html.escape(_segment_name(segment))}</title></rect>'
        )
        inside = "".join(
            f'<rect class="image" x="{image.index * scale:.2f}" y="5" '
            f'width="{max(0.6, image.length * scale):.2f}" height="{RIBBON_HEIGHT - 10}"/>'
            for image in segment.images
        )
        link = f"#{_anchor(pack, segment)}"
        parts.append(f'<a href="{link}">{shape}{inside}</a>')
        parts += [
            f'<rect class="target" x="{token.index * scale:.2f}" y="{RIBBON_HEIGHT + 3}" '
            f'width="{max(0.8, scale):.2f}" height="{TARGET_HEIGHT}"/>'
            for token in segment.targets
        ]
    return (
        f'<svg class="ribbon" viewBox="0 0 {RIBBON_WIDTH} {height}" role="img" '
        f'aria-label="segments of pack {pack.number}">{"".join(parts)}</svg>'
    )


def _segment_name(segment: SegmentView) -> str:
    if segment.sample is None:
        return f"padding, {segment.end - segment.start} positions"
    return f"{segment.key}: {segment.start} to {segment.end - 1}"


def _anchor(pack: PackView, segment: SegmentView) -> str:
    return f"pack-{pack.number}-at-{segment.start}"


def _segment(
    pack: PackView, place: int, segment: SegmentView, pictures: Mapping[int, bytes]
) -> str:
    where = (
        f"{segment.start:,} to {segment.end - 1:,}, {segment.end - segment.start:,} positions, "
        f"position ids {segment.first_position} to {segment.last_position}"
    )
    anchor = _anchor(pack, segment)
    if segment.sample is None:
        return (
            f'<article class="segment pad" id="{anchor}"><header><b>padding</b>'
            f"<span>{where}, no loss, attends to itself alone</span></header></article>"
        )
    source = f"{segment.source} · " if segment.source else ""
    answers = ""
    if segment.answers:
        listed = ", ".join(segment.answers)
        answers = f'<p class="gold"><b>accepted answers</b> {html.escape(listed)}</p>'
    return (
        f'<article class="segment s{place % COLOURS}" id="{anchor}"><header>'
        f"<b>{html.escape(segment.key)}</b>"
        f"<span>{html.escape(source)}sample {segment.sample}{segment.extent} · "
        f"{where}</span></header>"
        f'<p class="tokens">{"".join(_part(part, pictures) for part in segment.parts)}</p>'
        f"{answers}</article>"
    )


def _part(part: TokenView | ImageView, pictures: Mapping[int, bytes]) -> str:
    if isinstance(part, ImageView):
        last = part.index + part.length - 1
        return (
            f'<span class="picture"><img alt="" src="{data_uri(pictures[part.image_id])}">'
            f"<small>image {part.image_id}<br>{part.width} x {part.height} {part.encoding}<br>"
            f"{part.index} to {last}<br>ids {part.first_position} to "
            f"{part.first_position + part.length - 1}</small></span>"
        )
    css = " ".join(name for name, on in (("special", part.special), ("target", part.target)) if on)
    mark = f' data-p="{part.position}"' if part.position % _ID_EVERY == 0 else ""
    kind = f' class="{css}"' if css else ""
    hint = f"index {part.index}, position id {part.position}, token {part.token}"
    if part.target:
        hint += ", trained"
    text = html.escape(_SHOWN.get(part.text, part.text))
    # A line break of the text is shown as a sign and breaks the line as well.
    tail = "<br>" if text == "\u23ce" else ""
    return f'<i{kind}{mark} title="{hint}">{text}</i>{tail}'
