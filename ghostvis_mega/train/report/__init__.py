"""One self-contained HTML page that shows a run: numbers, curves, timing, answers, settings."""

from ghostvis_mega.train.report.observer import HtmlReport

__all__ = ["HtmlReport"]
