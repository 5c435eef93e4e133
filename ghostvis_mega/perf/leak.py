"""Whether one sample of a pack can be felt by the others: changes of the others, which must be
exactly zero.

A pack of four samples, three with a picture, goes through the real model. Then one sample gets
other text and another picture, and everything that belongs to the other three is compared bit by
bit: their logits, their loss, and the gradients of their loss with respect to every parameter and
to every embedding. Nothing may differ, in any precision.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ghostvis_mega.config.schema import RunConfig
from ghostvis_mega.data.batch import ImageSlot, MicroBatch
from ghostvis_mega.engine.build import build_chunks, build_encoder
from ghostvis_mega.model.dropout import Draw
from ghostvis_mega.model.inputs import model_input
from ghostvis_mega.parallel.groups import Groups
from ghostvis_mega.utils.figures import Figure, at_most, measured
from ghostvis_mega.utils.worst import worst as worst_of

IMAGE_TOKEN = 5
LENGTHS = (192, 320, 128, 384)
"""Whole blocks of 64 tokens: boundaries lie inside and between FP8's blocks of 128."""
ALIGNED = (128, 384, 128, 384)
"""Whole blocks of 128 tokens."""
PICTURES = {0: 9, 1: 17, 2: 3}
"""Where the picture of a sample starts, by number of the sample."""
UNIT = "max |difference|"
WARM_UP = 3
"""Passes before the measured one: delayed FP8 scaling takes its factors from them."""

_MODEL: dict[str, Any] = {
    "llm": {
        "num_layers": 4,
        "hidden_size": 512,
        "num_heads": 8,
        "num_kv_heads": 4,
        "head_dim": 64,
        "ffn_hidden_size": 1536,
        "vocab_size": 1024,
        "max_positions": 1024,
        "rope_base": 10000.0,
        "init_std": 0.04,
    },
    "vision": {
        "kind": "siglip",
        "num_layers": 2,
        "hidden_size": 128,
        "num_heads": 2,
        "ffn_hidden_size": 256,
        "image_size": 64,
        "patch_size": 8,
    },
    "connector": {"kind": "avgpool_mlp", "tokens_per_image": 16},
}


def leak_run(*, precision: str, fp8: str = "none") -> RunConfig:
    """The settings of the measured model; nothing of them is read from or written to disk."""
    return RunConfig.model_validate(
        {
            "model": _MODEL,
            "data": {"train": "unused", "seq_length": 1024},
            "batch": {"global_size": 1, "micro_size": 1},
            "deepspeed": {"llm": "unused"},
            "train": {"steps": 1, "seed": 7, "precision": precision, "fp8": fp8},
            "log": {"output": "unused"},
        }
    )


@dataclass(frozen=True)
class Pack:
    """Four samples in one row, and the pictures of the first three."""

    tokens_S: torch.Tensor
    pixels_N3hw: torch.Tensor
    lengths: tuple[int, ...]

    def span(self, sample: int) -> slice:
        """Positions of a sample in the row."""
        start = sum(self.lengths[:sample])
        return slice(start, start + self.lengths[sample])

    def changed(self, sample: int) -> "Pack":
        """With other text in one sample, and another picture if it shows one."""
        tokens_S, pixels = self.tokens_S.clone(), self.pixels_N3hw.clone()
        part = tokens_S[self.span(sample)]
        # Another token everywhere, and never the one that stands for pictures.
        part[part != IMAGE_TOKEN] = 8 + (part[part != IMAGE_TOKEN] - 8 + 501) % 1016
        if sample in PICTURES:
            pixels[sample] = 255 - pixels[sample]
        return Pack(tokens_S, pixels, self.lengths)


