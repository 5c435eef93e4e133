"""A GPU: fused kernels, recorded steps and two ranks answer as one plain process on the CPU."""

import json
from pathlib import Path

import pytest
import torch

from ghostvis_mega.config.schema import ModelConfig
from ghostvis_mega.generate.bench import PRESETS, Plan, make_model, make_requests
from ghostvis_mega.generate.engine import Engine, Request
from ghostvis_mega.generate.kernels import TorchKernels
from ghostvis_mega.generate.load import load_model
from ghostvis_mega.generate.sampling import Sampling
from ghostvis_mega.generate.triton_kernels import TritonKernels
from ghostvis_mega.utils.launch import run_ranks
from tests.generate.models import CPU, PROMPTS, Made, engine_of, request

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """Directory and image token; its head dim fits the fused kernels."""
    folder = tmp_path_factory.mktemp("gpu") / "model"
    settings = {**PRESETS["tiny"], "llm": {**PRESETS["tiny"]["llm"], "init_std": 0.1}}
    plan = Plan(preset="tiny", device=CPU)
    return folder, make_model(folder, ModelConfig.model_validate(settings), plan)


def engine(model: tuple[Path, int], device: torch.device, **options) -> Engine:
    return Engine(
        load_model(model[0], device=device, dtype=torch.float32), image_token=model[1], **options
    )


def mixed(model: tuple[Path, int]) -> list[Request]:
    """Greedy and drawn answers of many lengths, with pictures and without."""
    found = []
    for pictures in (False, True):
        for number, asked in enumerate(
            make_requests(4, pictures=pictures, image_token=model[1], tokens=9, vocab=512)
        ):
            options = (
                {},
                {"temperature": 1.0, "seed": 5},
                {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "n": 2},
                {"repetition_penalty": 1.3},
            )[number]
            sampling = Sampling(max_tokens=6 + 7 * number, **options)
            found.append(Request(asked.tokens, asked.images, sampling))
    return found


def test_a_gpu_answers_as_the_cpu(model):
    requests = mixed(model)
    wanted = engine(model, CPU).generate(requests)
    for kernels, graphs, rows in (
        (TorchKernels(), False, 8),
        (TorchKernels(), True, 8),
        (TritonKernels(), False, 8),
        (TritonKernels(), True, 3),
        (TritonKernels(), True, 1),
    ):
        ours = engine(model, GPU, max_rows=rows, graphs=graphs)
        ours.use(kernels, graphs=graphs)
        # Twice: what is recorded serves again.
        for _ in range(2):
            found = ours.generate(requests)
            for one, other in zip(wanted, found, strict=True):
                assert [a.tokens for a in one] == [b.tokens for b in other]
                for a, b in zip(one, other, strict=True):
                    torch.testing.assert_close(
                        torch.tensor(a.logprobs), torch.tensor(b.logprobs), rtol=0, atol=1e-3
                    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_kernels_compute_what_pytorch_does(dtype: torch.dtype):
    generator = torch.Generator(GPU).manual_seed(0)
    one, other = TritonKernels(), TorchKernels()
    bound = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 0, "atol": 2e-5}

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=GPU).to(dtype)

    for rows in (1, 5):
        hidden, change, weight = random(rows, 1536), random(rows, 1536), random(1536)
        for added in (None, change):
            pairs = zip(
                one.add_norm(hidden, added, weight, 1e-6),
                other.add_norm(hidden, added, weight, 1e-6),
                strict=True,
            )
            for a, b in pairs:
                torch.testing.assert_close(a, b, **bound)
        wide = random(rows, 2 * 8960)
        torch.testing.assert_close(
            one.activate(wide, "swiglu"), other.activate(wide, "swiglu"), **bound
        )
        matrix, bias = random(2048, 1536) / 40, random(2048)
        torch.testing.assert_close(
            one.linear(hidden, matrix, bias), other.linear(hidden, matrix, bias), **bound
        )
        for groups, queries, size in ((2, 6, 128), (4, 7, 128), (3, 3, 64)):
            angles = torch.randn(700, size // 2, generator=generator, device=GPU)
            rotary = torch.cat([angles.cos(), angles.sin()], dim=1)
            lengths = torch.tensor([699, 0, 31, 32, 500][:rows], device=GPU)
            qkv = random(rows, groups * (queries + 2) * size)
            caches = [random(8, groups, 700, size) for _ in range(2)]
            copies = [cache.clone() for cache in caches]
            heads = (groups, queries, size)
            a = one.attend(qkv, heads, rotary, lengths, *caches)
            b = other.attend(qkv, heads, rotary, lengths, *copies)
            torch.testing.assert_close(a, b, **bound)
            for x, y in zip(caches, copies, strict=True):
                torch.testing.assert_close(x, y, **bound)


@pytest.mark.world_size(2)
def test_two_gpus_answer_as_one(made: Made, tmp_path: Path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    path = made["llava-siglip"][1]
    worker = Path(__file__).with_name("tensor_worker.py")
    run_ranks(
        [str(worker), json.dumps({"model": str(path)}), "cuda"],
        ranks=2,
        timeout_s=240,
        folder=tmp_path / "ranks",
        environment={"OMP_NUM_THREADS": "1"},
    )
    found = json.loads((tmp_path / "ranks" / "result.json").read_text())["model"]
    requests = [request(prompt, max_tokens=6) for prompt in PROMPTS]
    requests.append(request(PROMPTS[0], max_tokens=6, temperature=1.1, top_k=30, n=2, seed=9))
    answers = [own for answers in engine_of(path).generate(requests) for own in answers]
    assert found["tokens"] == [list(own.tokens) for own in answers]
