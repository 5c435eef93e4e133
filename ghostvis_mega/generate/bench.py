"""Generation against transformers' own, on the same random weights of a true size, in one run."""

import faulthandler
import io
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from ghostvis_mega.config.presets import MODEL_PRESETS, TOWER_PRESETS
from ghostvis_mega.config.schema import ModelConfig
from ghostvis_mega.convert.hf_config import config_of_parts
from ghostvis_mega.convert.hf_folder import CONFIG
from ghostvis_mega.convert.mapping import Parts, entries
from ghostvis_mega.convert.output import SHARD_BYTES, hf_shards, write_index
from ghostvis_mega.convert.table import LAYOUTS
from ghostvis_mega.convert.tensor_file import CODES, TensorFileWriter, TensorInfo, as_bytes
from ghostvis_mega.data.images import load_image
from ghostvis_mega.generate.engine import Engine, Request
from ghostvis_mega.generate.kernels import Kernels, TorchKernels
from ghostvis_mega.generate.load import load_model
from ghostvis_mega.generate.pictures import EmbeddingCache, picture_bytes
from ghostvis_mega.generate.sampling import Sampling
from ghostvis_mega.utils.figures import Figure, at_least

SPEED_UP = 2.0
"""Bar: ours against transformers at batch 1."""
_TEXT_TOKENS = 64
_PICTURE_SIZE = (640, 480)
_COMPARED_TOKENS = 16
_MLP = {"kind": "mlp"}
PRESETS: dict[str, dict[str, Any]] = {
    "vlm_1_5b": {
        "llm": MODEL_PRESETS["qwen25_1_5b"]["llm"],
        "vision": TOWER_PRESETS["siglip_b_32"],
        "connector": _MLP,
    },
    "tiny": {
        "llm": MODEL_PRESETS["vlm_tiny"]["llm"],
        "vision": MODEL_PRESETS["vlm_tiny"]["vision"],
        "connector": _MLP,
    },
}
"""Models that transformers knows as LLaVA: Qwen2.5-1.5B with SigLIP-B/32 at 256 pixels (64 tokens a
picture), and a small one for machines without a GPU."""


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Args:
        preset: A key of `PRESETS`.
        device: Where.
        tokens: Tokens of each answer.
        rounds: Timings of each kind, of which the median counts.
        batches: Prompts side by side.
        step_limit_s: Of each step; a step that takes longer ends the process with its stack.
    """

    preset: str
    device: torch.device
    tokens: int = 128
    rounds: int = 3
    batches: tuple[int, ...] = (1, 32)
    step_limit_s: float = 120.0
    fused: bool = True
    """Whether ours uses its fused kernels on a GPU."""

    @property
    def dtype(self) -> torch.dtype:
        """BF16 on a GPU, fp32 on a CPU."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32


