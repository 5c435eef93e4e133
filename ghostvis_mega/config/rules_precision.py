"""What Transformer Engine's kernels need, in FP8 and for the tower, checked before any GPU is
touched."""

from collections.abc import Iterator

from ghostvis_mega.config.schema import RunConfig

FP8_MULTIPLE = {"delayed": 16, "tensorwise": 16, "blockwise": 128}
"""Tokens and widths of a matrix that a recipe can quantise (`blockwise`: whole blocks of 128)."""
FUSED_TOWER_MULTIPLE = 8
"""Of BF16 numbers: rows that cuBLASLt's fused products read and write begin at 16 bytes."""


def fp8_notes(cfg: RunConfig) -> Iterator[str]:
    """Where FP8's scales let the samples of a pack feel each other, as `ghostvis leak` measures."""
    if not cfg.data.packing:
        return
    if cfg.train.fp8 == "tensorwise":
        yield (
            "train.fp8=tensorwise with data.packing=true: one scale for a whole tensor lets the "
            "samples of a pack change each other's values; use train.fp8=delayed if they must not."
        )
    # A rank holds one part in `context` of each sample.
    block = FP8_MULTIPLE["blockwise"] * cfg.parallel.context
    if cfg.train.fp8 == "blockwise" and cfg.segment_align % block:
        yield (
            "train.fp8=blockwise with data.packing=true: in the gradients of weights samples that "
            f"meet inside {FP8_MULTIPLE['blockwise']} tokens share scales; use data.segment_align="
            f"{block} or train.fp8=delayed if they must not."
        )


def fp8_problems(cfg: RunConfig, *, device: str) -> Iterator[str]:
    """Broken rules of `train.fp8`, one sentence each.

    Args:
        cfg: The run.
        device: Where it will run: "cpu" or "cuda".
    """
    recipe = cfg.train.fp8
    if recipe == "none":
        return
    if cfg.train.precision != "bf16":
        yield (
            f"train.fp8={recipe} with train.precision={cfg.train.precision}: FP8 is for the "
            "matrices of a BF16 run. Set precision: bf16, or fp8: none."
        )
    if device == "cpu":
        yield (
            f"train.fp8={recipe} needs a GPU with FP8 units (Hopper or newer) and Transformer "
            "Engine. Set fp8: none, or run on a GPU."
        )
    multiple, tensor = FP8_MULTIPLE[recipe], cfg.parallel.tensor
    llm = cfg.model.llm
    widths = {
        "hidden_size": llm.hidden_size,
        "ffn_hidden_size / parallel.tensor": llm.ffn_hidden_size // tensor,
        "num_heads x head_dim / parallel.tensor": llm.num_heads * llm.head_dim // tensor,
        "num_kv_heads x head_dim / parallel.tensor": llm.num_kv_heads * llm.head_dim // tensor,
    }
    for name, width in widths.items():
        if width % multiple:
            yield (
                f"train.fp8={recipe} multiplies matrices in units of {multiple}, but "
                f"model.llm.{name} = {width} is no multiple of it. Use another width or "
                "parallel.tensor, or fp8: none."
            )
    cut = cfg.parallel.context * (tensor if cfg.parallel.sequence_parallel else 1)
    tokens = cfg.batch.micro_size * cfg.data.seq_length
    if tokens % (cut * multiple):
        step = cut * multiple // cfg.batch.micro_size or 1
        length = -(-cfg.data.seq_length // step) * step
        yield (
            f"train.fp8={recipe} multiplies matrices in units of {multiple} tokens, but a rank "
            f"holds batch.micro_size={cfg.batch.micro_size} x data.seq_length="
            f"{cfg.data.seq_length} / {cut} of them. Use data.seq_length={length}, or fp8: none."
        )


def tower_problems(cfg: RunConfig, *, device: str) -> Iterator[str]:
    """Broken rules of `tower.fused`, one sentence each.

    Args:
        cfg: The run.
        device: Where it will run: "cpu" or "cuda".
    """
    vision = cfg.model.vision
    if vision is None or device == "cpu" or cfg.train.precision != "bf16" or not cfg.tower.fused:
        return
    for name in ("hidden_size", "ffn_hidden_size"):
        if (width := getattr(vision, name)) % FUSED_TOWER_MULTIPLE:
            yield (
                f"tower.fused=true takes widths that are multiples of {FUSED_TOWER_MULTIPLE}, and "
                f"model.vision.{name}={width} is none. Set tower.fused: false."
            )
