"""Prepared datasets and how they become batches; knows nothing of models or ranks' devices."""
