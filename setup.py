"""Package metadata. The version lives in `ghostvis_mega/__init__.py`, once."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent

REQUIRED = [
    # Parity of the parallel layouts is measured up to 2.14; raise the cap with a new measurement.
    "torch>=2.11,<2.15",
    # Internals of this minor release are replaced on machines without CUDA: see parallel/.
    "megatron-core==0.19.*",
    "deepspeed>=0.19.8",
    "transformers>=5.16",
    "safetensors",
    "sentencepiece",
    "tokenizers",
    "pillow>=12.3",
    "webdataset",
    "pydantic>=2.11",
    "typer",
    "rich",
    "numpy",
    "pyyaml",
]

EXTRAS = {
    "gpu": ["transformer-engine[pytorch]"],
    "wandb": ["wandb"],
    "tensorboard": ["tensorboard"],
    "demo": ["easy-vqa"],
    "data": ["pyarrow", "tiktoken"],
    "gguf": ["gguf"],
    "dev": [
        "pytest>=8.4",
        "pytest-timeout",
        "hypothesis",
        # New minor releases of ruff bring new findings; the same checkout must stay clean.
        "ruff==0.17.*",
        "tensorboard",
        "pyarrow",
        "tiktoken",
        # Loads what `convert quantize` writes.
        "compressed-tensors",
        # Loads GGUF files in transformers, to compare with.
        "accelerate",
        "gguf",
    ],
}


def read_version() -> str:
    """Version of the package, read without importing it (its imports may not be installed yet)."""
    text = (ROOT / "ghostvis_mega" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, flags=re.MULTILINE)
    if match is None:
        raise RuntimeError('ghostvis_mega/__init__.py has no line __version__ = "..."')
    return match.group(1)


setup(
    name="ghostvis-mega",
    version=read_version(),
    description="Vision-language training on Megatron-Core layers, DeepSpeed ZeRO and a "
    "data-parallel vision tower",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.12",
    packages=find_packages(include=["ghostvis_mega", "ghostvis_mega.*", "tools", "tools.*"]),
    package_data={"ghostvis_mega": ["**/*.css", "**/*.js", "**/*.yaml", "**/*.json"]},
    install_requires=REQUIRED,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["ghostvis=ghostvis_mega.cli.main:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
