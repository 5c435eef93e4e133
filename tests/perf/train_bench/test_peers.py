"""Ours and all peers on the same data: they learn, count alike, and compute the same loss."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ghostvis_mega.config.load import load_run_config
from ghostvis_mega.config.schema import RunConfig
from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.engine.build import build_chunks
from ghostvis_mega.model.flops import batch_flops
from ghostvis_mega.perf.synthetic_data import write_synthetic
from ghostvis_mega.perf.train_bench.execute import build_trainer
from ghostvis_mega.perf.train_bench.plain_vlm import PlainVLM, eager_attention
from ghostvis_mega.perf.train_bench.results import StepRecord
from ghostvis_mega.perf.train_bench.trace import traced_step
from ghostvis_mega.perf.train_bench.trace_reading import read_step
from ghostvis_mega.perf.train_bench.trainer import measure
from ghostvis_mega.train.feed import Feed
from ghostvis_mega.train.watchdog import Watchdog

if TYPE_CHECKING:
    from ghostvis_mega.parallel.groups import Groups

# Of Megatron-Core's own optimizer, about itself.
pytestmark = [
    pytest.mark.filterwarnings("ignore:MimoModelConfig is experimental"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore::FutureWarning:megatron.core"),
    pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning"),
]
CPU = torch.device("cpu")
LENGTH, STEPS = 64, 5
PEERS = ("megatron", "hf", "naive")
TEXT = ("model.vision=null", "model.connector=null", "optim.lr.llm=1e-3")


@pytest.fixture(scope="module", autouse=True)
def place() -> Iterator[None]:
    """DeepSpeed takes this process's place from the environment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.gvd"
    count = 64
    write_synthetic(
        path,
        text_lengths=np.full(count, LENGTH, dtype=np.int64),
        image_of=np.full(count, -1, dtype=np.int64),
        vocab_size=64,
        train_all=True,
    )
    return path


def make_run(data: Path, folder: Path, *more: str) -> RunConfig:
    overrides = (
        f"data.train={data}",
        "data.heldout=null",
        f"train.steps={STEPS + 1}",
        "optim.warmup_steps=0",
        "optim.schedule=constant",
        "data.augment=false",
        "batch.global_size=4",
        "log.evaluate=false",
        "log.preview_steps=[]",
        "guards.spike=none",
        f"log.output={folder}",
    )
    return load_run_config("examples/configs/vlm_tiny_easyvqa.yaml", [*overrides, *more])


def text_run(kind: str, text: Path, folder: Path) -> RunConfig:
    """Four samples a step: two packs of two, or two micro-batches of two rows."""
    if kind == "ours":
        packs = (f"data.seq_length={2 * LENGTH}", "batch.global_size=2", "data.pack_algorithm=bfd")
        return make_run(text, folder, *TEXT, *packs)
    rows = (f"data.seq_length={LENGTH}", "data.packing=false", "batch.micro_size=2")
    return make_run(text, folder, *TEXT, *rows)


def train(kind: str, run: RunConfig, groups: "Groups", *, steps: int = STEPS) -> list[StepRecord]:
    watchdog = Watchdog(timeout_s=600, rank=0, world_size=1)
    try:
        trainer = build_trainer(kind, run, groups, device=CPU, watchdog=watchdog)
        measurement = measure(trainer, steps=steps, device=CPU, progress=watchdog.alive)
        trainer.close()
    finally:
        watchdog.close()
    assert measurement.allocated_bytes is None, "a CPU has no allocator to ask"
    return measurement.steps


@pytest.fixture(scope="module")
def records(
    groups: "Groups", text: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[StepRecord]]:
    found = {}
    for kind in ("ours", *PEERS):
        folder = tmp_path_factory.mktemp(kind)
        found[kind] = train(kind, text_run(kind, text, folder), groups)
    return found


