"""What a run is: frozen, typed settings, one class a YAML section.

Only the type and range of single fields is checked here; rules between fields live in `rules.py`,
so that one report can hold all of them.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

Positive = Annotated[int, Field(ge=1)]
Layers = Annotated[int, Field(ge=1, le=10_000)]
"""A number that a file from elsewhere may claim and that loops run over."""
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]

MODULES = ("llm", "vision", "resampler", "projector")
"""The parts of a model that can be frozen and have a learning rate of their own."""

Module = Literal["llm", "vision", "resampler", "projector"]


class Section(BaseModel):
    """A frozen section that knows all of its keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_for_number(cls, value: Any, info: ValidationInfo) -> Any:
        # Pydantic would read `steps: true` as 1.
        kind = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and kind in (int, float):
            raise PydanticCustomError("float_type", "not a number")
        return value


class LLMConfig(Section):
    """Decoder-only transformer: RMSNorm, rotary positions, grouped queries, no bias but QKV's."""

    num_layers: Layers
    hidden_size: Positive
    num_heads: Positive
    num_kv_heads: Positive
    head_dim: Positive
    ffn_hidden_size: Positive
    vocab_size: Positive
    max_positions: Positive
    rope_base: Annotated[float, Field(gt=0)] = 1_000_000.0
    norm_eps: Annotated[float, Field(gt=0)] = 1e-6
    activation: Literal["swiglu", "relu2"] = "swiglu"
    qkv_bias: bool = True
    tied_embeddings: bool = True
    init_std: Annotated[float, Field(gt=0)] = 0.02
    vocab_padding: NonNegative = 0
    """Rows at the end of `vocab_size` that stand for no token, where tensor parallelism must divide
    it: zeros that are neither scored nor trained, and that exports leave out."""
    hidden_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of hidden values dropped in training, before the first layer and after each attention
    and MLP. The mask is the same in every layout; rates are rounded to 1/65536."""

    @property
    def vocab_tokens(self) -> int:
        """Rows of the vocabulary that stand for a token."""
        return self.vocab_size - self.vocab_padding


class TowerKind(NamedTuple):
    """What all towers of a kind have in common, under the names of Hugging Face's config.json."""

    hidden_act: str
    layer_norm_eps: float


TOWER_KINDS = {
    "siglip": TowerKind("gelu_pytorch_tanh", 1e-6),
    "clip": TowerKind("quick_gelu", 1e-5),
}


