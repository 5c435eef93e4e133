"""What a layer of the vision tower is computed with: Transformer Engine's kernels, or PyTorch's.

Matrices are [rows, width]; weights [out, in], biases [out]. Nothing here is seen by autograd: the
functions of `vision_layer` call each kernel where its turn is.

Shape legend: R rows (images x patches), I and O widths of a matrix product's input and output.
"""

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}
"""By transformers' `hidden_act`."""
_FUSED_ACTIVATION = "gelu_pytorch_tanh"
"""What cuBLASLt calls GELU."""

Norm = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Normalised rows, and mean and reciprocal standard deviation of each."""


class LayerKernels(Protocol):
    """Forward and backward of the operations of a layer."""

    def norm(
        self, x_RI: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, eps: float
    ) -> Norm:
        """LayerNorm over the width."""

    def norm_backward(
        self, d_RI: torch.Tensor, x_RI: torch.Tensor, norm: Norm, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of its input, weight and bias; `norm` is what `norm` returned."""

    def linear(self, x_RI: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Matrix product and bias: [R, O]."""

    def linear_activated(
        self, x_RI: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, name: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same through activation `name`, and as it was before: [R, O] both."""

    def input_gradient(self, d_RO: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Of `linear`: [R, I]."""

    def activated_gradient(
        self, d_RO: torch.Tensor, weight: torch.Tensor, before_RI: torch.Tensor, *, name: str
    ) -> torch.Tensor:
        """Of `linear` and the activation in front of it, from what came into that: [R, I]."""

    def weight_gradient(
        self,
        d_RO: torch.Tensor,
        x_RI: torch.Tensor,
        bias: torch.Tensor,
        total: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Of `linear`'s weight and bias; the weight's is added to `total` where there is one, an
        fp32 [O, I], and None then."""


class PlainKernels:
    """PyTorch's, for every device and dtype."""

    def norm(
        self, x_RI: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, eps: float
    ) -> Norm:
        """PyTorch's."""
        return torch.native_layer_norm(x_RI, weight.shape, weight, bias, eps)

    def norm_backward(
        self, d_RI: torch.Tensor, x_RI: torch.Tensor, norm: Norm, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """PyTorch's, all three gradients at once."""
        # The bias has no part in it but its shape.
        return torch.ops.aten.native_layer_norm_backward(
            d_RI, x_RI, weight.shape, *norm[1:], weight, weight, [True] * 3
        )

    def linear(self, x_RI: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """A product that begins with the bias."""
        return torch.addmm(bias, x_RI, weight.t())

    def linear_activated(
        self, x_RI: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, name: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Two operations."""
        before_RO = self.linear(x_RI, weight, bias)
        return ACTIVATIONS[name](before_RO), before_RO

    def input_gradient(self, d_RO: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """A plain product."""
        return d_RO @ weight

    def activated_gradient(
        self, d_RO: torch.Tensor, weight: torch.Tensor, before_RI: torch.Tensor, *, name: str
    ) -> torch.Tensor:
        """The activation's derivative by autograd."""
        with torch.enable_grad():
            given_RI = before_RI.detach().requires_grad_()
            activated_RI = ACTIVATIONS[name](given_RI)
        return torch.autograd.grad(activated_RI, given_RI, d_RO @ weight)[0]

    def weight_gradient(
        self,
        d_RO: torch.Tensor,
        x_RI: torch.Tensor,
        bias: torch.Tensor,
        total: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """A product and a sum over rows."""
        gradient = d_RO.t() @ x_RI
        if total is not None:
            total += gradient
        return gradient if total is None else None, d_RO.sum(dim=0)


class EngineKernels:
    """Transformer Engine's, on CUDA in BF16: biases, their gradients and the tanh GELU are parts of
    cuBLASLt's matrix products, and weight gradients are added up in fp32 by theirs.

    Raises:
        ImportError: Transformer Engine is not installed.
    """

    def __init__(self) -> None:
        import transformer_engine.pytorch  # noqa: F401  # loads the library that the next one needs
        import transformer_engine_torch as engine
        from transformer_engine.pytorch.constants import TE_DType
        from transformer_engine.pytorch.cpp_extensions import general_gemm

        self._gemm, self._dtypes = general_gemm, TE_DType
        self._norm, self._norm_backward = engine.layernorm_fwd, engine.layernorm_bwd
        self._apart = {"quick_gelu": (engine.qgelu, engine.dqgelu)}

    def norm(
        self, x_RI: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, eps: float
    ) -> Norm:
        """One kernel."""
        # No output tensor, no quantiser, all multiprocessors, weights around one.
        return self._norm(x_RI, weight, bias, eps, None, None, self._dtypes[x_RI.dtype], 0, False)

    def norm_backward(
        self, d_RI: torch.Tensor, x_RI: torch.Tensor, norm: Norm, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Two kernels: rows, then sums over them."""
        return self._norm_backward(d_RI, x_RI, *norm[1:], weight, 0, False)

    def linear(self, x_RI: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """The bias is added where the product ends."""
        return self._gemm(weight, x_RI, out_dtype=x_RI.dtype, bias=bias)[0]

    def linear_activated(
        self, x_RI: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, name: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The tanh GELU too; another activation is a kernel of its own."""
        if name != _FUSED_ACTIVATION:
            before_RO = self.linear(x_RI, weight, bias)
            return self._apart[name][0](before_RO, None), before_RO
        activated_RO, _, before_RO, _ = self._gemm(
            weight, x_RI, out_dtype=x_RI.dtype, bias=bias, gelu=True
        )
        return activated_RO, before_RO

    def input_gradient(self, d_RO: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """A plain product."""
        return self._gemm(weight, d_RO, out_dtype=d_RO.dtype, layout="NN", grad=True)[0]

    def activated_gradient(
        self, d_RO: torch.Tensor, weight: torch.Tensor, before_RI: torch.Tensor, *, name: str
    ) -> torch.Tensor:
        """As the forward: the tanh GELU's derivative where the product ends, another's apart."""
        if name != _FUSED_ACTIVATION:
            return self._apart[name][1](self.input_gradient(d_RO, weight), before_RI, None)
        return self._gemm(
            weight,
            d_RO,
            out_dtype=d_RO.dtype,
            layout="NN",
            grad=True,
            gelu=True,
            gelu_in=before_RI,
        )[0]

    def weight_gradient(
        self,
        d_RO: torch.Tensor,
        x_RI: torch.Tensor,
        bias: torch.Tensor,
        total: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """The bias's gradient comes with the product, which adds to `total` in fp32."""
        gradient, bias_gradient, *_ = self._gemm(
            x_RI,
            d_RO,
            out_dtype=(x_RI if total is None else total).dtype,
            layout="NT",
            grad=True,
            bias=bias,
            out=total,
            accumulate=total is not None,
        )
        return gradient if total is None else None, bias_gradient
