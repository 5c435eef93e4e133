"""Quantisation of linear layers: INT8 and FP8 weights, activations scaled token by token.

The numbers are those of compressed-tensors, which transformers, vLLM and SGLang read: a weight has
one fp32 scale an output channel, an input one a token, taken from what is in it. Engines differ in
the last bit of a dynamic INT8 scale (absmax / 127.5 here and in transformers).
"""

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ghostvis_mega.utils.errors import CheckpointError

DEFAULT_SKIP = ("re:.*lm_head", "re:.*vision_tower.*", "re:.*multi_modal_projector.*")
"""Head, tower and connector: little of the weight, much of the error."""


@dataclass(frozen=True)
class Scheme:
    """One way to quantise."""

    name: str
    dtype: torch.dtype
    code: str
    """Of the file format."""
    largest: float
    """What the greatest weight of a channel becomes."""
    input_range: float
    """What the greatest input of a token becomes."""
    kind: str
    format: str

    def weight(self, weight_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantised rows and their scales [O, 1], fp32; rows are independent of each other."""
        rows = weight_OI.float()
        absmax_O1 = rows.abs().amax(dim=1, keepdim=True)
        scale_O1 = (absmax_O1 / self.largest).clamp(min=torch.finfo(torch.float32).tiny)
        return self._round(rows / scale_O1), scale_O1

    def inputs(self, x: torch.Tensor) -> torch.Tensor:
        """Inputs as the quantised layer sees them, each token with a scale of its own."""
        scale = x.abs().amax(dim=-1, keepdim=True) / self.input_range
        scale = torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)
        return self._round(x / scale).to(x.dtype) * scale

    def _round(self, x: torch.Tensor) -> torch.Tensor:
        if self.dtype == torch.int8:
            return x.round().clamp(-128, 127).to(torch.int8)
        return x.clamp(-self.largest, self.largest).to(self.dtype)

    def config(self, ignore: Sequence[str]) -> dict[str, Any]:
        """`quantization_config` of config.json."""
        numbers = {"num_bits": 8, "type": self.kind, "symmetric": True}
        return {
            "quant_method": "compressed-tensors",
            "format": self.format,
            "quantization_status": "compressed",
            "ignore": list(ignore),
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {**numbers, "strategy": "channel", "dynamic": False},
                    "input_activations": {**numbers, "strategy": "token", "dynamic": True},
                }
            },
        }


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("int8", torch.int8, "I8", 127.0, 127.5, "int", "int-quantized"),
        Scheme("fp8", torch.float8_e4m3fn, "F8_E4M3", 448.0, 448.0, "float", "float-quantized"),
    )
}
"""INT8 for Turing to Hopper, FP8 for Ada, Hopper and Blackwell GPUs."""


def patterns(skip_modules: Sequence[str]) -> tuple[str, ...]:
    """Names to leave alone as compressed-tensors writes them: `re:...`; shell patterns become such,
    each for modules of that name and what is inside of them.

    Raises:
        CheckpointError: A pattern is no regular expression.
    """
    found = []
    for pattern in skip_modules:
        text = pattern.removeprefix("re:")
        if not pattern.startswith("re:"):
            text = fnmatch.translate(pattern).removeprefix("(?s:").removesuffix(r")\z")
            # Readers match beginnings: without an end `*layers.1` would be `layers.10` as well.
            text = text.removesuffix(r")\Z") + r"(\..*)?$"
        try:
            re.compile(text)
        except re.error as error:
            raise CheckpointError(f"--skip {pattern} is no pattern: {error}") from error
        found.append(f"re:{text}")
    return tuple(found)


def is_skipped(module: str, ignore: Sequence[str]) -> bool:
    """Whether a module of this name stays as it is."""
    return any(re.match(pattern.removeprefix("re:"), module) for pattern in ignore)


class FakeQuantLinear(nn.Module):
    """A linear layer that computes with the rounded numbers of a quantised one."""

    def __init__(self, linear: nn.Linear, scheme: Scheme):
        super().__init__()
        quantised, scale_O1 = scheme.weight(linear.weight.detach())
        self.scheme = scheme
        self.register_buffer("weight", (quantised.float() * scale_O1).to(linear.weight.dtype))
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.scheme.inputs(x), self.weight, self.bias)


def quantize_model_int8(
    model: nn.Module, *, skip_modules: Sequence[str] = DEFAULT_SKIP, scheme: str = "int8"
) -> list[str]:
    """Let a model compute as its quantised export will, in place; for accuracy before serving.

    Args:
        model: Any module; its linear layers are replaced.
        skip_modules: Patterns of modules that stay as they are.
        scheme: `int8` or `fp8`.

    Returns:
        Names of the layers that were replaced.
    """
    chosen, ignore = find_scheme(scheme), patterns(skip_modules)
    replaced = []
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and not is_skipped(name, ignore):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, FakeQuantLinear(module, chosen))
            replaced.append(name)
    return replaced


def find_scheme(name: str) -> Scheme:
    """A scheme by name.

    Raises:
        CheckpointError: There is none of this name.
    """
    if name not in SCHEMES:
        raise CheckpointError(f"--scheme {name} is unknown: use {' or '.join(SCHEMES)}")
    return SCHEMES[name]
