"""One of two ranks that share each layer: tokens and log-probabilities of a list of prompts."""

import json
import os
import sys
from pathlib import Path

import torch

from ghostvis_mega.generate.engine import Engine
from ghostvis_mega.generate.load import load_model
from ghostvis_mega.generate.ranks import join_ranks, leave_ranks
from tests.convert.cases import IMAGE
from tests.generate.models import CPU, PROMPTS, request
from tests.launch import fork_ranks, write_result


def main() -> None:
    """Answer with each model; all ranks must say the same."""
    device = CPU
    if sys.argv[2] == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    ranks = join_ranks(device)
    found = {}
    for name, path in json.loads(sys.argv[1]).items():
        loaded = load_model(Path(path), device=device, dtype=torch.float32, ranks=ranks)
        engine = Engine(loaded, image_token=IMAGE)
        prompts = PROMPTS if loaded.pictures is not None else PROMPTS[:1]
        requests = [request(prompt, max_tokens=6) for prompt in prompts]
        requests.append(request(PROMPTS[0], max_tokens=6, temperature=1.1, top_k=30, n=2, seed=9))
        answers = [own for answers in engine.generate(requests) for own in answers]
        found[name] = {
            "tokens": [own.tokens for own in answers],
            "logprobs": [own.logprobs for own in answers],
        }
    theirs: list = [None] * ranks.size
    torch.distributed.all_gather_object(theirs, found)
    assert all(other == found for other in theirs)
    if ranks.rank == 0:
        write_result(found)
    leave_ranks()


if __name__ == "__main__":
    # A GPU is not shared with a process that forked.
    main() if sys.argv[2] == "cuda" else fork_ranks(main, 2)
