"""GhostVis-Mega: vision-language training on Megatron-Core layers, DeepSpeed ZeRO and a data-parallel tower."""

__version__ = "0.1.0"
