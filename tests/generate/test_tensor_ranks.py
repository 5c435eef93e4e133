"""Two ranks that share each layer answer as one."""

import json
from pathlib import Path

import pytest
import torch

from ghostvis_mega.generate.decoder import Decoder
from ghostvis_mega.generate.ranks import Alone
from ghostvis_mega.generate.weights import open_model
from ghostvis_mega.utils.errors import CheckpointError
from tests.generate.models import CPU, PROMPTS, Made, engine_of, request
from tests.launch import launch

pytestmark = pytest.mark.world_size(2)

# A vocabulary of 157 rows, which two ranks do not divide, tied and not.
NAMES = ("llava-siglip", "qwen2-tied")


def test_two_ranks_answer_as_one(made: Made, tmp_path: Path):
    paths = {name: str(made[name][1]) for name in NAMES}
    worker = Path(__file__).with_name("tensor_worker.py")
    args = [json.dumps(paths), "cpu"]
    found = launch(worker, ranks=1, timeout_s=240, folder=tmp_path / "ranks", args=args)
    for name in NAMES:
        engine = engine_of(made[name][1])
        prompts = PROMPTS if engine.pictures is not None else PROMPTS[:1]
        requests = [request(prompt, max_tokens=6) for prompt in prompts]
        requests.append(request(PROMPTS[0], max_tokens=6, temperature=1.1, top_k=30, n=2, seed=9))
        answers = [own for answers in engine.generate(requests) for own in answers]
        assert found[name]["tokens"] == [list(own.tokens) for own in answers]
        wanted = torch.tensor([own.logprobs for own in answers])
        torch.testing.assert_close(torch.tensor(found[name]["logprobs"]), wanted, rtol=0, atol=1e-5)


class Half(Alone):
    """One of two ranks, whose sums lack the other's part."""

    size = 2

    def join(self, x_RV: torch.Tensor) -> torch.Tensor:
        return torch.cat([x_RV, x_RV], dim=1)


def test_half_of_the_heads_is_not_enough(made: Made):
    with open_model(made["qwen2-tied"][0]) as source:
        half = Decoder(source.model.llm, source.read, device=CPU, dtype=torch.float32, ranks=Half())
    engine = engine_of(made["qwen2-tied"][0])
    tokens = torch.tensor([PROMPTS[0][0]])
    scores = [
        decoder.logits(decoder.prefill(decoder.embed(tokens), decoder.cache(1, 8), None)[0])
        for decoder in (half, engine.decoder)
    ]
    assert (scores[0][:, :70] - scores[1][:, :70]).abs().max() > 0.1


def test_ranks_that_do_not_divide_the_heads_are_refused(made: Made):
    class Three(Half):
        size = 3

    with (
        open_model(made["qwen2"][0]) as source,
        pytest.raises(CheckpointError, match="--tensor 3 does not divide model.llm.num_kv_heads"),
    ):
        Decoder(source.model.llm, source.read, device=CPU, dtype=torch.float32, ranks=Three())
