"""Greedy answers from the model as it stands, in any parallel layout.

Every token comes from a whole forward pass through the training schedule: no cache, and no second
code path whose answers could differ from what is being trained.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ghostvis_mega.data.batch import ImageSlot, MicroBatch
from ghostvis_mega.engine.pipeline import run_scoring_schedule
from ghostvis_mega.engine.step import TrainEngine
from ghostvis_mega.parallel.dispatch import dispatch_images
from ghostvis_mega.parallel.exchange import EmbeddingExchange


@dataclass(frozen=True)
class Prompt:
    """A conversation up to the place where the answer begins."""

    tokens: tuple[int, ...]
    """One image token for each picture."""
    image_ids: tuple[int, ...]


class GreedyDecoder:
    """Answers lists of prompts; all ranks call it with the same list.

    Args:
        engine: The model.
        image_token: Id that stands for a picture.
        stop_token: Ends an answer and is not part of it.
        vocab_size: Tokens that mean something; a model's vocabulary may be padded beyond them.
        load_pixels: uint8 [n, 3, h, w] of the pictures with these ids; called for those this rank
            encodes.
        rows: Prompts of one replica that run side by side; rounded up to fill the pipeline.
    """

    def __init__(
        self,
        engine: TrainEngine,
        *,
        image_token: int,
        stop_token: int,
        vocab_size: int,
        load_pixels: Callable[[Sequence[int]], torch.Tensor],
        rows: int = 64,
    ):
        self.engine, self.load_pixels = engine, load_pixels
        self.image_token, self.stop_token = image_token, stop_token
        self.vocab_size = vocab_size
        stages = engine.groups.degrees.pipeline
        self.micro_batches = stages
        self.rows = -(-rows // stages) * stages

    def answers(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int,
        progress: Callable[[str], None] = lambda _: None,
    ) -> list[list[int]]:
        """Token ids of each answer, without the stop token; equal on all ranks.

        Args:
            prompts: The same on all ranks.
            max_new_tokens: Longest answer.
            progress: Told before each round of prompts what is being done.
        """
        groups = self.engine.groups
        replicas = groups.degrees.data
        found: list[list[int]] = [[] for _ in prompts]
        for chunk in self.engine.parts.chunks:
            chunk.eval()
        # Prompts of similar length share a round, so that little is padded.
        order = sorted(range(len(prompts)), key=lambda index: len(self._expand(prompts[index])[0]))
        for start in range(0, len(order), self.rows * replicas):
            progress(f"answering from prompt {start + 1} of {len(order)} on")
            shares = [
                order[start + replica : start + self.rows * replicas : replicas]
                for replica in range(replicas)
            ]
            answers = self._round(
                [[prompts[index] for index in share] for share in shares],
                max_new_tokens=max_new_tokens,
            )
            gathered: list[list[list[int]] | None] = [None] * replicas
            dist.all_gather_object(gathered, answers, group=groups.data)
            for share, part in zip(shares, gathered, strict=True):
                for index, answer in zip(share, part or [], strict=True):
                    found[index] = answer
        for chunk in self.engine.parts.chunks:
            chunk.train()
        return found

    def _expand(self, prompt: Prompt) -> tuple[list[int], list[int]]:
        """Tokens with each picture at its full width, and where the pictures begin."""
        width = self.engine.run.model.tokens_per_image
        tokens, starts = [], []
        for token in prompt.tokens:
            if token == self.image_token:
                starts.append(len(tokens))
            tokens += [token] * (width if token == self.image_token else 1)
        return tokens, starts

    def _round(self, shares: list[list[Prompt]], *, max_new_tokens: int) -> list[list[int]]:
        """Answer one batch of prompts a replica; returns this replica's answers."""
        engine, groups = self.engine, self.engine.groups
        dispatch = dispatch_images(
            [[i for p in share for i in p.image_ids] for share in shares], groups.places
        )
        exchange = EmbeddingExchange(dispatch, groups)
        own = dispatch.encode[groups.rank]
        embeddings: dict[int, torch.Tensor] = {}
        if engine.vision is not None:
            embeddings = engine.image_embeddings(
                exchange, self.load_pixels(own), for_training=False
            )
        mine = shares[groups.place.data]
        # Empty rows fill the last batch: every micro-batch of a schedule has the same shape, and a
        # replica without prompts computes like the others.
        filled = mine + [Prompt(tokens=(self.stop_token,), image_ids=())] * (self.rows - len(mine))
        rows = [self._expand(prompt) for prompt in filled]
        length = max(len(tokens) for tokens, _ in rows) + max_new_tokens
        tensor = groups.degrees.tensor
        length = -(-length // tensor) * tensor
        texts = [list(tokens) for tokens, _ in rows]
        done = [index >= len(mine) for index in range(len(rows))]
        for _ in range(max_new_tokens):
            chosen = self._next_tokens(
                texts, filled, [starts for _, starts in rows], length, embeddings
            )
            for index, token in enumerate(chosen):
                if done[index]:
                    continue
                if token == self.stop_token:
                    done[index] = True
                else:
                    texts[index].append(token)
            if self._all_replicas(all(done)):
                break
        return [
            text[len(tokens) :] for text, (tokens, _) in zip(texts[: len(mine)], rows, strict=False)
        ]

    def _next_tokens(
        self,
        texts: list[list[int]],
        prompts: list[Prompt],
        starts: list[list[int]],
        length: int,
        embeddings: dict[int, torch.Tensor],
    ) -> list[int]:
        per_batch = len(texts) // self.micro_batches
        batches, ends = [], []
        for first in range(0, len(texts), per_batch):
            chosen = range(first, first + per_batch)
            batches.append(self._micro_batch([texts[i] for i in chosen], length, [
                ImageSlot(image_id=image, row=i - first, start=start)
                for i in chosen
                for image, start in zip(prompts[i].image_ids, starts[i], strict=True)
            ]))  # fmt: skip
            last = torch.tensor([len(texts[i]) - 1 for i in chosen])
            ends.append((last * per_batch + torch.arange(per_batch)).to(self.engine.device))
        scores = run_scoring_schedule(
            self.engine.parts.chunks, self.engine.work(batches), embeddings, ends
        )
        return self._agree(scores, count=len(texts))

    def _micro_batch(
        self, texts: list[list[int]], length: int, slots: list[ImageSlot]
    ) -> MicroBatch:
        tokens_BS = torch.full((len(texts), length), self.stop_token, dtype=torch.int64)
        for row, text in enumerate(texts):
            tokens_BS[row, : len(text)] = torch.tensor(text)
        zeros = torch.zeros_like(tokens_BS)
        return MicroBatch(
            tokens_BS=tokens_BS,
            labels_BS=zeros,
            weights_BS=zeros.float(),
            positions_BS=torch.arange(length).expand_as(tokens_BS),
            cu_seqlens=None,
            max_seqlen=length,
            images=tuple(slots),
            sample_ids=(),
        )

    def _all_replicas(self, done: bool) -> bool:
        """Whether every replica is done: with ZeRO-3 each forward gathers weights from all of
        them."""
        flag = torch.tensor(int(done), device=self.engine.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=self.engine.groups.data)
        return bool(flag)

    def _agree(self, scores: list[torch.Tensor], *, count: int) -> list[int]:
        """The best token of each row, told by the last stage to the whole pipeline."""
        groups = self.engine.groups
        tokens = torch.zeros(count, dtype=torch.int64, device=self.engine.device)
        if groups.is_last_stage:
            part_RV = torch.cat(scores).float().contiguous()
            parts = [torch.empty_like(part_RV) for _ in range(groups.degrees.tensor)]
            dist.all_gather(parts, part_RV, group=groups.tensor)
            tokens = torch.cat(parts, dim=1)[:, : self.vocab_size].argmax(dim=1)
        if groups.degrees.pipeline > 1:
            dist.broadcast(tokens, groups.last_stage_rank, group=groups.pipeline)
        return tokens.tolist()
