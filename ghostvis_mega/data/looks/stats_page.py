"""Statistics of `data.stats` as one page: numbers first, then drawings, then tables."""

import html
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.looks import draw
from ghostvis_mega.data.looks.thumbnails import thumbnail
from ghostvis_mega.utils.format import percent, si
from ghostvis_mega.utils.html.page import facts, read_resource, render_page, section, tile
from ghostvis_mega.utils.html.pictures import data_uri

_KIND_COLOURS = {
    "image": "t3", "user": "t4", "assistant": "t1", "eos": "t2", "template": "t0",
}  # fmt: skip
_OTHER_COLOUR = "t5"


def dataset_pictures(dataset: Dataset, stats: Mapping[str, Any]) -> dict[int, bytes]:
    """The encoded pictures that the page shows."""
    return {row["image"]: thumbnail(dataset, row["image"]) for row in stats["top_images"]}


def render_stats(stats: Mapping[str, Any], pictures: Mapping[int, bytes]) -> str:
    """The whole page; statistics of a synthetic mix have no content to show."""
    has_content = "counts" in stats
    sections = [
        _header(stats),
        _tiles(stats),
        section("Bars", _bars(stats["bars"])),
        section("Lengths and packing", _charts(stats)),
        section("What the positions hold", _positions(stats)) if has_content else "",
        section("Sequences under each way of packing", _sequences(stats["packing"])),
        section(
            "Balance over data-parallel ranks",
            _balance(stats["balance"]),
            hint="Load of the most loaded rank over the mean rank: 1 is perfect, and 1.10 means "
            "that every step waits a tenth of its time. Naive: ranks take packs as they come. "
            "Assigned: as training deals them.",
        ),
    ]
    if has_content:
        sections += [
            section("Sources", _sources(stats["sources"])),
            section("Rejected rows", _rejects(stats["rejects"])),
            section("Most used pictures", _top_images(stats["top_images"], pictures)),
        ]
    return render_page(
        title=f"{_name(stats)} statistics",
        body="".join(sections),
        style=read_resource(__package__, "looks.css"),
    )


def _name(stats: Mapping[str, Any]) -> str:
    return PurePath(stats["path"]).name


def _header(stats: Mapping[str, Any]) -> str:
    missed = sum(not bar["ok"] for bar in stats["bars"])
    status = f"{missed} of {len(stats['bars'])} bars missed" if missed else "all bars met"
    css = "stopped" if missed else "ended"
    pairs = [
        ("Sequence", f"{stats['seq_length']:,} positions"),
        ("Image", f"{stats['tokens_per_image']} positions, {stats['patches_per_image']} patches"),
        ("Too long, left out", f"{stats['too_long']:,}"),
    ]
    if "counts" in stats:
        formats = ", ".join(f"{count:,} {name}" for name, count in stats["image_formats"].items())
        pairs += [
            ("Vocabulary", f"{stats['vocab_size']:,}"),
            ("Image files", formats or "none"),
            ("Samples stored twice or more", f"{stats['repeated_samples']:,}"),
        ]
    return (
        '<header><p class="brand">GhostVis-Mega <span>dataset statistics</span></p>'
        f"<h1>{html.escape(_name(stats))}"
        f'<span class="status {css}">{html.escape(status)}</span></h1>{facts(pairs)}</header>'
    )


def _tiles(stats: Mapping[str, Any]) -> str:
    best = stats["packing"]["balanced"]
    naive = stats["packing"]["pad-to-longest"]
    tiles = [
        tile(
            "Padding waste, balanced packing",
            percent(best["padding_waste"], 2),
            f"pad-to-longest: {percent(naive['padding_waste'])}",
            css="main",
        )
    ]
    if "counts" not in stats:
        tiles.append(tile("Samples", si(stats["samples"]), "synthetic lengths"))
    else:
        counts = stats["counts"]
        tiles += [
            tile(
                "Samples",
                f"{counts['samples']:,}",
                f"{stats['text_only_samples']:,} of text only · {counts['rejected']:,} rejected",
            ),
            tile("Images", f"{counts['images']:,}", f"{stats['samples_per_image']:g} samples each"),
            tile(
                "Positions",
                si(sum(stats["tokens"].values())),
                f"{percent(stats['trained_share'])} of them trained",
            ),
        ]
    speedup = stats["packing"]["none"]["positions"] / best["positions"]
    below = f"at least {best['lower_bound']:,}, {speedup:.1f}x fewer positions than one each"
    tiles.append(tile("Sequences", f"{best['sequences']:,}", below))
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _bars(bars: Sequence[Mapping[str, Any]]) -> str:
    rows = "".join(
        f'<tr class="{"good" if bar["ok"] else "bad"}"><td class="verdict"><span>'
        f"{'ok' if bar['ok'] else 'missed'}</span></td><th>{html.escape(bar['name'])}</th>"
        f"<td><b>{bar['value']:.4f}</b></td><td>at most {bar['limit']:g}</td></tr>"
        for bar in bars
    )
    return f'<table class="wide bars"><tbody>{rows}</tbody></table>'


