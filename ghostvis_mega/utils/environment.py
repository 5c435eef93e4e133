"""Which versions a run used."""

import platform
from importlib import metadata

PACKAGES = (
    "ghostvis-mega",
    "torch",
    "megatron-core",
    "deepspeed",
    "transformers",
    "transformer-engine",
    "flash-attn",
    "liger-kernel",
    "numpy",
    "pillow",
    "sentencepiece",
    "tokenizers",
    "safetensors",
    "webdataset",
)


def package_versions() -> dict[str, str]:
    """Python and the packages that matter, those that are installed only; imports none of them."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