@pytest.mark.parametrize("kind", ["ours", *PEERS])
def test_it_learns(records: dict[str, list[StepRecord]], kind: str) -> None:
    losses = [record.loss for record in records[kind]]
    # Random weights of this spread begin above the uniform guess; only 61 of 512 tokens occur.
    assert losses[0] > np.log(512)
    assert losses[-1] < losses[0] - 0.2


@pytest.mark.parametrize("kind", PEERS)
def test_a_peer_counts_as_ours(records: dict[str, list[StepRecord]], kind: str) -> None:
    for ours, peer in zip(records["ours"], records[kind], strict=True):
        assert peer.tokens == ours.tokens == 4 * LENGTH
        assert peer.trained_tokens == ours.trained_tokens == 4 * (LENGTH - 1)
        assert peer.flops_llm == ours.flops_llm > 0
        assert peer.flops_vision == ours.flops_vision == 0


def test_two_peers_of_equal_weights_have_equal_losses(
    records: dict[str, list[StepRecord]], text: Path, tmp_path: Path, groups: "Groups"
) -> None:
    """SDPA under DeepSpeed and eager attention under autograd alone: one seed, one objective."""
    runs = {kind: text_run(kind, text, tmp_path) for kind in ("hf", "naive")}
    losses = {}
    for kind, run in runs.items():
        torch.manual_seed(3)
        losses[kind] = [record.loss for record in train(kind, run, groups)]
    assert losses["hf"] == pytest.approx(losses["naive"], abs=2e-4)
    # Another clip is another run: the comparison would see it.
    torch.manual_seed(3)
    clipped = text_run("naive", text, tmp_path)
    clipped = clipped.model_copy(update={"optim": clipped.optim.model_copy(update={"lr": _slow()})})
    other = [record.loss for record in train("naive", clipped, groups)]
    assert other != pytest.approx(losses["naive"], abs=2e-4)


@pytest.mark.parametrize(("layer", "same"), [("", True), ("decoder.layers.1.mlp", False)])
def test_megatron_core_with_our_weights_has_our_loss(
    text: Path, tmp_path: Path, groups: "Groups", layer: str, same: bool
) -> None:
    """Its model and its updates are ours; without one layer's MLP weights it is another."""
    from ghostvis_mega.perf.train_bench.megatron_peer import MegatronTrainer

    run = text_run("megatron", text, tmp_path)
    trainer = MegatronTrainer(run, groups, device=CPU, fused_wgrad=False)
    theirs = dict(trainer.model.module.named_parameters())
    # Ours on the same rows; packs would hold other samples.
    expected = [record.loss for record in train("ours", run, groups)]
    (chunk,) = build_chunks(run, groups, device=CPU, dtype=torch.float32)
    ours = dict(chunk.named_parameters())
    ours["embedding.word_embeddings.weight"] = ours.pop("embedding.weight")
    assert {n: p.shape for n, p in ours.items()} == {n: p.shape for n, p in theirs.items()}
    with torch.no_grad():
        for name, parameter in ours.items():
            if not (layer and name.startswith(layer)):
                theirs[name].copy_(parameter)
    losses = [trainer.step(step).loss for step in range(len(expected))]
    trainer.close()
    assert (losses[0] == pytest.approx(expected[0], abs=1e-5)) is same
    # Adam makes whole updates out of rounding where a gradient is nothing else, as of key biases.
    assert (losses == pytest.approx(expected, abs=2e-4)) is same, (losses, expected)


def _slow():
    from ghostvis_mega.config.schema import LearningRates

    return LearningRates(llm=1e-5)


