"""Everything that can be known to be wrong before the first process group: one report.

Settings, DeepSpeed files and datasets are read; torch is not imported, so the answer comes within
a second or two.
"""

import importlib.util
import logging
import os
from collections.abc import Iterable
from pathlib import Path

from ghostvis_mega.config import deepspeed, rules
from ghostvis_mega.config.load import read_run_config
from ghostvis_mega.config.rules import Device
from ghostvis_mega.config.schema import RunConfig
from ghostvis_mega.data import manifest as datasets
from ghostvis_mega.engine.memory import refusal, unpredictable
from ghostvis_mega.utils.determinism import environment_problems
from ghostvis_mega.utils.errors import ConfigError
from ghostvis_mega.utils.files import sha256_file
from ghostvis_mega.utils.hardware import has_cuda_device

log = logging.getLogger(__name__)


def load_checked(
    path: str | Path,
    overrides: Iterable[str] = (),
    *,
    world_size: int,
    device: Device | None = None,
) -> RunConfig:
    """Load a run's settings and check everything about it.

    Args:
        path: YAML file.
        overrides: Items `section.key=value`.
        world_size: Number of processes.
        device: Where it will run; by default on this machine, as `train.device` says.

    Raises:
        ConfigError: With all problems of all kinds.
    """
    loaded = read_run_config(path, overrides)
    problems = list(loaded.problems)
    if loaded.config is not None:
        if device is None:
            on_gpu = loaded.config.train.device != "cpu" and has_cuda_device()
            device = "cuda" if on_gpu else "cpu"
        found = find_problems(loaded.config, world_size=world_size, device=device)
        problems += loaded.keep_sound(found)
    if problems or loaded.config is None:
        raise ConfigError(problems)
    return loaded.config


def check_run(cfg: RunConfig, *, world_size: int, device: Device) -> None:
    """Check a loaded run.

    Raises:
        ConfigError: With all problems.
    """
    problems = find_problems(cfg, world_size=world_size, device=device)
    if problems:
        raise ConfigError(problems)


def find_problems(cfg: RunConfig, *, world_size: int, device: Device) -> list[str]:
    """Broken rules, contradicting DeepSpeed files, unusable datasets and outputs, as sentences."""
    return [
        *rules.find_problems(cfg, world_size=world_size, device=device),
        *deepspeed.find_problems(cfg, world_size=world_size),
        *_data_problems(cfg),
        *_output_problems(cfg),
        *_gpu_problems(cfg, device=device),
        *_memory_problems(cfg, world_size=world_size, device=device),
        *(environment_problems(os.environ) if cfg.train.deterministic else ()),
    ]


def _gpu_problems(cfg: RunConfig, *, device: Device) -> list[str]:
    """What a run on GPUs lacks on this machine; a plan for another machine is not held to it."""
    if device != "cuda":
        return []
    problems = []
    if has_cuda_device() and importlib.util.find_spec("transformer_engine") is None:
        problems.append(
            "train.device: a run on GPUs needs Transformer Engine, which is not installed: "
            "pip install -e '.[gpu]', or hide the GPU (CUDA_VISIBLE_DEVICES='' DS_ACCELERATOR=cpu)."
        )
    if cfg.train.precision == "fp32" and cfg.data.packing:
        problems.append(
            "train.precision=fp32 with data.packing=true on CUDA: the fused attention kernels for "
            "packed sequences compute in BF16 only. Use train.precision=bf16, with ZeRO stage 1, 2 "
            "or 3."
        )
    return problems


def _memory_problems(cfg: RunConfig, *, world_size: int, device: Device) -> list[str]:
    """A choice by memory that nobody can make."""
    if device != "cuda" or cfg.train.recompute != "auto":
        return []
    why = unpredictable(cfg, world_size=world_size)
    return [refusal(why)] if why else []


def _data_problems(cfg: RunConfig) -> list[str]:
    problems = datasets.find_problems(cfg.data.train, what="data.train")
    train = None if problems else datasets.read_manifest(cfg.data.train)
    if train is not None:
        problems += _model_fit_problems(cfg, train)
        if cfg.data.blend:
            problems += _blend_problems(cfg, train)
        else:
            problems += _content_problems(cfg, train)
    if cfg.data.heldout is None or cfg.data.heldout == cfg.data.train:
        return problems
    found = datasets.find_problems(cfg.data.heldout, what="data.heldout")
    if train is not None and not found:
        found = _heldout_problems(cfg, train, datasets.read_manifest(cfg.data.heldout))
    return problems + found


def _model_fit_problems(cfg: RunConfig, train: datasets.Manifest) -> list[str]:
    problems = []
    size, room = train.tokenizer.vocab_size, cfg.model.llm.vocab_tokens
    if size > room:
        less = " - vocab_padding" if cfg.model.llm.vocab_padding else ""
        problems.append(
            f"model.llm.vocab_size{less}={room} is smaller than the tokenizer of data.train="
            f"{cfg.data.train}, which has {size} tokens. Use at least {size}, or tokenise the data "
            "with another tokenizer."
        )
    if cfg.data.tokenizer is not None:
        if not cfg.data.tokenizer.is_file():
            problems.append(
                f"data.tokenizer={cfg.data.tokenizer} is not a file. Remove it to use the "
                "dataset's own."
            )
        elif sha256_file(cfg.data.tokenizer) != train.tokenizer.sha256:
            problems.append(
                f"data.tokenizer={cfg.data.tokenizer} is not the tokenizer that made data.train="
                f"{cfg.data.train}: its token ids would mean other words. Remove it, or tokenise "
                "the data again with it."
            )
    return problems


