"""GhostVis-Mega: vision-language training with Megatron-Core, DeepSpeed and a spread tower."""

__version__ = "0.1.0"