class VisionConfig(Section):
    """SigLIP or CLIP vision tower, as transformers builds it."""

    kind: Literal["siglip", "clip"]
    num_layers: Layers
    hidden_size: Positive
    num_heads: Positive
    ffn_hidden_size: Positive
    image_size: Positive
    patch_size: Positive
    feature_layer: int = -1
    """What feeds the connector: -1 the last layer's output, -2 the one before (LLaVA's CLIP)."""
    post_norm: bool = False
    """Whether the tower's final LayerNorm is applied; LLaVA-style checkpoints do not."""
    init_std: Annotated[float, Field(gt=0)] = 0.02

    @property
    def grid(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of one image, without CLIP's class token."""
        return self.grid**2


class ConnectorConfig(Section):
    """What turns tower features into LLM embeddings."""

    kind: Literal["mlp", "avgpool_mlp", "perceiver_mlp"]
    tokens_per_image: Positive | None = None
    """Embeddings an image; `mlp` has one a patch and leaves this empty."""
    num_layers: Positive = 2
    num_heads: Positive = 8
    init_std: Annotated[float, Field(gt=0)] = 0.02


class ModelConfig(Section):
    """The model. `preset` fills the parts; keys beside it override the preset's."""

    preset: str | None = None
    llm: LLMConfig
    vision: VisionConfig | None = None
    connector: ConnectorConfig | None = None

    @property
    def tokens_per_image(self) -> int:
        """LLM positions that one image takes; 0 without a vision part."""
        if self.vision is None or self.connector is None:
            return 0
        return self.connector.tokens_per_image or self.vision.num_patches

    @property
    def modules(self) -> tuple[Module, ...]:
        """The parts this model has; only `perceiver_mlp` has a resampler with parameters."""
        if self.vision is None or self.connector is None:
            return ("llm",)
        resampler: tuple[Module, ...] = (
            ("resampler",) if self.connector.kind == "perceiver_mlp" else ()
        )
        return ("llm", "vision", *resampler, "projector")


class BlendEntry(Section):
    """One dataset of a blend."""

    path: Path
    weight: Annotated[float, Field(ge=0)]
    """Share in `data.blend_unit`; weights need not sum to 1."""


class BlendChange(Section):
    """Other weights from a step on."""

    step: Positive
    """Steps done when the weights change."""
    weights: tuple[Annotated[float, Field(ge=0)], ...]
    """One for each entry of `data.blend`, in its order."""


class DataConfig(Section):
    """Where samples come from and how they become sequences."""

    train: Path
    """Directory of a prepared dataset (`NAME.gvd`)."""
    blend: tuple[BlendEntry, ...] = ()
    """Several datasets to train on, `train` among them; empty: `train` alone."""
    blend_unit: Literal["packs", "samples", "tokens"] = "packs"
    """What the weights are shares of: sequences, samples, or useful tokens."""
    blend_changes: tuple[BlendChange, ...] = ()
    bad_sample_budget: Fraction = 1e-4
    """Share of samples that may turn out damaged while training (10 always may); one more stops
    the run."""
    heldout: Path | None = None
    """Prepared dataset that is never trained on: previews and the accuracy at the end."""
    tokenizer: Path | None = None
    """Tokenizer file that the data must have been made with; checked by its digest, where given."""
    seq_length: Positive
    packing: bool = True
    """True: samples share a sequence, apart in attention and positions; False: one a row."""
    pack_algorithm: Literal["balanced", "bfd", "concat"] = "balanced"
    """How samples share sequences; `concat` leaves no padding but cuts samples where they end."""
    too_long: Literal["drop", "truncate-at-turn", "split-text"] = "drop"
    """Samples longer than a sequence: left out; conversations cut after the last answer that fits;
    or documents cut into parts. Images are never cut."""
    segment_align: Positive | None = None
    """With packing, each sample is padded to a multiple of so many positions; empty: what
    `parallel.context` needs. Name it for runs of other context degrees to read the same packs."""
    augment: bool = False
    """Random mirroring and shifts of the pictures, a function of (seed, epoch, image) alone."""
    num_workers: NonNegative = 0


class BatchConfig(Section):
    """Sequences (packs, or rows without packing) of one optimizer step."""

    global_size: Positive
    micro_size: Positive = 1


class ParallelConfig(Section):
    """Degrees of parallelism of the LLM; what is left of the world is data-parallel."""

    tensor: Positive = 1
    pipeline: Positive = 1
    virtual_pipeline: Positive = 1
    """Model chunks a pipeline stage (interleaved schedule); 1 is plain 1F1B."""
    first_stage_layers: Positive | None = None
    """LLM layers of the first pipeline stage, which also embeds; empty: as many as the others."""
    last_stage_layers: Positive | None = None
    """LLM layers of the last stage, which also has the head; empty: as many as the others."""
    context: Positive = 1
    """Ranks that share out each sequence; every sample is cut into two chunks a rank."""
    sequence_parallel: bool = True
    """Split activations along the sequence over tensor-parallel ranks; no effect with tensor=1."""


class TowerConfig(Section):
    """How the vision tower runs; it is replicated and its images are spread over all ranks."""

    backward: Literal["auto", "recompute", "keep"] = "auto"
    """`recompute` runs the forward twice and keeps no activations meanwhile; `keep` does not.
    `auto` keeps where little is kept: with `window`, or where the tower is frozen."""
    images_per_forward: Positive = 64
    fused: bool = True
    """On GPUs in BF16 the tower's layers are Transformer Engine's kernels around cuDNN's attention,
    instead of PyTorch's operations; no effect elsewhere."""
    window: NonNegative = 0
    """Micro-batches whose pictures are encoded, read and differentiated before those of the next
    ones, so that the activations of so few are there at a time; 0: all of the step. Each window
    would empty a pipeline, so it takes pipeline=1."""


class LearningRates(Section):
    """Peak learning rate of each module."""

    llm: Annotated[float, Field(ge=0)] = 1e-4
    vision: Annotated[float, Field(ge=0)] = 1e-5
    resampler: Annotated[float, Field(ge=0)] = 3e-5
    projector: Annotated[float, Field(ge=0)] = 5e-5


class OptimConfig(Section):
    """AdamW, its schedule and the gradient clip."""

    lr: LearningRates = LearningRates()
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Applied to matrices only: not to biases, norms, or embeddings of positions and latents."""
    clip_norm: Annotated[float, Field(ge=0)] = 1.0
    """Largest global gradient norm over LLM, tower and connector together; 0 does not clip."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: NonNegative = 0
    min_lr_ratio: Fraction = 0.1


class DeepSpeedConfig(Section):
    """DeepSpeed JSON files of the two engines, as users know them ("auto" values are filled in)."""

    llm: Path
    vision: Path | None = None
    """Empty: the LLM's file serves both."""


class TrainConfig(Section):
    """The run itself."""

    steps: Positive
    seed: NonNegative = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    fp8: Literal["none", "delayed", "tensorwise", "blockwise"] = "none"
    """FP8 in the LLM's linear layers, by Transformer Engine's recipe (Hopper GPUs); activations,
    weights and gradients outside of them stay BF16."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    ranks_per_gpu: Positive = 1
    """Ranks that share one GPU, NCCL taking each for a machine of its own: to try or to prove a
    layout on fewer GPUs than it is for. Slow."""
    freeze: tuple[Module, ...] = ()
    recompute: Literal["none", "selective", "full", "auto"] = "none"
    """Activation checkpointing of the LLM: nothing, the MLP of each layer, or whole layers. `auto`
    takes the first of them whose predicted memory fits the GPUs (`ghostvis check` prints it)."""
    fused_wgrad: bool = True
    """On GPUs in BF16 with ZeRO stage 1 or 2, the LLM's matrix products add weight gradients to
    fp32 sums themselves, instead of handing each micro-batch's to autograd; no effect elsewhere."""
    fused_loss: bool = True
    """Output layer and loss in chunks of rows, never holding all scores of a micro-batch, instead
    of scoring all rows at once."""
    fused_rope: bool = True
    """Queries, keys and values are split and queries and keys rotated in one operation (on GPUs one
    kernel of Transformer Engine each way), instead of by Megatron-Core's steps."""
    deterministic: bool = False
    """Equal runs give equal bits: reproducible kernels only, on the CPU one thread a process."""
    timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Silence that counts as a hang: a collective that waits longer, or a phase (a step, a round of
    answers, a save) that takes longer. The run stops and names the rank."""


class CheckpointConfig(Section):
    """When to save and where to start from."""

    save_every: NonNegative = 0
    """Steps between saves; 0 saves at the end only."""
    save_at_end: bool = True
    """False for runs whose weights nobody needs, such as timings."""
    keep: Positive = 2
    resume: str = "auto"
    """`auto`: this run's newest checkpoint, if any; `none`: start anew; else a path."""
    weights: Path | None = None
    """Checkpoint of another run, of any layout, whose weights a new run begins with."""
    weights_of: tuple[Module, ...] = ()
    """The parts to take from `weights`; empty: all that both models have."""
    export_hf: Literal["none", "end", "saves"] = "none"
    """Write `OUTPUT/hf/step-...`, a Hugging Face directory of the same weights, beside the last
    checkpoint or beside every one; the newest `keep` stay."""


class GuardsConfig(Section):
    """What a run does about steps that would harm it, and about slow ranks."""

    spike: Literal["none", "skip", "rollback"] = "skip"
    """A loss far above the recent ones: train on it all the same, leave the step out, or go back to
    the last checkpoint and leave out all steps since then."""
    spike_sigma: Annotated[float, Field(gt=0)] = 7.0
    """How far above the median of recent losses a spike is, in robust standard deviations."""
    spike_window: Annotated[int, Field(ge=64)] = 256
    """Losses that the judgement rests on; there is none before a quarter of them is known."""
    max_skipped: Positive = 3
    """Steps left out in a row, for whatever reason, after which the run stops."""
    slow_rank_factor: Annotated[float, Field(gt=1)] = 2.0
    """A rank is called slow where it takes this many times as long as the others for its work."""
    slow_rank_window: NonNegative = 20
    """Steps that a verdict on slow ranks rests on; 0 gives none."""


class LogConfig(Section):
    """What is written while training; everything lands under `output`."""

    output: Path
    every: Positive = 1
    tensorboard: bool = False
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    preview_steps: tuple[NonNegative, ...] = ()
    preview_samples: NonNegative = 8
    evaluate: bool = False
    """Answer every held-out question at the end and print the accuracy."""


class RunConfig(Section):
    """One training run."""

    model: ModelConfig
    data: DataConfig
    batch: BatchConfig
    parallel: ParallelConfig = ParallelConfig()
    tower: TowerConfig = TowerConfig()
    optim: OptimConfig = OptimConfig()
    deepspeed: DeepSpeedConfig
    train: TrainConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    guards: GuardsConfig = GuardsConfig()
    log: LogConfig

    @property
    def trained_modules(self) -> tuple[Module, ...]:
        """The model's parts that are not frozen."""
        return tuple(name for name in self.model.modules if name not in self.train.freeze)

    @property
    def segment_align(self) -> int:
        """Positions of which packed segments take a multiple; without packing a row is not
        padded inside."""
        if not self.data.packing:
            return 1
        context = self.parallel.context
        return self.data.segment_align or (2 * context if context > 1 else 1)
