"""Small LLMs with random weights, the same weights in transformers' models, and micro-batches."""

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from ghostvis_mega.config.schema import LLMConfig
from ghostvis_mega.data.batch import ImageSlot, MicroBatch
from ghostvis_mega.model.inputs import ModelInput, model_input
from ghostvis_mega.model.llm import LLMChunk
from ghostvis_mega.model.megatron import BlockLayout, transformer_config
from ghostvis_mega.parallel.groups import Groups

CPU = torch.device("cpu")
IMAGE_TOKEN = 5
TOKENS_PER_IMAGE = 3


def llm_config(**changes: object) -> LLMConfig:
    """Three layers, two query heads a key head, and a head width that is not hidden / heads."""
    return LLMConfig(
        **{
            "num_layers": 3,
            "hidden_size": 48,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 16,
            "ffn_hidden_size": 80,
            "vocab_size": 96,
            "max_positions": 64,
            "rope_base": 10000.0,
        }
        | changes
    )


def make_llm(
    llm: LLMConfig,
    groups: Groups,
    *,
    recompute: str = "none",
    fused_loss: bool = False,
    fused_rope: bool = True,
) -> LLMChunk:
    """The whole model on this process; also biases and norms are random."""
    config = transformer_config(
        llm, layout=BlockLayout(), dtype=torch.float32, backend="cpu", recompute=recompute
    )
    chunk = LLMChunk(
        config,
        llm,
        groups=groups.megatron,
        backend="cpu",
        fused_loss=fused_loss,
        fused_rope=fused_rope,
    )
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in chunk.global_parameters():
            centre = 1.0 if "norm" in name else 0.0
            parameter.normal_(centre, 0.1, generator=generator)
    return chunk


def hugging_face(chunk: LLMChunk) -> nn.Module:
    """transformers' model of the same settings and weights."""
    llm = chunk.llm
    settings = {
        "num_hidden_layers": llm.num_layers,
        "hidden_size": llm.hidden_size,
        "num_attention_heads": llm.num_heads,
        "num_key_value_heads": llm.num_kv_heads,
        "head_dim": llm.head_dim,
        "intermediate_size": llm.ffn_hidden_size,
        "vocab_size": llm.vocab_size,
        "max_position_embeddings": llm.max_positions,
        "rope_parameters": {"rope_type": "default", "rope_theta": llm.rope_base},
        "rms_norm_eps": llm.norm_eps,
        "tie_word_embeddings": llm.tied_embeddings,
        "attn_implementation": "eager",
    }
    if llm.qkv_bias:
        model: nn.Module = Qwen2ForCausalLM(Qwen2Config(**settings))
    else:
        model = LlamaForCausalLM(LlamaConfig(**settings))
    if llm.activation == "relu2":
        for layer in model.model.layers:
            layer.mlp = SquaredReLU(llm)
    model.load_state_dict(hugging_face_weights(chunk), strict=not llm.tied_embeddings)
    return model.eval()


class SquaredReLU(nn.Module):
    """The MLP of the legacy text model; transformers has no such model with RMSNorm."""

    def __init__(self, llm: LLMConfig):
        super().__init__()
        self.up_proj = nn.Linear(llm.hidden_size, llm.ffn_hidden_size, bias=False)
        self.down_proj = nn.Linear(llm.ffn_hidden_size, llm.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.up_proj(x).clamp(min=0) ** 2)