def _content_problems(cfg: RunConfig, train: datasets.Manifest) -> list[str]:
    problems = []
    counts = train.counts
    if counts.images and cfg.model.vision is None:
        problems.append(
            f"data.train={cfg.data.train} holds {counts.images} images, but the model has no "
            "vision part. Use a preset with one (vlm_...), or a text dataset."
        )
    if not counts.images and set(cfg.trained_modules) and "llm" not in cfg.trained_modules:
        problems.append(
            f"data.train={cfg.data.train} holds no image, but train.freeze leaves only vision "
            "parts to train. Use a dataset with images, or do not freeze llm."
        )
    if counts.trained_tokens == 0:
        problems.append(
            f"data.train={cfg.data.train} has no trained token: the loss would be empty. Ingest "
            "it with turns of the assistant."
        )
    if cfg.batch.global_size > counts.samples:
        problems.append(
            f"batch.global_size={cfg.batch.global_size} exceeds the {counts.samples} samples of "
            f"data.train={cfg.data.train}. Use at most {counts.samples}, or more data."
        )
    return problems


def _blend_problems(cfg: RunConfig, train: datasets.Manifest) -> list[str]:
    """Datasets of a blend that cannot be used, or not together."""
    problems: list[str] = []
    manifests = {cfg.data.train: train}
    for place, entry in enumerate(cfg.data.blend):
        if entry.path in manifests:
            continue
        name = f"data.blend[{place}].path"
        found = datasets.find_problems(entry.path, what=name)
        problems += found
        if found:
            continue
        manifests[entry.path] = other = datasets.read_manifest(entry.path)
        if other.tokenizer.sha256 != train.tokenizer.sha256:
            problems.append(
                f"{name}={entry.path} was tokenised with another tokenizer than data.train="
                f"{cfg.data.train}. Ingest it again with the tokenizer of data.train."
            )
        if other.template.writes != train.template.writes:
            problems.append(
                f"{name}={entry.path} uses the chat template {other.template.name}, data.train the "
                f"template {train.template.name}. Ingest both with the same one."
            )
        if other.digest == train.digest:
            problems.append(
                f"{name}={entry.path} is a copy of data.train={cfg.data.train}. Remove it and add "
                "its weight to data.train's."
            )
    counts = {path: manifest.counts for path, manifest in manifests.items()}
    for path, count in counts.items():
        if count.images and cfg.model.vision is None:
            problems.append(
                f"{path} in data.blend holds {count.images} images, but the model has no vision "
                "part. Use a preset with one (vlm_...), or a text dataset."
            )
        if count.trained_tokens == 0:
            problems.append(
                f"{path} in data.blend has no trained token: batches of it would have an empty "
                "loss. Ingest it with turns of the assistant, or remove it."
            )
    images = sum(count.images for count in counts.values())
    if not problems and not images and "llm" not in cfg.trained_modules:
        problems.append(
            "data.blend holds no image, but train.freeze leaves only vision parts to train. Add a "
            "dataset with images, or do not freeze llm."
        )
    return problems


def _heldout_problems(
    cfg: RunConfig, train: datasets.Manifest, heldout: datasets.Manifest
) -> list[str]:
    problems = []
    if heldout.tokenizer.sha256 != train.tokenizer.sha256:
        problems.append(
            f"data.heldout={cfg.data.heldout} was tokenised with another tokenizer than data.train="
            f"{cfg.data.train}. Ingest it again with the tokenizer of data.train."
        )
    if heldout.template.writes != train.template.writes:
        problems.append(
            f"data.heldout={cfg.data.heldout} uses the chat template {heldout.template.name}, "
            f"data.train the template {train.template.name}. Ingest both with the same one."
        )
    if heldout.digest == train.digest:
        problems.append(
            f"data.heldout={cfg.data.heldout} is a copy of data.train: an accuracy on it would be "
            "of learning by heart. Name another dataset."
        )
    return problems


def _output_problems(cfg: RunConfig) -> list[str]:
    problems = []
    output = cfg.log.output
    blocked = next((p for p in (output, *output.parents) if p.exists() and not p.is_dir()), None)
    if blocked is not None:
        problems.append(
            f"log.output={output} cannot be a directory: {blocked} is a file. Name another place."
        )
    resume = cfg.checkpoint.resume
    if resume not in ("auto", "none") and not (Path(resume) / "manifest.json").is_file():
        problems.append(
            f"checkpoint.resume={resume} is no checkpoint: it has no manifest.json. Name one such "
            "as runs/NAME/checkpoints/step-00001000, or use auto or none."
        )
    weights = cfg.checkpoint.weights
    if weights is not None and not (weights / "manifest.json").is_file():
        problems.append(
            f"checkpoint.weights={weights} is no checkpoint: it has no manifest.json. Name one "
            "such as runs/NAME/checkpoints/step-00001000, or remove it."
        )
    if cfg.checkpoint.weights_of and weights is None:
        problems.append(
            "checkpoint.weights_of without checkpoint.weights has no effect. Name the checkpoint, "
            "or remove it."
        )
    off = {"tensorboard": "false", "wandb": "disabled"}
    wanted = {"tensorboard": cfg.log.tensorboard, "wandb": cfg.log.wandb != "disabled"}
    for package, on in wanted.items():
        if on and importlib.util.find_spec(package) is None:
            problems.append(
                f"log.{package} needs the package {package}, which is not installed: "
                f"pip install -e '.[{package}]', or set log.{package} to {off[package]}."
            )
    return problems
