"""Text from trained models: a decoder of its own with a cache of keys and values."""
