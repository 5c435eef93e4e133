"""Small inputs reach the device whatever their strides are."""

from unittest import mock

import pytest
import torch

from ghostvis_mega.utils.transfer import to_device

CUDA = torch.device("cuda")


def pinned(x: torch.Tensor) -> torch.Tensor:
    """As PyTorch pins: the same strides in other memory, filled by a copy."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(x)


@pytest.mark.parametrize(
    "x", [torch.arange(6), torch.arange(6).expand(4, 6), torch.arange(6).view(2, 3).t()]
)
def test_what_is_pinned_may_have_any_strides(x: torch.Tensor) -> None:
    with (
        mock.patch.object(torch.Tensor, "pin_memory", pinned),
        mock.patch.object(torch.Tensor, "to", lambda x, *_, **__: x),
    ):
        assert to_device(x, CUDA).equal(x)


def test_pytorch_itself_refuses_memory_that_is_shown_twice() -> None:
    with pytest.raises(RuntimeError, match="single memory location"):
        pinned(torch.arange(6).expand(4, 6))


def test_on_a_cpu_nothing_is_copied() -> None:
    x = torch.arange(6).expand(4, 6)
    assert to_device(x, torch.device("cpu")) is x
