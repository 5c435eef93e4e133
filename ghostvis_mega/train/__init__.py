"""The loop and what surrounds it: metrics, console, previews, report."""
