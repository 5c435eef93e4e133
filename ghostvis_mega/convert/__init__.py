"""Weights from and to Hugging Face directories."""
