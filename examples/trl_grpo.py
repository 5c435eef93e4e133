"""One step of TRL's GRPO on an exported model: what leaves GhostVis-Mega goes on elsewhere.

    pip install trl
    python examples/trl_grpo.py exports/llava datasets/easy-vqa-train.gvd

The export must be of format `llava`. The reward is how alike completion and answer are.
"""

import argparse
import difflib
import io
import tempfile
from pathlib import Path

import torch
from datasets import Dataset as Rows
from PIL import Image
from trl import GRPOConfig, GRPOTrainer

from ghostvis_mega.data.dataset import Dataset


def rows_of(data: Path, *, count: int) -> Rows:
    """Questions with one picture each and their answers."""
    dataset = Dataset.open(data)
    rows = []
    for index in range(dataset.num_samples):
        _, image_ids, answer, question = dataset.prompt(index)
        if len(image_ids) == 1 and len(rows) < count:
            picture = Image.open(io.BytesIO(dataset.image_bytes(image_ids[0]))).convert("RGB")
            prompt = [{"role": "user", "content": question}]
            rows.append({"prompt": prompt, "image": picture, "answer": answer})
    return Rows.from_list(rows)


def reward(completions: list[list[dict[str, str]]], answer: list[str], **_: object) -> list[float]:
    """How alike each completion and the right answer are, 0 to 1."""
    return [
        difflib.SequenceMatcher(None, completion[0]["content"].strip(), right).ratio()
        for completion, right in zip(completions, answer, strict=True)
    ]


def main() -> None:
    """Train and tell how many parameters moved."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("export", help="directory of `ghostvis convert export`")
    parser.add_argument("data", type=Path, help="prepared dataset with questions about pictures")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=args.export,
            reward_funcs=reward,
            args=GRPOConfig(
                output_dir=folder,
                max_steps=args.steps,
                per_device_train_batch_size=8,
                num_generations=4,
                max_completion_length=16,
                learning_rate=1e-3,
                use_cpu=args.cpu,
                bf16=False,
                report_to=[],
                logging_steps=1,
                save_strategy="no",
            ),
            train_dataset=rows_of(args.data, count=16),
        )
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        trainer.train()
        moved = [
            name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])
        ]
    print(f"{len(moved)} of {len(before)} parameters moved in {args.steps} steps")


if __name__ == "__main__":
    main()
