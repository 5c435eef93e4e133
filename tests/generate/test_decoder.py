"""The decoder's scores are the training model's: whole prompts, ragged, and token by token."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ghostvis_mega.generate.engine import Engine
from ghostvis_mega.parallel.groups import Groups
from tests.convert.cases import IMAGE, TEXTS, VLMS
from tests.convert.native_model import NativeModel
from tests.generate.models import PROMPTS, Made, engine_of, pixels, request

FORCED = [[11, 90, 6, 33], [64, 64, 2, 150], [140, 0, 17, 8]]
"""What follows each prompt, whatever the model thinks of it."""
Fault = Callable[[Engine, torch.Tensor, int], torch.Tensor]


def whole_scores(model: NativeModel, prompt: int) -> torch.Tensor:
    """Scores after the prompt and after each forced token, of one whole forward: [5, V]."""
    tokens, ids = PROMPTS[prompt]
    scores = model.logits([*tokens, *FORCED[prompt]], pixels(ids), image=IMAGE)
    return scores[-len(FORCED[prompt]) - 1 :]


@torch.no_grad()
def cached_scores(
    engine: Engine, prompts: list[int], *, fault: Fault | None = None
) -> torch.Tensor:
    """The same of all prompts together, by one prefill and a step a token: [prompts, 5, V]."""
    requests = [request(PROMPTS[i]) for i in prompts]
    lengths = [
        len(r.tokens) + len(r.images) * (engine.model.tokens_per_image - 1) for r in requests
    ]
    cache = engine.decoder.cache(len(prompts), max(lengths) + 8)
    hidden = engine.decoder.prefill(engine._embed(requests, max(lengths)), cache, None)
    rows = torch.arange(len(prompts))
    lengths_R = torch.tensor(lengths)
    found = [engine.decoder.logits(hidden[rows, lengths_R - 1])]
    for column in range(len(FORCED[0])):
        tokens_R = torch.tensor([FORCED[i][column] for i in prompts])
        at_R = lengths_R + column
        if fault is not None:
            at_R = fault(engine, at_R, column)
        found.append(engine.decoder.step(tokens_R, at_R, cache))
    return torch.stack(found, dim=1)


@pytest.mark.parametrize("name", VLMS)
def test_a_ragged_batch_with_pictures_scores_as_in_training(made: Made, groups: Groups, name: str):
    native, export = made[name]
    model = NativeModel(native, groups)
    wanted = torch.stack([whole_scores(model, i) for i in range(3)])
    assert wanted.std() > 0.05
    for path in (native, export):
        found = cached_scores(engine_of(path), [0, 1, 2])
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", TEXTS)
def test_text_models_score_as_in_training(made: Made, groups: Groups, name: str):
    native, export = made[name]
    wanted = whole_scores(NativeModel(native, groups), 0)
    for path in (native, export):
        found = cached_scores(engine_of(path), [0])[0]
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_bf16_is_near(made: Made):
    fp32 = engine_of(made["perceiver-siglip"][1])
    bf16 = engine_of(made["perceiver-siglip"][1], dtype=torch.bfloat16)
    wanted, found = cached_scores(fp32, [0, 1, 2]), cached_scores(bf16, [0, 1, 2])
    assert found.dtype == torch.float32 and not torch.equal(wanted, found)
    alike = torch.cosine_similarity(wanted.flatten(0, 1), found.flatten(0, 1))
    assert alike.min() > 0.999


def cache_off_by_one(engine: Engine, at_R: torch.Tensor, column: int) -> torch.Tensor:
    """The first token goes one position too far, and leaves one that holds nothing."""
    return at_R + 1


def rotary_off_by_one(engine: Engine, at_R: torch.Tensor, column: int) -> torch.Tensor:
    if column == 0:
        engine.decoder.rotary_TD = engine.decoder.rotary_TD.roll(-1, dims=0)
    return at_R


def lengths_ignored(engine: Engine, at_R: torch.Tensor, column: int) -> torch.Tensor:
    """All rows go on behind the longest prompt, across the others' padding."""
    return at_R.max().expand_as(at_R).contiguous()


@pytest.mark.parametrize("fault", [cache_off_by_one, rotary_off_by_one, lengths_ignored])
def test_a_broken_cache_shows(made: Made, groups: Groups, fault: Fault):
    native, _ = made["llava-siglip"]
    model = NativeModel(native, groups)
    wanted = torch.stack([whole_scores(model, i) for i in range(3)])
    found = cached_scores(engine_of(native), [0, 1, 2], fault=fault)
    assert (found - wanted).abs().max() > 1e-2


def test_padding_is_behind_and_costs_nothing(made: Made):
    engine = engine_of(made["llava-siglip"][0])
    together = cached_scores(engine, [0, 1, 2])
    for place in range(3):
        alone = cached_scores(engine, [place])[0]
        torch.testing.assert_close(together[place], alone, rtol=0, atol=1e-5)


def test_one_process_needs_no_training_stack(tmp_path: Path, made: Made):
    """Neither Megatron-Core nor DeepSpeed nor a process group."""
    code = (
        "import sys, torch; from pathlib import Path\n"
        "from ghostvis_mega.generate.load import load_model\n"
        "from ghostvis_mega.generate.engine import Engine, Request\n"
        f"path = Path({str(made['llava-siglip'][0])!r})\n"
        "e = Engine(load_model(path, device=torch.device('cpu'), dtype=torch.float32))\n"
        "from ghostvis_mega.generate.sampling import Sampling\n"
        "asked = Request((7, 8, 9), sampling=Sampling(max_tokens=4))\n"
        "assert len(e.generate([asked])[0][0].tokens) == 4\n"
        "found = [m for m in ('megatron', 'deepspeed', 'transformer_engine') if m in sys.modules]\n"
        "assert not found and not torch.distributed.is_initialized(), found\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