def test_flops_of_the_peer_are_those_that_are_counted(
    text: Path, tmp_path: Path, groups: "Groups"
) -> None:
    """What PyTorch's counter sees in the naive model, which multiplies all s x s scores and runs
    the head on every position."""
    from ghostvis_mega.perf.train_bench.naive_peer import NaiveTrainer
    from ghostvis_mega.perf.train_bench.plain_vlm import plain_input

    run = text_run("naive", text, tmp_path)
    trainer = NaiveTrainer(run, groups, device=CPU)
    _, work = Feed(run, groups, Dataset.open(text)).get(0)
    inputs = plain_input(work.micro_batches[0], {}, used=LENGTH, tokens_per_image=0, device=CPU)
    with FlopCounterMode(display=False) as counter:
        trainer.model(inputs, loss_divisor=1.0).backward()
    trainer.close()
    expected = batch_flops(
        run.model,
        segments=[LENGTH] * 2,
        head_rows=2 * LENGTH,
        num_images=0,
        trained=run.trained_modules,
        attention="full",
    )
    assert counter.get_total_flops() == pytest.approx(expected.total, rel=1e-3)
    halved = batch_flops(
        run.model, segments=[LENGTH] * 2, head_rows=2 * LENGTH, num_images=0, trained=("llm",)
    )
    assert counter.get_total_flops() != pytest.approx(halved.total, rel=1e-3)


@pytest.fixture(scope="module")
def with_pictures(
    groups: "Groups", easy_vqa: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[StepRecord]]:
    found = {}
    for kind in ("ours", "hf", "naive"):
        rows = () if kind == "ours" else ("data.packing=false", "batch.micro_size=2")
        folder = tmp_path_factory.mktemp(kind)
        run = make_run(easy_vqa / "train.gvd", folder, "data.seq_length=128", *rows)
        torch.manual_seed(5)
        found[kind] = train(kind, run, groups, steps=3)
    return found


@pytest.mark.parametrize("kind", ["ours", "hf", "naive"])
def test_pictures_are_seen_and_counted(
    with_pictures: dict[str, list[StepRecord]], kind: str
) -> None:
    for record in with_pictures[kind]:
        assert record.images > 0
        assert record.flops_vision > 0
    assert with_pictures[kind][-1].loss < with_pictures[kind][0].loss


def test_one_tower_call_or_many_is_the_same_model(
    with_pictures: dict[str, list[StepRecord]],
) -> None:
    hf, naive = ([r.loss for r in with_pictures[kind]] for kind in ("hf", "naive"))
    assert hf == pytest.approx(naive, abs=2e-4)


def test_only_the_naive_baselines_tower_is_eager(easy_vqa: Path, tmp_path: Path) -> None:
    run = make_run(easy_vqa / "train.gvd", tmp_path, "data.packing=false")
    found = {
        attention: PlainVLM(run, dtype=torch.float32, device=CPU, attention=attention).encoder
        for attention in ("eager", "sdpa")
    }
    pixels_N3hw = torch.randint(0, 256, (2, 3, *2 * (run.model.vision.image_size,)))
    for attention, encoder in found.items():
        for layer in encoder.tower.encoder.layers:
            assert (layer.self_attn.attend is eager_attention) == (attention == "eager")
    with torch.no_grad():
        eager, sdpa = (encoder(pixels_N3hw.to(torch.uint8)) for encoder in found.values())
    torch.testing.assert_close(eager, sdpa, rtol=1e-4, atol=1e-6)


def test_a_step_is_traced(text: Path, tmp_path: Path, groups: "Groups") -> None:
    run = text_run("naive", text, tmp_path)
    watchdog = Watchdog(timeout_s=600, rank=0, world_size=1)
    try:
        trainer = build_trainer("naive", run, groups, device=CPU, watchdog=watchdog)
        figures = traced_step(trainer, step=0, folder=tmp_path / "traces", name="a b", device=CPU)
        trainer.close()
    finally:
        watchdog.close()
    found = {figure["name"]: figure["value"] for figure in figures}
    assert found["step"] > 0
    assert 0 < found["GEMM"] < 100
    assert sum(found[k] for k in ("GEMM", "attention", "loss", "optimizer", "other")) < 100
    (file,) = (tmp_path / "traces").iterdir()
    assert file.name == "a-b-rank0.json.gz"
    step = read_step(file, on_gpu=False)
    assert {section.name for section in step.sections} == {"forward and backward", "optimizer"}
    for section in step.sections:
        assert step.start_us < section.start_us < section.end_us < step.end_us
