"""The shell of a page that stands alone: one file, no request, no script but its own."""

import base64
import hashlib
import html
from importlib import resources


def render_page(*, title: str, body: str, style: str = "", script: str = "") -> str:
    """A whole page around `body` as one HTML text.

    Args:
        title: plain text, escaped here.
        body: finished markup; its texts are escaped by whoever wrote it.
        style: CSS after the common style.
        script: the page's own script, if any.
    """
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; {_scripts(script)}"
    # Should an escape ever be missed, the browser still runs no script but ours and loads nothing.
    policy += "; base-uri 'none'; form-action 'none'"
    tail = f"<script>{script}</script>" if script else ""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{html.escape(policy)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{html.escape(title)} - GhostVis-Mega</title>"
        f"<style>{read_resource(__package__, 'base.css')}{style}</style></head>"
        f"<body><main>{body}</main>{tail}</body></html>\n"
    )


def _scripts(script: str) -> str:
    if not script:
        return "script-src 'none'"
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    return f"script-src 'sha256-{digest}'"


def read_resource(package: str, name: str) -> str:
    """Text of a style or script that lies beside the modules of `package`."""
    return (resources.files(package) / name).read_text(encoding="utf-8")


def section(title: str, body: str, *, hint: str = "") -> str:
    """A headed part of the page, or nothing without a body."""
    note = f'<p class="lead">{html.escape(hint)}</p>' if hint else ""
    return f"<section><h2>{html.escape(title)}</h2>{note}{body}</section>" if body else ""


def tile(label: str, value: str, below: str, *, css: str = "", extra: str = "") -> str:
    """One number with its name above and what it means below; `extra` is finished markup."""
    return (
        f'<div class="tile {css}"><p class="label">{html.escape(label)}</p>'
        f'<p class="value">{html.escape(value)}</p>{extra}'
        f'<p class="below">{html.escape(below)}</p></div>'
    )


def facts(pairs: list[tuple[str, str]]) -> str:
    """A line of named values."""
    cells = "".join(
        f"<div><dt>{html.escape(label)}</dt><dd>{html.escape(value)}</dd></div>"
        for label, value in pairs
    )
    return f'<dl class="facts">{cells}</dl>'
