"""Packed sequences for a terminal (trained text in [brackets], in colour where that works), or as
JSON."""

from typing import Any

from ghostvis_mega.data.looks.pack_view import ImageView, PackView, SegmentView

_BOLD, _END, _DIM = "\x1b[1m", "\x1b[0m", "\x1b[2m"
_COLOURS = (34, 36, 35, 33, 31, 32)


def pack_text(pack: PackView, *, colour: bool) -> str:
    """One pack, a few lines a sample."""
    share = 100 * pack.used / pack.seq_length
    samples = sum(segment.sample is not None for segment in pack.segments)
    lines = [
        f"pack {pack.number}: {pack.used} of {pack.seq_length} positions ({share:.2f} %), "
        f"{samples} samples, {len(pack.images)} image places, {pack.weight:.0f} trained tokens",
        "cu_seqlens " + " ".join(str(border) for border in pack.cu_seqlens),
    ]
    for place, segment in enumerate(pack.segments):
        lines += _segment(segment, _COLOURS[place % len(_COLOURS)] if colour else None)
    return "\n".join(lines)


def _segment(segment: SegmentView, colour: int | None) -> list[str]:
    start, end = ("", "") if colour is None else (f"\x1b[{colour}m", _END)
    where = f"{segment.start:>6} to {segment.end - 1}"
    ids = f"position ids {segment.first_position} to {segment.last_position}"
    if segment.sample is None:
        return [f"{where}  padding, {ids}"]
    sample = f"sample {segment.sample}{segment.extent}"
    head = f"{start}{where}  {_printable(segment.key)}{end}  {sample}, {ids}"
    return [head, "         " + _tokens(segment, colour is not None)]


def _tokens(segment: SegmentView, colour: bool) -> str:
    text, inside = "", False
    for part in segment.parts:
        target = not isinstance(part, ImageView) and part.target
        if target != inside:
            text += "[" if target else "]"
            inside = target
        if isinstance(part, ImageView):
            text += f"<image {part.image_id}: {part.width}x{part.height}, {part.length} positions>"
            continue
        piece = _printable("\\n" if part.text in ("<0x0A>", "\n") else part.text)
        if colour and (target or part.special):
            piece = f"{_BOLD if target else _DIM}{piece}{_END}"
        text += piece
    return text + ("]" if inside else "")


def _printable(text: str) -> str:
    """Control characters would move the cursor or change the terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def pack_json(pack: PackView) -> dict[str, Any]:
    """One pack for other programs; positions count from the begin of the pack."""
    return {
        "pack": pack.number,
        "seq_length": pack.seq_length,
        "used": pack.used,
        "trained_tokens": int(pack.weight),
        "cu_seqlens": list(pack.cu_seqlens),
        "max_seqlen": pack.max_seqlen,
        "segments": [
            {
                "start": segment.start,
                "end": segment.end,
                "sample": segment.sample,
                "key": segment.key,
                "source": segment.source,
                "stored_tokens": list(segment.piece) if segment.piece else None,
                "trained_positions": [part.index for part in segment.targets],
                "images": [
                    {"image": image.image_id, "start": image.index, "length": image.length}
                    for image in segment.images
                ],
            }
            for segment in pack.segments
        ],
    }
