"""Prepared datasets in the formats of other programs."""
