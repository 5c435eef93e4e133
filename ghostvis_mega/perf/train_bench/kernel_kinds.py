"""What a kernel does, by its name."""

import re
from functools import cache

COMPUTE = ("attention", "GEMM")
"""Kinds that are forward and backward alone: after the last of them a step only ends."""
GROUPS: tuple[tuple[str, str], ...] = (
    ("communication", r"nccl|gloo|c10d|all_?reduce|all_?gather|reduce_?scatter|all_?to_?all"),
    # Ours, and what Inductor makes of Megatron-Core's cross-entropy, as far as its names tell.
    ("loss", r"cross_?entropy|nll_loss|log_?softmax|linear_ce|fused_linear"
             r"|\b(statistics|gradient)_kernel\b|triton_\w*_(exp|log|max|index_put|vocab\w*)_"),
    ("attention", r"attention|flash|fmha|sdpa|mha_|_softmax|softmax_warp|scaled_.*softmax"
                  r"|cudnn::fusion|fused_attn"),
    ("optimizer", r"adam|multi_tensor|foreach|l2norm|\blamb\b|FusedOptimizer|NormTwoOps"),
    # Inductor names kernels after all that they take part in, also the product before them.
    ("GEMM", r"^(?!triton_(poi|red|per)_).*(gemm|cublas|cutlass|xmma|nvjet|sm\d+_.*(mm|tn|nt|nn)"
             r"|wgmma|addmm|\bmm\b|\bbmm\b|aten::(mm|bmm|addmm|linear|conv)|convolution|wgrad)"),
    ("norm and activation", r"norm|silu|swiglu|swish|gelu|glu|rope|rotary|sigmoid|activation"),
    # Elementwise kernels are called gpu_kernel_impl_nocast or LoadWithCast, whatever they compute.
    ("copy and cast", r"copy|(?<!no)(?<!with)cast|memcpy|memset|\bcat\b|CatArray|transpose|fill"
                      r"|quantize|amax|zero_"),
    ("elementwise", r"elementwise|CUDAFunctor|triton_poi|aten::(add|sub|mul|div)_?$"),
)  # fmt: skip
"""Kinds by what a kernel's name holds; the first that fits counts. What is left is `other`."""
OTHER = "other"
KINDS = (*(kind for kind, _ in GROUPS), OTHER)


@cache
def kind_of(name: str) -> str:
    """The kind of a kernel."""
    for kind, pattern in GROUPS:
        if re.search(pattern, name, flags=re.IGNORECASE):
            return kind
    return OTHER
