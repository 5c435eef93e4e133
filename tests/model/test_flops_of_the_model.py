"""FLOPs from sizes against what torch counts while the modules of the model itself run."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ghostvis_mega.config.presets import MODEL_PRESETS
from ghostvis_mega.config.schema import ModelConfig, Module
from ghostvis_mega.data.batch import ImageSlot, MicroBatch
from ghostvis_mega.model.flops import BatchFlops, PartFlops, batch_flops
from ghostvis_mega.model.inputs import model_input
from ghostvis_mega.model.llm import LLMChunk
from ghostvis_mega.model.vision import VisionEncoder
from ghostvis_mega.parallel.groups import Groups
from tests.model.llm_cases import CPU, make_llm

ROWS, LENGTH, IMAGES = 2, 48, 3


def model_of(**llm: object) -> ModelConfig:
    """The demo's model, with other settings of its LLM."""
    preset = MODEL_PRESETS["vlm_tiny"]
    return ModelConfig(**{**preset, "llm": {**preset["llm"], **llm}})


def make_batch(model: ModelConfig) -> MicroBatch:
    """Two rows with three pictures; the last five tokens of a row are trained."""
    generator = torch.Generator().manual_seed(0)
    tokens_BS = torch.randint(8, 500, (ROWS, LENGTH), generator=generator)
    weights_BS = torch.zeros(ROWS, LENGTH)
    weights_BS[:, -6:-1] = 1.0
    width = model.tokens_per_image
    places = [(0, 1), (1, 2), (1, 3 + width)]
    return MicroBatch(
        tokens_BS=tokens_BS,
        labels_BS=tokens_BS.roll(-1, dims=1) * (weights_BS > 0),
        weights_BS=weights_BS,
        positions_BS=torch.arange(LENGTH).expand(ROWS, LENGTH),
        cu_seqlens=None,
        max_seqlen=LENGTH,
        images=tuple(ImageSlot(image_id=i, row=r, start=s) for i, (r, s) in enumerate(places)),
        sample_ids=(0, 1),
    )


def freeze(chunk: LLMChunk, encoder: VisionEncoder, trained: set[Module]) -> None:
    """Only the named modules train."""
    parts: dict[Module, nn.Module] = {
        "llm": chunk,
        "vision": encoder.tower,
        "resampler": encoder.resampler,
        "projector": encoder.projector,
    }
    for name, part in parts.items():
        if name not in trained:
            part.requires_grad_(False)


def count(
    model: ModelConfig,
    groups: Groups,
    *,
    trained: set[Module],
    recompute: str = "none",
    fused_loss: bool = False,
) -> BatchFlops:
    """One step through encoder, LLM and loss; the picture embeddings are leaves, as in training."""
    chunk = make_llm(model.llm, groups, recompute=recompute, fused_loss=fused_loss)
    encoder = VisionEncoder(model)
    freeze(chunk, encoder, trained)
    side = model.vision.image_size
    pixels = torch.zeros(IMAGES, 3, side, side, dtype=torch.uint8)
    inputs = model_input(
        make_batch(model), tokens_per_image=model.tokens_per_image, device=CPU, for_sdpa=True
    )
    counters = {name: FlopCounterMode(display=False) for name in ("v+", "v-", "l+", "l-")}
    with sdpa_kernel(SDPBackend.MATH):
        with counters["v+"]:
            embeddings = encoder(pixels)
        seen = embeddings.requires_grad
        leaves = embeddings.detach().requires_grad_(seen)
        with counters["l+"]:
            loss = chunk.loss_sum(chunk(inputs, leaves.flatten(0, 1)), inputs)
        with counters["l-"]:
            loss.backward()
        with counters["v-"]:
            if seen:
                embeddings.backward(leaves.grad)
    total = {name: counter.get_total_flops() for name, counter in counters.items()}
    return BatchFlops(
        llm=PartFlops(total["l+"], total["l-"]), vision=PartFlops(total["v+"], total["v-"])
    )


def predict(model: ModelConfig, *, trained: set[Module], attention: str = "full") -> BatchFlops:
    return batch_flops(
        model,
        segments=[LENGTH] * ROWS,
        head_rows=5 * ROWS,
        num_images=IMAGES,
        trained=trained,
        attention=attention,
        tower_recompute=False,
    )


TRAINED: list[set[Module]] = [
    {"llm", "vision", "projector"},
    {"vision", "projector"},
    {"projector"},
    {"llm"},
    {"llm", "projector"},
]


@pytest.mark.parametrize("trained", TRAINED, ids=lambda names: "+".join(sorted(names)))
def test_a_step_costs_what_torch_counts(groups: Groups, trained: set[Module]) -> None:
    model = model_of()
    counted = count(model, groups, trained=trained)
    assert counted == predict(model, trained=trained)
    assert counted.llm.backward > 0 and (counted.vision.backward > 0) == (trained != {"llm"})


@pytest.mark.parametrize("trained", TRAINED[1:4], ids=lambda names: "+".join(sorted(names)))
def test_a_fused_loss_costs_as_much_and_earlier(groups: Groups, trained: set[Module]) -> None:
    model = model_of()
    counted = count(model, groups, trained=trained, fused_loss=True)
    predicted = predict(model, trained=trained)
    assert counted.llm.total == predicted.llm.total
    # The head's gradients are products of the forward.
    one = 2 * 5 * ROWS * model.llm.hidden_size * model.llm.vocab_size
    early = counted.llm.forward - predicted.llm.forward
    assert early == one * (1 + ("llm" in trained))


@pytest.mark.parametrize(
    "changes",
    [
        {"tied_embeddings": False},
        {"activation": "relu2", "qkv_bias": False},
        {"num_kv_heads": 4},
        {"head_dim": 16, "num_layers": 3},
    ],
    ids=lambda changes: ", ".join(f"{k}={v}" for k, v in changes.items()),
)
def test_every_kind_of_layer_costs_what_torch_counts(groups: Groups, changes: dict) -> None:
    model, trained = model_of(**changes), set(TRAINED[0])
    assert count(model, groups, trained=trained) == predict(model, trained=trained)


def test_a_recomputed_layer_is_counted_apart(groups: Groups) -> None:
    model, trained = model_of(), {"llm"}
    counted = count(model, groups, trained=trained, recompute="full")
    predicted = batch_flops(
        model,
        segments=[LENGTH] * ROWS,
        head_rows=5 * ROWS,
        num_images=IMAGES,
        trained=trained,
        attention="full",
        llm_recompute="full",
    )
    assert counted.llm.forward == predicted.llm.forward
    assert counted.llm.backward == predicted.llm.backward + predicted.llm.recompute


def test_the_count_notices_what_is_wrong(groups: Groups) -> None:
    model, trained = model_of(), set(TRAINED[0])
    counted = count(model, groups, trained=trained)
    # Half of the scores; a head on one row more; a frozen matrix that is said to train.
    assert counted.llm != predict(model, trained=trained, attention="causal").llm
    frozen = count(model, groups, trained={"projector"})
    assert frozen.llm != counted.llm and frozen.vision != counted.vision
    more = batch_flops(
        model,
        segments=[LENGTH] * ROWS,
        head_rows=5 * ROWS + 1,
        num_images=IMAGES,
        trained=trained,
        attention="full",
        tower_recompute=False,
    )
    assert more.llm.total - counted.llm.total == 6 * model.llm.hidden_size * model.llm.vocab_size
