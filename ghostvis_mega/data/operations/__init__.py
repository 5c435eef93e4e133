"""Datasets from datasets: merge, split, sample and dedupe, all through one writer."""
