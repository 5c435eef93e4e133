"""GPU memory that a run takes, from its settings alone; no torch.

What each layer keeps from forward to backward is counted tensor by tensor, as Transformer Engine's
layers keep it. `docs/gpu.md` compares the sums with measured ones.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from ghostvis_mega.config.deepspeed import engine_files, try_resolve
from ghostvis_mega.config.schema import RunConfig
from ghostvis_mega.config.sizes import parameter_counts
from ghostvis_mega.model.loss_chunks import CHUNK_BYTES, row_chunks
from ghostvis_mega.parallel.plan import Degrees

Recompute = Literal["none", "selective", "full"]
MODES: tuple[Recompute, ...] = get_args(Recompute)
"""Of activation checkpointing, the fastest first."""
USABLE = 0.94
"""Share of a GPU's memory to plan with. The rest is for CUDA, NCCL and gaps between tensors."""

_BF16, _FP32 = 2, 4


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, at its peak."""

    weights: int
    gradients: int
    optimizer: int
    """Masters and two moments."""
    layers: int
    """What the LLM's layers keep for the backward, of all micro-batches under way."""
    pictures: int
    """What the vision side keeps meanwhile, or, where it has its peak alone, then."""
    passing: int
    """What comes and goes on top: a chunk of scores, or the backward of one layer."""

    @property
    def total(self) -> int:
        """All of it."""
        held = self.weights + self.gradients + self.optimizer
        return held + self.layers + self.pictures + self.passing


def unpredictable(run: RunConfig, *, world_size: int) -> str | None:
    """Why `predict` cannot tell the memory of a run, as settings and no sentence; None if it can.

    Args:
        run: Settings without problems.
        world_size: Number of processes.
    """
    if run.train.precision != "bf16":
        return f"train.precision={run.train.precision}"
    for engine, path in engine_files(run).items():
        resolved, _ = try_resolve(path, run=run, engine=engine, world_size=world_size)
        if resolved is None:
            return f"a file without a ZeRO stage ({path})"
        if resolved.offload:
            return f"an offloaded optimizer ({path})"
        if resolved.stage not in (1, 2):
            return f"ZeRO stage {resolved.stage} ({path})"
    return None


def refusal(why: str) -> str:
    """What to do about `train.recompute=auto` in a run that is `unpredictable`."""
    return (
        f"train.recompute=auto chooses by predicted memory, and there is no prediction for {why}. "
        "Set none, selective or full."
    )


def rows_at_a_time(run: RunConfig, *, world_size: int) -> int:
    """Sequences of all replicas whose pictures are encoded together: of a window or a step.

    Args:
        run: Settings.
        world_size: Number of processes.
    """
    degrees = Degrees.of(run, world_size=world_size)
    together = degrees.num_micro_batches(run)
    if run.tower.window:
        together = min(run.tower.window, together)
    return together * run.batch.micro_size * degrees.data


