"""`ghostvis generate`: a trained model answers, from a checkpoint or a Hugging Face directory."""

import json
import os
import sys
import time
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ghostvis_mega.cli.output import EXIT_WRONG_SETTINGS
from ghostvis_mega.utils.errors import GhostVisError
from ghostvis_mega.utils.hardware import has_cuda_device
from ghostvis_mega.utils.launch import launch_self
from ghostvis_mega.utils.logging import setup_logging

if TYPE_CHECKING:
    from ghostvis_mega.generate.engine import Completion, Engine, Request
    from ghostvis_mega.generate.prompts import Prompt
    from ghostvis_mega.generate.text import ModelText

GENERATE_HELP = """Answer prompts with a model: text, one picture or many.

\b
Examples:
  ghostvis generate exports/demo --prompt "What is it?" --image cat.jpg
  ghostvis generate runs/demo/checkpoints/step-00001800 --data datasets/easy-vqa-train.gvd \\
      --prompt "<|image|> and <|image|>: which is red?" --image a.png --image b.png --stream
  ghostvis generate exports/sft --input prompts.jsonl --output answers.jsonl --n 4 --temperature 1
  ghostvis generate Qwen2.5-7B-Instruct --prompt "Hello" --tensor 2

\b
PATH is a checkpoint of any layout or a Hugging Face directory; a checkpoint needs --data,
--tokenizer or --assets for its tokenizer. Pictures stand in front of the text, or where <|image|>
marks them. A line of --input is {"prompt": "...", "images": ["a.png"]} with any option that
differs, or "messages" instead of "prompt".
Exit code: 0 answered, 2 something that was asked cannot be.
"""

DEFAULT_TEMPLATE = "chatml"
_TIMEOUT_S = 6 * 3600.0
Texts = list[str]


class Device(StrEnum):
    """Where to compute."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Precision(StrEnum):
    """Type of weights and activations."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


@dataclass(frozen=True)
class _Asked:
    """The options of the command under their names."""

    path: Path
    prompt: str | None
    image: list[Path] | None
    system: str | None
    input_: Path | None
    output: Path | None
    raw: bool
    n: int
    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int
    stop: list[str] | None
    stream: bool
    logprobs: bool
    data: Path | None
    tokenizer: Path | None
    template: str
    assets: Path | None
    device: Device
    precision: Precision
    tensor: int
    rows: int
    verify: bool
    as_json: bool

    @property
    def on_gpu(self) -> bool:
        """Whether to compute on a GPU."""
        return self.device == Device.cuda or self.device == Device.auto and has_cuda_device()