def make_pack(run: RunConfig, lengths: tuple[int, ...]) -> Pack:
    """Random text and pictures in samples of these lengths."""
    assert run.model.vision is not None
    generator = torch.Generator().manual_seed(1)
    tokens_S = torch.randint(8, 1024, (sum(lengths),), generator=generator)
    for sample, start in PICTURES.items():
        at = sum(lengths[:sample]) + start
        tokens_S[at : at + run.model.tokens_per_image] = IMAGE_TOKEN
    size = run.model.vision.image_size
    shape = (len(PICTURES), 3, size, size)
    pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return Pack(tokens_S, pixels, lengths)


def micro_batch(pack: Pack, *, silent: int | None, merged: int | None) -> MicroBatch:
    """The pack as the model reads it.

    Args:
        pack: Text and pictures.
        silent: Sample whose tokens are not trained.
        merged: Sample whose end is not marked, as a faulty packer would leave it.
    """
    tokens = pack.tokens_S
    weights, labels = torch.ones(len(tokens)), tokens.roll(-1)
    positions = torch.zeros_like(tokens)
    for sample, length in enumerate(pack.lengths):
        weights[pack.span(sample).stop - 1] = 0.0
        positions[pack.span(sample)] = torch.arange(length)
        if sample == silent:
            weights[pack.span(sample)] = 0.0
    weights[(tokens == IMAGE_TOKEN) | (labels == IMAGE_TOKEN)] = 0.0
    ends = [pack.span(sample).stop for sample in range(len(pack.lengths)) if sample != merged]
    boundaries = torch.tensor([0, *ends], dtype=torch.int32)
    return MicroBatch(
        tokens_BS=tokens[None],
        labels_BS=(labels * (weights > 0))[None],
        weights_BS=weights[None],
        positions_BS=positions[None],
        cu_seqlens=boundaries,
        max_seqlen=int(boundaries.diff().max()),
        images=tuple(
            ImageSlot(image_id=sample, row=0, start=pack.span(sample).start + start)
            for sample, start in PICTURES.items()
        ),
        sample_ids=tuple(range(len(pack.lengths))),
    )