def _charts(stats: Mapping[str, Any]) -> str:
    lengths, best = stats["length_histogram"], stats["packing"]["balanced"]
    counts, mean = best["fill_histogram"], stats["length"]["mean"]
    bound = 1 - best["bound_waste"]
    edges = [number / len(counts) for number in range(len(counts) + 1)]
    charts = [
        draw.figure(
            "Sample length, images expanded",
            draw.histogram(
                lengths["edges"],
                lengths["counts"],
                label="samples by length",
                marks=[(mean, f"mean {mean:.0f}")],
            ),
            note=f"median {stats['length']['p50']:g}, longest {stats['length']['max']:,}",
        ),
        draw.figure(
            "How full the sequences are",
            draw.histogram(
                edges,
                counts,
                label="sequences by fullness",
                text=lambda value: f"{100 * value:.0f} %",
                marks=[(bound, f"best possible mean {percent(bound, 2)}")],
                css="c3",
            ),
            note=f"balanced, mean {percent(best['fill'], 2)}",
        ),
        draw.figure("Padding waste of each way of packing", _waste(stats["packing"])),
    ]
    if stats.get("resolutions"):
        charts.append(
            draw.figure(
                "Resolution of the pictures",
                draw.scatter(stats["resolutions"], label="pictures by width and height"),
                note=f"width by height in pixels, {stats['distinct_resolutions']:,} different",
            )
        )
    return f'<div class="charts">{"".join(charts)}</div>'


def _waste(packing: Mapping[str, Any]) -> str:
    rows = [
        (
            name,
            each["padding_waste"],
            percent(each["padding_waste"], 2),
            "c3" if name == "balanced" else "c5",
        )
        for name, each in packing.items()
    ]
    bound = packing["balanced"]["bound_waste"]
    rows.append(("lower bound", bound, percent(bound, 3), "c1"))
    return draw.meter_rows(rows, most=1.0)


def _positions(stats: Mapping[str, Any]) -> str:
    kinds = stats["tokens"]
    text = sum(kinds.values()) - kinds["image"]
    trained = sum(source["trained_tokens"] for source in stats["sources"])
    total = sum(kinds.values())
    roles = [
        (_kind_name(name), amount, f"{amount:,}", _KIND_COLOURS.get(name, _OTHER_COLOUR))
        for name, amount in sorted(kinds.items(), key=lambda item: -item[1])
    ]
    modality = [
        ("image", kinds["image"], f"{kinds['image']:,}", "t3"),
        ("text", text, f"{text:,}", "t4"),
    ]
    loss = [
        ("trained", trained, f"{trained:,}", "t1"),
        ("context only", total - trained, f"{total - trained:,}", "t0"),
    ]
    panels = (("By role", roles), ("By modality", modality), ("Under the loss", loss))
    return "".join(
        f'<div class="panel shares"><h3>{name}</h3>{draw.shares(parts)}</div>'
        for name, parts in panels
    )


def _kind_name(name: str) -> str:
    return {"eos": "end of turn", "template": "template (headers)"}.get(name, name)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column names the row."""
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join(
        f"<tr><th>{html.escape(row[0])}</th>"
        f"{''.join(f'<td>{html.escape(cell)}</td>' for cell in row[1:])}</tr>"
        for row in rows
    )
    return f'<table class="wide"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'


def _mean_sd(values: Mapping[str, float]) -> str:
    digits = 0 if values["mean"] >= 1000 else 1
    return f"{values['mean']:,.{digits}f} ± {values['sd']:,.{digits}f}"


def _sequences(packing: Mapping[str, Any]) -> str:
    rows = [
        [
            name,
            f"{each['sequences']:,}",
            percent(each["padding_waste"], 2),
            _mean_sd(each["samples_per_sequence"]),
            _mean_sd(each["images_per_sequence"]),
            _mean_sd(each["distinct_images_per_sequence"]),
            _mean_sd(each["patches_per_sequence"]),
        ]
        for name, each in packing.items()
    ]
    head = ["", "sequences", "padding", "samples each", "images each", "distinct", "patches each"]
    return _table(head, rows)


def _balance(rows: Sequence[Mapping[str, Any]]) -> str:
    def cell(value: float) -> str:
        # Ink grows with what is lost to waiting, up to a half.
        return (
            f'<td class="load"><i style="width:{min(100.0, 200 * (value - 1)):.1f}%"></i>'
            f"<span>{value:.3f}</span></td>"
        )

    body = "".join(
        f"<tr><th>{row['data_parallel']} ranks</th><td>{row['global_size']:,}</td>"
        f"<td>{row['steps']}</td>{cell(row['naive']['tower'])}{cell(row['assigned']['tower'])}"
        f"{cell(row['naive']['total'])}{cell(row['assigned']['total'])}</tr>"
        for row in rows
    )
    return (
        '<table class="wide balance"><thead><tr><th></th><th>sequences a step</th><th>steps</th>'
        "<th>tower, naive</th><th>tower, assigned</th><th>total, naive</th>"
        f"<th>total, assigned</th></tr></thead><tbody>{body}</tbody></table>"
    )


def _sources(sources: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [
            source["name"],
            source["license"] or "-",
            f"{source['samples']:,}",
            f"{source['rejected']:,}",
            f"{source['text_tokens']:,}",
            f"{source['image_positions']:,}",
            f"{source['trained_tokens']:,}",
        ]
        for source in sources
    ]
    head = ["", "license", "samples", "rejected", "text tokens", "image positions", "trained"]
    return _table(head, rows)


def _rejects(rejects: Mapping[str, int]) -> str:
    if not rejects:
        return '<p class="panel none">No row was rejected.</p>'
    rows = [(reason, count, f"{count:,}", "c2") for reason, count in rejects.items()]
    return f'<div class="panel">{draw.meter_rows(rows, most=max(rejects.values()))}</div>'


def _top_images(images: Sequence[Mapping[str, int]], pictures: Mapping[int, bytes]) -> str:
    cards = "".join(
        f'<figure class="thumb"><img alt="" src="{data_uri(pictures[row["image"]])}">'
        f"<figcaption>image {row['image']}<b>{row['places']:,} places</b></figcaption></figure>"
        for row in images
        if row["image"] in pictures
    )
    return f'<div class="thumbs">{cards}</div>' if cards else ""