def hugging_face_weights(chunk: LLMChunk) -> dict[str, torch.Tensor]:
    """Our parameters under transformers' names, in transformers' order of rows."""
    llm, out = chunk.llm, {}
    queries = llm.num_heads // llm.num_kv_heads
    plain = {
        "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
        "mlp.linear_fc2.weight": "mlp.down_proj.weight",
        "input_layernorm.weight": "input_layernorm.weight",
        "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    }
    top = {
        "embedding.weight": "model.embed_tokens.weight",
        "head.weight": "lm_head.weight",
        "decoder.final_layernorm.weight": "model.norm.weight",
    }
    for name, parameter in chunk.global_parameters():
        tensor = parameter.detach()
        if name in top:
            out[top[name]] = tensor
            continue
        _, _, index, rest = name.split(".", 3)
        layer = f"model.layers.{index}."
        if rest in plain:
            out[layer + plain[rest]] = tensor
        elif "linear_qkv" in rest:
            # Each key/value group holds its queries, then its key, then its value.
            kind = rest.rsplit(".", 1)[1]
            grouped = tensor.unflatten(0, (llm.num_kv_heads, queries + 2, llm.head_dim))
            parts = {"q": grouped[:, :queries], "k": grouped[:, queries], "v": grouped[:, -1]}
            for letter, part in parts.items():
                flat = part.reshape(-1, *tensor.shape[1:])
                out[f"{layer}self_attn.{letter}_proj.{kind}"] = flat
        else:
            assert rest == "mlp.linear_fc1.weight", f"unknown parameter {name}"
            names = ("gate_proj", "up_proj") if llm.activation == "swiglu" else ("up_proj",)
            for part, half in zip(names, tensor.chunk(len(names)), strict=True):
                out[f"{layer}mlp.{part}.weight"] = half
    return out


def make_pack(
    samples: list[torch.Tensor],
    *,
    pictures: dict[int, int] | None = None,
    trained: set[int] | None = None,
    merge: int | None = None,
) -> MicroBatch:
    """One packed row.

    Args:
        samples: Token ids.
        pictures: Start of the picture in a sample, by number of the sample.
        trained: Samples whose tokens are learned; by default all.
        merge: Leave out the boundary after this sample, as a faulty packer would.
    """
    lengths = torch.tensor([len(sample) for sample in samples])
    ends = lengths.cumsum(0).tolist()
    starts = [end - length for end, length in zip(ends, lengths.tolist(), strict=True)]
    labels, weights = [], []
    for number, sample in enumerate(samples):
        learned = trained is None or number in trained
        labels.append(torch.cat([sample[1:], sample.new_zeros(1)]) * learned)
        weights.append(torch.ones(len(sample)) * learned)
        weights[-1][-1] = 0.0
    boundaries = [0] + [end for number, end in enumerate(ends) if number != merge]
    slots = sorted((starts[number] + start, number) for number, start in (pictures or {}).items())
    return MicroBatch(
        tokens_BS=torch.cat(samples)[None],
        labels_BS=torch.cat(labels)[None],
        weights_BS=torch.cat(weights)[None],
        positions_BS=torch.cat([torch.arange(len(sample)) for sample in samples])[None],
        cu_seqlens=torch.tensor(boundaries, dtype=torch.int32),
        max_seqlen=int(torch.tensor(boundaries).diff().max()),
        images=tuple(ImageSlot(image_id=number, row=0, start=start) for start, number in slots),
        sample_ids=tuple(range(len(samples))),
    )


def make_rows(tokens_BS: torch.Tensor, weights_BS: torch.Tensor) -> MicroBatch:
    """Rows of one sample each, without packing."""
    rows, length = tokens_BS.shape
    return MicroBatch(
        tokens_BS=tokens_BS,
        labels_BS=tokens_BS.roll(-1, dims=1) * (weights_BS > 0),
        weights_BS=weights_BS,
        positions_BS=torch.arange(length).repeat(rows, 1),
        cu_seqlens=None,
        max_seqlen=length,
        images=(),
        sample_ids=tuple(range(rows)),
    )


def to_input(batch: MicroBatch) -> ModelInput:
    """What the model reads."""
    return model_input(batch, tokens_per_image=TOKENS_PER_IMAGE, device=CPU, for_sdpa=True)


def all_logits(
    chunk: LLMChunk, batch: MicroBatch, vision_nH: torch.Tensor | None = None
) -> torch.Tensor:
    """Scores of every position: [B, S, V]."""
    inputs = to_input(batch)
    rows, length = batch.tokens_BS.shape
    hidden_SBH = chunk(inputs, vision_nH)
    logits = chunk.logits(hidden_SBH, torch.arange(rows * length))
    return logits.unflatten(0, (length, rows)).transpose(0, 1)
