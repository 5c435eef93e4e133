"""Self-contained pages: the shell that loads nothing from outside, a style, drawing helpers."""