def generate(
    path: Annotated[Path, typer.Argument(help="Checkpoint or Hugging Face directory.")],
    prompt: Annotated[str | None, typer.Option(help="What to ask.")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="Picture; repeatable.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    input_: Annotated[Path | None, typer.Option("--input", help="JSONL of prompts.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSONL of answers, for --input.")] = None,
    raw: Annotated[bool, typer.Option(help="Go on with the text; no chat template.")] = False,
    n: Annotated[int, typer.Option(help="Answers to each prompt.")] = 1,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the best token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from the k best; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the best that reach p.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Least share of the best's probability.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="1 changes nothing.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Decides the draws.")] = 0,
    stop: Annotated[Texts | None, typer.Option(help="Text that ends; repeatable.")] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Show text as it comes.")] = False,
    logprobs: Annotated[bool, typer.Option("--logprobs", help="Tokens and log-probs.")] = False,
    data: Annotated[Path | None, typer.Option(help="Dataset with the tokenizer.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Tokenizer file.")] = None,
    template: Annotated[str, typer.Option(help="For --tokenizer.")] = DEFAULT_TEMPLATE,
    assets: Annotated[Path | None, typer.Option(help="Hugging Face tokenizer.")] = None,
    device: Annotated[Device, typer.Option(help="auto: a GPU, if there is one.")] = Device.auto,
    precision: Annotated[Precision, typer.Option(help="auto: bf16 on a GPU.")] = Precision.auto,
    tensor: Annotated[int, typer.Option(min=1, help="Ranks that share the model.")] = 1,
    rows: Annotated[int, typer.Option(min=1, help="Answers side by side.")] = 32,
    verify: Annotated[bool, typer.Option(help="Compare files with their SHA-256.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print answers as JSON.")] = False,
) -> None:
    """Answer."""
    asked = _Asked(**locals())
    _check_combination(asked)
    rank = int(os.environ.get("RANK", "0"))
    setup_logging(rank=rank)
    try:
        text, prompts, requests = _read(asked)
        if tensor > 1 and "RANK" not in os.environ:
            kind = "cuda" if asked.on_gpu else "cpu"
            code = launch_self(sys.argv[1:], processes=tensor, device=kind, timeout_s=_TIMEOUT_S)
            raise typer.Exit(code)
        engine, answers, seconds = _answer(asked, text, requests, stream=stream and rank == 0)
    except GhostVisError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(EXIT_WRONG_SETTINGS) from None
    if rank == 0:
        _print(asked, prompts, answers)
        _print_statistics(engine, answers, seconds)


def _check_combination(asked: _Asked) -> None:
    """Options that exclude each other."""
    several = asked.n != 1 or asked.input_ is not None or asked.as_json
    for wrong, name, sentence in (
        (
            (asked.prompt is None) == (asked.input_ is None),
            "--prompt",
            "give one of --prompt and --input",
        ),
        (
            asked.stream and several,
            "--stream",
            "shows one answer: not with --n, --input or --json",
        ),
        (
            asked.output is not None and asked.input_ is None,
            "--output",
            "is for the answers of --input",
        ),
        (
            asked.input_ is not None and bool(asked.image),
            "--image",
            "name pictures in the lines of --input",
        ),
        (
            asked.logprobs and not asked.as_json and asked.output is None,
            "--logprobs",
            "are written by --json or into --output",
        ),
        (
            sum(x is not None for x in (asked.data, asked.tokenizer, asked.assets)) > 1,
            "--tokenizer",
            "give one of --data, --tokenizer and --assets",
        ),
        (
            asked.template != DEFAULT_TEMPLATE and asked.tokenizer is None,
            "--template",
            "is for --tokenizer; others bring their own",
        ),
        (
            asked.input_ is not None
            and asked.output is not None
            and asked.input_.resolve() == asked.output.resolve(),
            "--output",
            "is the file of --input; its prompts would be lost",
        ),
    ):
        if wrong:
            raise typer.BadParameter(sentence, param_hint=name)


def _read(asked: _Asked) -> "tuple[ModelText, list[Prompt], list[Request]]":
    """Everything that can be wrong, before a weight is read."""
    from ghostvis_mega.convert.assets import Assets
    from ghostvis_mega.generate.decoder import check_ranks
    from ghostvis_mega.generate.prompts import make_prompt, make_requests, read_prompts
    from ghostvis_mega.generate.sampling import Sampling
    from ghostvis_mega.generate.text import open_text
    from ghostvis_mega.generate.weights import config_of
    from ghostvis_mega.utils.files import prepare_output

    sampling = Sampling(
        max_tokens=asked.max_tokens,
        temperature=asked.temperature,
        top_k=asked.top_k,
        top_p=asked.top_p,
        min_p=asked.min_p,
        repetition_penalty=asked.repetition_penalty,
        seed=asked.seed,
        n=asked.n,
        stop=tuple(asked.stop or ()),
    )
    if asked.input_ is not None:
        prompts = list(read_prompts(asked.input_, system=asked.system, sampling=sampling))
    else:
        images = asked.image or []
        prompts = [
            make_prompt(asked.prompt or "", images=images, system=asked.system, sampling=sampling)
        ]
    if asked.output is not None:
        prepare_output(asked.output)
    model = config_of(asked.path)
    check_ranks(model.llm, asked.tensor)
    _check_gpus(asked)
    source = Assets(asked.data, asked.tokenizer, asked.template, asked.assets)
    text = open_text(asked.path, source)
    return text, prompts, make_requests(prompts, text, model, raw=asked.raw)


def _check_gpus(asked: _Asked) -> None:
    """Raise where a rank would have no GPU.

    Raises:
        GhostVisError: Says how many there are.
    """
    if not asked.on_gpu:
        return
    import torch

    started = "RANK" in os.environ
    needed = int(os.environ.get("LOCAL_RANK", "0")) + 1 if started else asked.tensor
    if (found := torch.cuda.device_count()) < needed:
        raise GhostVisError(
            f"--device {asked.device.value} with --tensor {asked.tensor} needs {needed} NVIDIA "
            f"GPU{'s'[: needed > 1]} here, torch finds {found}: use --device cpu or fewer ranks"
        )


def _answer(
    asked: _Asked, text: "ModelText", requests: "list[Request]", *, stream: bool
) -> "tuple[Engine, list[list[Completion]], float]":
    """The engine, its answers, and the seconds that they took."""
    import torch

    from ghostvis_mega.generate.engine import Engine
    from ghostvis_mega.generate.load import PRECISIONS, load_model
    from ghostvis_mega.generate.ranks import Alone, join_ranks, leave_ranks
    from ghostvis_mega.generate.text import TextStream

    device = torch.device("cpu")
    if asked.on_gpu:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    name = asked.precision.value
    if name == "auto":
        name = "bf16" if asked.on_gpu else "fp32"
    ranks = join_ranks(device) if asked.tensor > 1 else Alone()
    loaded = load_model(
        asked.path, device=device, dtype=PRECISIONS[name], ranks=ranks, check=asked.verify
    )
    engine = Engine(
        loaded,
        codec=text,
        image_token=text.image_token,
        choices=text.size,
        max_rows=asked.rows,
    )
    shown = TextStream(requests[0].sampling.stop)

    def show(request: int, sample: int, whole: str, final: bool) -> None:
        sys.stdout.write(shown.more(whole, final=final))
        sys.stdout.flush()

    began = time.perf_counter()
    answers = engine.generate(requests, on_text=show if stream else None)
    seconds = time.perf_counter() - began
    if asked.tensor > 1:
        leave_ranks()
    return engine, answers, seconds


def _print(asked: _Asked, prompts: "list[Prompt]", answers: "list[list[Completion]]") -> None:
    from ghostvis_mega.generate.prompts import answer_row
    from ghostvis_mega.utils.files import write_output

    found: list[dict[str, Any]] = [
        answer_row(prompt, own, with_tokens=asked.logprobs)
        for prompt, own in zip(prompts, answers, strict=True)
    ]
    if asked.output is not None:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
        write_output(asked.output, lines.encode())
        typer.echo(f"{len(found)} prompts answered in {asked.output}", err=True)
    elif asked.as_json:
        typer.echo(json.dumps(found, ensure_ascii=False))
    elif asked.stream:
        typer.echo()
    else:
        several = len(prompts) > 1 or len(answers[0]) > 1
        for number, own in enumerate(answers):
            for sample, completion in enumerate(own):
                if several:
                    typer.echo(f"--- prompt {number + 1}, answer {sample + 1}")
                typer.echo(completion.text)


def _print_statistics(engine: "Engine", answers: "list[list[Completion]]", seconds: float) -> None:
    made = sum(len(completion.tokens) for own in answers for completion in own)
    line = f"{made} tokens in {seconds:.2f} s, {made / seconds:.0f} tokens/s"
    if engine.pictures is not None:
        found = engine.pictures.cache.statistics
        line += f"; pictures: {found.misses} encoded, {found.hits} from the cache"
    typer.echo(line, err=True)
