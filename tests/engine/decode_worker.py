"""One rank of the decoding launch: answers of every layout that this number of ranks can hold.

Alone, the rank also answers by a plain loop over the modules, one prompt at a time.
"""

import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ghostvis_mega.data.batch import ImageSlot, MicroBatch
from ghostvis_mega.engine.decode import GreedyDecoder, Prompt
from ghostvis_mega.engine.step import TrainEngine
from ghostvis_mega.model.inputs import model_input
from ghostvis_mega.parallel.cpu_shim import apply_cpu_shim
from ghostvis_mega.parallel.groups import build_groups, destroy_groups
from ghostvis_mega.parallel.plan import Degrees
from ghostvis_mega.perf.certify.problem import IMAGE_TOKEN, make_run
from tests.launch import write_result

NEW_TOKENS = 5
VOCABULARY = 110
"""The model has a few rows more, which no tokenizer knows; some would be best."""
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Layout:
    """One way to cut the model, and how many prompts run side by side."""

    name: str
    ranks: int
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    stage: int = 1
    rows: int = 64


LAYOUTS = [
    Layout("alone", 1),
    Layout("alone, in rounds of 2", 1, rows=2),
    Layout("tp2 pp2", 4, tensor=2, pipeline=2),
    Layout("tp2 pp2, in rounds of 2", 4, tensor=2, pipeline=2, rows=1),
    Layout("dp2 pp2", 4, pipeline=2),
    Layout("dp2 pp2, in rounds of 2", 4, pipeline=2, rows=1),
    Layout("dp4 zero3", 4, stage=3, rows=2),
    Layout("cp2 dp2, in rounds of 2", 4, context=2, rows=1),
    Layout("tp2 cp2", 4, tensor=2, context=2),
    Layout("pp2 cp2, in rounds of 2", 4, pipeline=2, context=2, rows=2),
    Layout("cp4", 4, context=4),
]


def make_prompts() -> dict[str, list[Prompt]]:
    """Ragged prompts with no, one and two pictures; the same with other pictures; too few; none."""
    generator = torch.Generator().manual_seed(5)
    prompts = []
    for length, pictures in ((9, ()), (3, (4,)), (6, (1, 2)), (1, ()), (12, (2,)), (5, (3, 3))):
        text = torch.randint(8, 128, (length,), generator=generator).tolist()
        # The pictures stand inside the text, one after the first token, others before the last.
        for number in range(len(pictures)):
            text.insert(1 if number == 0 else len(text) - 1, IMAGE_TOKEN)
        prompts.append(Prompt(tokens=tuple(text), image_ids=pictures))
    others = [
        Prompt(tokens=p.tokens, image_ids=tuple(image + 5 for image in p.image_ids))
        for p in prompts
    ]
    return {"all": prompts, "other pictures": others, "one": prompts[4:5], "none": []}


def load_pixels(image_ids: Sequence[int]) -> torch.Tensor:
    """Pictures that are functions of their ids: uint8 [n, 3, 16, 16]."""
    pictures = torch.zeros((len(image_ids), 3, 16, 16), dtype=torch.uint8)
    for picture, image in zip(pictures, image_ids, strict=True):
        generator = torch.Generator().manual_seed(image)
        picture.copy_(torch.randint(0, 256, picture.shape, generator=generator, dtype=torch.uint8))
    return pictures


def answer_plainly(
    engine: TrainEngine, prompt: Prompt, *, stop_token: int, vocabulary: int = VOCABULARY
) -> list[int]:
    """One prompt alone: no padding, no schedule, no exchange."""
    (chunk,) = engine.parts.chunks
    width = engine.run.model.tokens_per_image
    tokens: list[int] = []
    slots: list[ImageSlot] = []
    images = iter(prompt.image_ids)
    for token in prompt.tokens:
        if token == IMAGE_TOKEN:
            slots.append(ImageSlot(image_id=next(images), row=0, start=len(tokens)))
        tokens += [token] * (width if token == IMAGE_TOKEN else 1)
    vision = None
    if slots:
        encoded = engine.parts.encoder(load_pixels([slot.image_id for slot in slots]))
        vision = encoded.flatten(0, 1)
    answer: list[int] = []
    while len(answer) < NEW_TOKENS:
        text = torch.tensor([tokens + answer])
        batch = MicroBatch(
            tokens_BS=text,
            labels_BS=torch.zeros_like(text),
            weights_BS=torch.zeros(text.shape),
            positions_BS=torch.arange(text.shape[1])[None],
            cu_seqlens=None,
            max_seqlen=text.shape[1],
            images=tuple(slots),
            sample_ids=(),
        )
        inputs = model_input(batch, tokens_per_image=width, device=CPU, for_sdpa=True)
        hidden_SBH = chunk(inputs, vision)
        scores_1V = chunk.logits(hidden_SBH, torch.tensor([text.shape[1] - 1]))
        token = int(scores_1V[0, :vocabulary].argmax())
        if token == stop_token:
            break
        answer.append(token)
    return answer


def measure(layout: Layout, folder: Path, *, stop_token: int) -> dict[str, Any]:
    """Answers to every list of prompts; also whether the modules are left as they were."""
    degrees = ("tensor", "pipeline", "context")
    parallel = {name: getattr(layout, name) for name in degrees}
    # A tied head would mostly repeat the last token.
    model = {"llm": {"tied_embeddings": False, "init_std": 0.15}}
    run = make_run(folder, stage=layout.stage, parallel=parallel, model=model)
    groups = build_groups(Degrees.of(run, world_size=layout.ranks), seed=1)
    engine = TrainEngine(run, groups, device=CPU)
    decoder = GreedyDecoder(
        engine,
        image_token=IMAGE_TOKEN,
        stop_token=stop_token,
        vocab_size=VOCABULARY,
        load_pixels=load_pixels,
        rows=layout.rows,
    )
    lists = make_prompts()
    answers = {n: decoder.answers(p, max_new_tokens=NEW_TOKENS) for n, p in lists.items()}
    gathered: list[Any] = [None] * layout.ranks
    dist.all_gather_object(gathered, answers)
    row = {
        "answers": answers,
        "ranks_agree": all(other == answers for other in gathered),
        "training": all(chunk.training for chunk in engine.parts.chunks),
    }
    if layout.ranks == 1:
        with torch.no_grad():
            row["plain"] = {
                name: [answer_plainly(engine, p, stop_token=stop_token) for p in prompts]
                for name, prompts in lists.items()
            }
            row["unknown tokens too"] = [
                answer_plainly(engine, p, stop_token=stop_token, vocabulary=128)
                for p in lists["all"]
            ]
    engine.close()
    destroy_groups()
    return row


def main() -> None:
    for name in ("DeepSpeed", "ghostvis_mega"):
        logging.getLogger(name).setLevel(logging.ERROR)
    stop_token, names = int(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    apply_cpu_shim()
    dist.init_process_group("gloo")
    folder = Path(os.environ["LAUNCH_FOLDER"]) / f"rank{dist.get_rank()}"
    folder.mkdir()
    results = {}
    for layout in LAYOUTS:
        if layout.name not in names:
            continue
        began = time.perf_counter()
        results[layout.name] = measure(layout, folder, stop_token=stop_token)
        if dist.get_rank() == 0:
            print(layout.name, round(time.perf_counter() - began, 1), flush=True)
    if dist.get_rank() == 0:
        write_result(results)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