def most_pictures(run: RunConfig, *, world_size: int) -> int:
    """A bound on what a rank encodes at a time: sequences of nothing but pictures.

    Args:
        run: Settings.
        world_size: Number of processes.
    """
    width = run.model.tokens_per_image
    each = run.data.seq_length // width if width else 0
    return -(-rows_at_a_time(run, world_size=world_size) * each // world_size)


def layers_held(run: RunConfig, degrees: Degrees, stage: int) -> int:
    """Most layers of a pipeline stage whose activations are there at once; a layer counts once for
    each micro-batch under way. Those are the ones of Megatron-Core's warm-up, and one more.

    Args:
        run: Settings.
        degrees: Of the run.
        stage: Counted from 0.
    """
    count, behind = degrees.num_micro_batches(run), degrees.pipeline - stage
    layers, chunks = degrees.layers_per_stage(run)[stage], degrees.virtual_pipeline
    if chunks == 1:
        return layers * min(count, behind)
    warm_up = 2 * (behind - 1) + (chunks - 1) * degrees.pipeline
    return layers // chunks * min(count * chunks, warm_up + 1)


def predict(run: RunConfig, recompute: Recompute, *, world_size: int, pictures: int) -> Memory:
    """Memory of the pipeline stage that takes most.

    Args:
        run: Settings that are not `unpredictable`.
        recompute: In place of `train.recompute`.
        world_size: Number of processes.
        pictures: Most that a rank encodes in one window (`tower.window`), or in a step without.
    """
    degrees = Degrees.of(run, world_size=world_size)
    stages = [_Stage(run, recompute, degrees, number) for number in range(degrees.pipeline)]
    vision = _Vision(run, world_size=world_size)
    found = [_peak(stage, vision, pictures) for stage in stages]
    return max(found, key=lambda memory: memory.total)


def _peak(stage: "_Stage", vision: "_Vision", pictures: int) -> Memory:
    """Of one stage: the LLM runs beside what the tower keeps, and the tower perhaps alone."""
    kept = vision.bytes_of(pictures) if vision.keeps else 0
    layers, passing = stage.kept, stage.passing
    alone = 0 if vision.keeps else vision.bytes_of(min(pictures, vision.at_once))
    if alone > layers + passing:
        layers, passing, kept = 0, 0, alone
    return Memory(
        weights=stage.weights + vision.weights,
        gradients=stage.gradients + vision.gradients,
        optimizer=stage.optimizer + vision.optimizer,
        layers=layers,
        pictures=kept,
        passing=passing,
    )


class _Stage:
    """The LLM on one rank of a pipeline stage.

    Args:
        run: Settings.
        recompute: Activation checkpointing.
        degrees: Of the run.
        number: Of the stage.
    """

    def __init__(self, run: RunConfig, recompute: Recompute, degrees: Degrees, number: int):
        llm, tensor = run.model.llm, degrees.tensor
        self.run, self.degrees, self.number = run, degrees, number
        self.trained = "llm" in run.trained_modules
        fp8 = run.train.fp8 != "none"
        # What enters a product is kept for the gradient of its matrix alone, if that trains.
        self.fp8 = fp8 and self.trained
        # Bytes of one number of each token where tensor ranks cut the width, and where sequence
        # parallelism cuts the tokens.
        self._cut = _BF16 / tensor
        self._along = _BF16 / (tensor if run.parallel.sequence_parallel else 1)
        self.tokens = run.batch.micro_size * run.data.seq_length // degrees.context
        num_layers = degrees.layers_per_stage(run)[number]
        heads, kv = llm.num_heads * llm.head_dim, llm.num_kv_heads * llm.head_dim
        self._heads, self._qkv = heads, heads + 2 * kv
        wide = 2 if llm.activation == "swiglu" else 1
        self._before, self._after = wide * llm.ffn_hidden_size, llm.ffn_hidden_size
        h = llm.hidden_size
        matrices = h * (self._qkv + heads + self._before + self._after)
        vectors = 2 * h + (self._qkv // tensor if llm.qkv_bias else 0)
        table = llm.vocab_size * h // tensor
        self.last = number == degrees.pipeline - 1
        tables = int(number == 0) + int(
            self.last and (degrees.pipeline > 1 or not llm.tied_embeddings)
        )
        own = num_layers * (matrices // tensor + vectors) + tables * table + (h if self.last else 0)
        # FP8 keeps each matrix twice more, a byte a number: as it is and transposed.
        casts = 2 * num_layers * matrices // tensor if fp8 else 0
        self.weights = _BF16 * own + casts
        self.gradients = _FP32 * own if self.trained else 0
        shared = degrees.data * degrees.context
        self.optimizer = 3 * _FP32 * own // shared if self.trained else 0
        self.kept = round(self._layer(recompute) * layers_held(run, degrees, number))
        self.passing = round(max(self._backward(recompute), self._loss() if self.last else 0))

    def _layer(self, recompute: Recompute) -> float:
        """Bytes that one layer keeps."""
        h, tokens = self.run.model.llm.hidden_size, self.tokens
        if recompute == "full":
            return tokens * self._along * h
        attention = self._along * h + self._cut * (self._qkv + self._heads)
        if self.trained:
            attention += self._along * h
        if self.fp8:  # what enters a product is kept in a byte; attention keeps its output itself
            attention += (self._cut * self._heads - self._along * h) / 2
        if recompute == "selective":
            return tokens * (attention + self._along * h)
        return tokens * attention + self._mlp()

    def _mlp(self) -> float:
        """Bytes that norm and MLP of one layer keep."""
        h = self.run.model.llm.hidden_size
        if not self.trained:
            return self.tokens * (self._along * h + self._cut * self._before)
        inputs = self._along * h + self._cut * self._after
        if self.fp8:
            inputs /= 2
        return self.tokens * (self._along * h + self._cut * self._before + inputs)

    def _backward(self, recompute: Recompute) -> float:
        """Bytes that come and go in the backward of one layer, its second forward among them."""
        h = self.run.model.llm.hidden_size
        gradients = self.tokens * (self._along * 2 * h + self._cut * self._before)
        again = 0.0
        if recompute == "selective":
            again = self._mlp() - self.tokens * self._along * h
        elif recompute == "full":
            again = self._layer("none") - self._layer("full")
        return gradients + again

    def _loss(self) -> float:
        """Bytes of the scores at a time, and of the hidden states on their way to them: before and
        after the norm, the rows that count, and gradients in fp32 and BF16."""
        llm = self.run.model.llm
        columns, hidden = llm.vocab_size // self.degrees.tensor, self.tokens * llm.hidden_size
        if not self.run.train.fused_loss:
            return self.tokens * columns * (_BF16 + _FP32) + hidden * 6 * _BF16
        chunks = row_chunks(self.tokens, columns * _BF16, chunk_bytes=CHUNK_BYTES)
        return chunks[0].stop * columns * _BF16 + hidden * (4 * _BF16 + _FP32)


class _Vision:
    """Tower, resampler and projector, whole on every rank.

    Args:
        run: Settings.
        world_size: Ranks that share the optimizer.
    """

    def __init__(self, run: RunConfig, *, world_size: int):
        counts = parameter_counts(run.model)
        counts.pop("llm")
        own = sum(counts.values())
        trained = sum(n for name, n in counts.items() if name in run.trained_modules)
        self.run = run
        self.weights = _BF16 * own
        self.gradients = _FP32 * trained
        self.optimizer = 3 * _FP32 * trained // world_size
        self.tower_trains = "vision" in run.trained_modules and run.model.vision is not None
        self.keeps = run.tower.backward == "keep" or (
            run.tower.backward == "auto" and (run.tower.window > 0 or not self.tower_trains)
        )
        self.at_once = run.tower.images_per_forward

    def bytes_of(self, pictures: int) -> int:
        """What so many pictures keep for the backward."""
        vision, connector = self.run.model.vision, self.run.model.connector
        if vision is None or connector is None or not pictures:
            return 0
        c, width = vision.hidden_size, self.run.model.llm.hidden_size
        rows = vision.num_patches + (1 if vision.kind == "clip" else 0)
        each, calls = 0, -(-pictures // self.at_once)
        together = 0
        if self.tower_trains:
            each += vision.num_layers * rows * (8 * c + 2 * vision.ffn_hidden_size)
            together = calls * vision.num_layers * 3 * c * c  # Q, K and V side by side
        if connector.kind == "perceiver_mlp" and "resampler" in self.run.trained_modules:
            latents = self.run.model.tokens_per_image * 20 * c
            each += connector.num_layers * (rows * 3 * c + latents)
        each += self.run.model.tokens_per_image * (c + 3 * width)
        return _BF16 * (pictures * each + together)