class LeakProbe:
    """Runs packs through a model that is built anew each time, so that none has a history of its
    own.

    Args:
        run: From `leak_run`.
        groups: Of one process.
        device: Of this process.
    """

    def __init__(self, run: RunConfig, groups: Groups, *, device: torch.device):
        self.run, self.groups, self.device = run, groups, device
        self.dtype = torch.bfloat16 if run.train.precision == "bf16" else torch.float32

    def outcome(
        self, pack: Pack, *, silent: int | None = None, merged: int | None = None
    ) -> dict[str, torch.Tensor]:
        """Logits of each sample, the loss of all but `silent`, and that loss's gradients."""
        run, device = self.run, self.device
        (chunk,) = build_chunks(run, self.groups, device=device, dtype=self.dtype)
        encoder = build_encoder(run, device=device, dtype=self.dtype)
        assert encoder is not None
        named = {**dict(chunk.global_parameters()), **dict(encoder.named_parameters())}
        named = {name: p for name, p in named.items() if p.requires_grad}

        def run_pass(
            given: Pack, *, trained: bool
        ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            inputs = model_input(
                micro_batch(given, silent=silent, merged=merged),
                tokens_per_image=run.model.tokens_per_image,
                device=device,
                for_sdpa=chunk.backend == "cpu",
                dropout=Draw.of(run, step=0),
            )
            vision_NTH = encoder(given.pixels_N3hw.to(device))
            vision_NTH.retain_grad()
            hidden = chunk(inputs, vision_NTH.flatten(0, 1))
            if trained:
                chunk.loss_sum(hidden, inputs).backward()
            rows = torch.arange(len(given.tokens_S), device=device)
            logits_SV = chunk.logits(hidden.detach(), rows).detach()
            return logits_SV, chunk.loss_sum(hidden.detach(), inputs).detach(), vision_NTH

        base = make_pack(run, pack.lengths)
        for _ in range(WARM_UP if run.train.fp8 == "delayed" else 0):
            run_pass(base, trained=True)
            for parameter in named.values():
                parameter.grad = None
        logits_SV, loss, vision_NTH = run_pass(pack, trained=True)
        samples = range(len(pack.lengths))
        out = {f"logits of sample {n}": logits_SV[pack.span(n)] for n in samples}
        out["loss"] = loss
        gradients = vision_NTH.grad
        assert gradients is not None
        out |= {f"gradient of sample {n}'s picture": gradients[n].clone() for n in PICTURES}
        for name, parameter in named.items():
            if parameter.grad is not None:
                out[f"gradient of {name}"] = parameter.grad
        return out


def measure_leak(
    run: RunConfig,
    groups: Groups,
    *,
    device: torch.device,
    bar: float | None,
    lengths: tuple[int, ...] = LENGTHS,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Figure]:
    """Rows of name, value, unit, bar and ok: the largest change of what must not change.

    Args:
        run: From `leak_run`.
        groups: Of one process.
        device: Of this process.
        lengths: Tokens of each sample.
        bar: 0.0, or None for a recipe that couples samples by design; such rows have no verdict.
        progress: Told before each change what is being done.
    """
    probe = LeakProbe(run, groups, device=device)
    label = run.train.precision if run.train.fp8 == "none" else f"fp8 {run.train.fp8}"
    if lengths == ALIGNED:
        label += ", samples of whole 128-token blocks"
    pack = make_pack(run, lengths)
    worst: dict[str, tuple[float, str]] = {}
    repeat: dict[str, tuple[float, str]] = {}
    moves: list[tuple[str, float]] = []
    for sample in range(len(lengths)):
        progress(f"{label}: another sample {sample}")
        before = probe.outcome(pack, silent=sample)
        if sample == 0:
            _compare(before, probe.outcome(pack, silent=sample), repeat)
        after = probe.outcome(pack.changed(sample), silent=sample)
        own = f"logits of sample {sample}"
        moves.append((own, -float((before.pop(own) - after.pop(own)).float().abs().max())))
        if sample in PICTURES:
            # The other samples' loss must not depend on this picture at all.
            name = f"gradient of sample {sample}'s picture"
            _compare({name: torch.zeros_like(before[name])}, {name: before[name]}, worst)
        _compare(before, after, worst)
    progress(f"{label}: a boundary ignored")
    broken: dict[str, tuple[float, str]] = {}
    before = probe.outcome(pack, silent=0, merged=0)
    after = probe.outcome(pack.changed(0), silent=0, merged=0)
    _compare(
        {"logits": before["logits of sample 1"]}, {"logits": after["logits of sample 1"]}, broken
    )
    rows = []
    for kind in ("logits", "loss", "gradient"):
        value, name = worst[kind]
        # What is no number is not fine, also where samples are coupled by design.
        fine = (None if bar is None else value <= bar) if math.isfinite(value) else False
        suffix = f" ({name})" if value else ""
        name = f"{label}: {kind} of the other samples{suffix}"
        rows.append(measured(name, value, UNIT, bar=bar, ok=fine))
    _, value = worst_of((name, value) for value, name in repeat.values())
    # Negative: the sample that moved least is the worst.
    moved = -worst_of(moves)[1]
    rows.append(at_most(f"{label}: the same pack twice", value, UNIT, 0.0))
    leaked = broken["logits"][0]
    for name, value in (
        (f"{label}: the changed sample itself (must move)", moved),
        (f"{label}: control, a boundary ignored (must leak)", leaked),
    ):
        rows.append(measured(name, value, UNIT, ok=0.0 < value < math.inf))
    return rows


def _compare(
    before: dict[str, torch.Tensor],
    after: dict[str, torch.Tensor],
    worst: dict[str, tuple[float, str]],
) -> None:
    """Keep the largest absolute difference of each kind (first word of a name)."""
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        kind = name.split(" ", 1)[0]
        difference = float((tensor.double() - after[name].double()).abs().max())
        before_that = [worst[kind][::-1]] if kind in worst else []
        name, difference = worst_of([*before_that, (name, difference)])
        worst[kind] = (difference, name)