@contextmanager
def _step(name: str, plan: Plan) -> Iterator[None]:
    """A part of the benchmark; a hang ends the process and shows where."""
    began = time.perf_counter()
    sys.stderr.write(f"bench generate: {name}\n")
    faulthandler.dump_traceback_later(plan.step_limit_s, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
    sys.stderr.write(f"bench generate: {name}: {time.perf_counter() - began:.1f} s\n")


def make_model(folder: Path, model: ModelConfig, plan: Plan) -> int:
    """Write random weights as a LLaVA directory; returns the image token.

    Args:
        folder: New directory.
        model: Its sizes.
        plan: Device and type.
    """
    folder.mkdir(parents=True)
    parts, vocab = Parts.of(model), model.llm.vocab_size
    image = vocab - 1
    code = CODES[plan.dtype]
    infos = {
        tensor.name: TensorInfo(code, tensor.shape)
        for entry in entries(parts, LAYOUTS["llava"])
        for tensor in entry.hf
    }
    generator = torch.Generator(plan.device).manual_seed(0)
    shards = hf_shards(infos, largest=SHARD_BYTES)
    for file, content in shards:
        with TensorFileWriter(folder / file, content) as writer:
            for name, info in content:
                values = torch.randn(info.shape, generator=generator, device=plan.device)
                norm = "norm" in name and name.endswith("weight")
                values = values * (0.1 if norm else model.llm.init_std) + (1.0 if norm else 0.0)
                writer.write(name, iter([as_bytes(values.to(plan.dtype).cpu())]))
    write_index(folder, shards)
    dtype = str(plan.dtype).removeprefix("torch.")
    config = config_of_parts(parts, "llava", dtype=dtype, vocab=vocab, tokens={"image": image})
    (folder / CONFIG).write_text(json.dumps(config))
    return image


class Stock:
    """transformers' model and its `generate()`."""

    def __init__(self, folder: Path, model: ModelConfig, plan: Plan):
        from transformers import LlavaForConditionalGeneration

        self.model, self.plan = model, plan
        loaded = LlavaForConditionalGeneration.from_pretrained(folder, dtype=plan.dtype)
        self._stock = loaded.to(plan.device).eval()

    @torch.no_grad()
    def generate(self, requests: list[Request], *, image_token: int, count: int) -> list[list[int]]:
        """Greedy tokens; prompts are of one length, so that nothing is padded.

        Pictures are decoded and resized by our code in either case: the models are compared.
        """
        width = self.model.tokens_per_image
        ids = [
            [t for x in r.tokens for t in [x] * (width if x == image_token else 1)]
            for r in requests
        ]
        inputs = {"input_ids": torch.tensor(ids, device=self.plan.device)}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        pixels = [self._pixels(picture_bytes(p)) for r in requests for p in r.images]
        if pixels:
            inputs["pixel_values"] = torch.stack(pixels).to(self.plan.device, self.plan.dtype)
        out = self._stock.generate(
            **inputs,
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
        return out[:, inputs["input_ids"].shape[1] :].tolist()

    def _pixels(self, data: bytes) -> torch.Tensor:
        vision = self.model.vision
        assert vision is not None
        pixels = load_image(data, image_size=vision.image_size, augment_seed=None)
        return pixels.float() / 127.5 - 1


def _pictures(count: int) -> list[bytes]:
    found = []
    for seed in range(count):
        generator = np.random.Generator(np.random.PCG64(seed))
        small = Image.fromarray(generator.integers(0, 256, (12, 16, 3)).astype(np.uint8))
        file = io.BytesIO()
        small.resize(_PICTURE_SIZE).save(file, format="JPEG")
        found.append(file.getvalue())
    return found


def make_requests(
    count: int, *, pictures: bool, image_token: int, tokens: int, vocab: int
) -> list[Request]:
    """Prompts of one length with tokens of their own, each with a picture of its own or none."""
    generator = np.random.Generator(np.random.PCG64(count))
    images = _pictures(count) if pictures else []
    sampling = Sampling(max_tokens=tokens, ignore_end=True)
    requests = []
    for number in range(count):
        text = generator.integers(1, vocab - 1, _TEXT_TOKENS).tolist()
        if pictures:
            requests.append(Request((image_token, *text), (images[number],), sampling))
        else:
            requests.append(Request(tuple(text), (), sampling))
    return requests


class Bench:
    """Both models, loaded, and the rows that come out."""

    def __init__(self, plan: Plan, folder: Path):
        self.plan = plan
        self.model = ModelConfig.model_validate(PRESETS[plan.preset])
        self.rows: list[Figure] = []
        with _step("random weights", plan):
            self.image_token = make_model(folder / "model", self.model, plan)
        start = self._allocated()
        with _step("loading ours", plan):
            self.engine = self._load(folder / "model")
        self.own_bytes = self._allocated() - start
        with _step("loading transformers'", plan):
            self.stock = Stock(folder / "model", self.model, plan)
        self.stock_bytes = self._allocated() - start - self.own_bytes

    def _load(self, folder: Path) -> Engine:
        loaded = load_model(
            folder,
            device=self.plan.device,
            dtype=self.plan.dtype,
            kernels=None if self.plan.fused else TorchKernels(),
        )
        return Engine(loaded, image_token=self.image_token, max_rows=max(self.plan.batches))

    @property
    def _on_gpu(self) -> bool:
        return self.plan.device.type == "cuda"

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated() if self._on_gpu else 0

    def add(self, name: str, value: float, unit: str, *, bar: float | None = None) -> None:
        """A row that is fine from its bar on."""
        self.rows.append(at_least(name, value, unit, bar))

    def requests(self, batch: int, pictures: bool, *, tokens: int) -> list[Request]:
        """Prompts of this benchmark."""
        return make_requests(
            batch,
            pictures=pictures,
            image_token=self.image_token,
            tokens=tokens,
            vocab=self.model.llm.vocab_size,
        )

    def _seconds(self, work: Callable[[], Any]) -> float:
        if self._on_gpu:
            torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        if self._on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def _forget(self) -> None:
        """Empty the cache of embeddings, so that pictures are encoded as transformers does."""
        assert self.engine.pictures is not None
        self.engine.pictures.cache = EmbeddingCache()

    def _ours(self, requests: list[Request], *, forget: bool = True) -> float:
        if forget:
            self._forget()
        return self._seconds(lambda: self.engine.generate(requests))

    def _theirs(self, requests: list[Request]) -> float:
        count = requests[0].sampling.max_tokens
        return self._seconds(
            lambda: self.stock.generate(requests, image_token=self.image_token, count=count)
        )

    def speed(self, batch: int, pictures: bool) -> None:
        """Tokens a second of whole calls, prompts and pictures included, one after the other."""
        what = f"batch {batch}, {'one picture each' if pictures else 'text'}"
        tokens = self.plan.tokens
        requests = self.requests(batch, pictures, tokens=tokens)
        with _step(f"{what}: warm-up", self.plan):
            self._ours(requests)
            self._theirs(self.requests(batch, pictures, tokens=2))
        ours, theirs = [], []
        with _step(f"{what}: {self.plan.rounds} rounds", self.plan):
            for _ in range(self.plan.rounds):
                ours.append(self._ours(requests))
                theirs.append(self._theirs(requests))
        made = batch * tokens
        own, stock = made / median(ours), made / median(theirs)
        self.add(f"{what}: ours", own, "tokens/s")
        self.add(f"{what}: transformers", stock, "tokens/s")
        bar = SPEED_UP if batch == 1 and self._on_gpu else None
        if batch == 1 and self._on_gpu and not pictures:
            rate = own * self.engine.decoder.num_bytes / 1e12
            self.add(f"{what}: weights read", rate, "TB/s")
        self.add(f"{what}: ours / transformers", own / stock, "times", bar=bar)

    def first_token(self, pictures: bool) -> None:
        """Time to the first token at batch 1, and what a picture that is known saves."""
        what = f"first token, {'one picture' if pictures else 'text'}"
        requests = self.requests(1, pictures, tokens=1)
        with _step(what, self.plan):
            self._ours(requests)
            self._theirs(requests)
            times = [(self._ours(requests), self._theirs(requests)) for _ in range(5)]
            known = [self._ours(requests, forget=False) for _ in range(5)]
        ours, theirs = (1000 * median(column) for column in zip(*times, strict=True))
        self.add(f"{what}: ours", ours, "ms")
        self.add(f"{what}: transformers", theirs, "ms")
        if pictures:
            self.add(f"{what}: ours, picture in the cache", 1000 * median(known), "ms")
            self.add(
                "first token: new picture / known picture", ours / 1000 / median(known), "times"
            )

    def memory(self, batch: int) -> None:
        """Greatest memory of a call with pictures, weights included."""
        if not self._on_gpu:
            return
        requests = self.requests(batch, True, tokens=self.plan.tokens)
        with _step(f"memory at batch {batch}", self.plan):
            for name, work, other in (
                ("ours", self._ours, self.stock_bytes),
                ("transformers", self._theirs, self._allocated() - self.stock_bytes),
            ):
                torch.cuda.reset_peak_memory_stats()
                work(requests)
                peak = torch.cuda.max_memory_allocated() - other
                self.add(f"batch {batch}, one picture each: memory, {name}", peak / 1e9, "GB")

    def agreement(self) -> None:
        """Greedy tokens of both; in BF16 near ties of random weights part them."""
        requests = self.requests(max(self.plan.batches), True, tokens=_COMPARED_TOKENS)
        with _step("agreement", self.plan):
            ours = [answers[0].tokens for answers in self.engine.generate(requests)]
            theirs = self.stock.generate(
                requests, image_token=self.image_token, count=_COMPARED_TOKENS
            )
        same = [
            x == y for a, b in zip(ours, theirs, strict=True) for x, y in zip(a, b, strict=True)
        ]
        first = [a[0] == b[0] for a, b in zip(ours, theirs, strict=True)]
        exact = 1.0 if self.plan.dtype == torch.float32 else None
        self.add(
            "greedy tokens that agree with transformers'", sum(same) / len(same), "share", bar=exact
        )
        self.add("first tokens that agree", sum(first) / len(first), "share", bar=exact)

    def variants(self) -> None:
        """What the fused kernels and the recorded steps are worth at batch 1."""
        if not (self._on_gpu and self.plan.fused):
            return
        requests = self.requests(1, False, tokens=self.plan.tokens)
        used, graphs = self.engine.decoder.kernels, self.engine.graphs
        kinds: list[tuple[str, Kernels, bool]] = [
            ("PyTorch's kernels", TorchKernels(), True),
            ("steps not recorded", used, False),
        ]
        for name, kernels, recorded in kinds:
            with _step(f"variant: {name}", self.plan):
                self.engine.use(kernels, graphs=recorded)
                self._ours(requests)
                speed = self.plan.tokens / median([self._ours(requests) for _ in range(3)])
            self.add(f"batch 1, text: {name}", speed, "tokens/s")
        self.engine.use(used, graphs=graphs)


def bench_generate_rows(plan: Plan, folder: Path) -> list[Figure]:
    """All rows; `folder` takes one copy of the weights."""
    bench = Bench(plan, folder)
    bench.agreement()
    for batch in plan.batches:
        for pictures in (False, True):
            bench.speed(batch, pictures)
    for pictures in (False, True):
        bench.first_token(pictures)
    bench.variants()
    bench.memory(max(plan.batches))
    return bench.rows
