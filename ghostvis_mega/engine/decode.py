"""Greedy answers from the model as it stands, in any parallel layout.

Every token comes from a whole forward pass through the training schedule: no cache, and no second
code path whose answers could differ from what is being trained.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ghostvis_mega.config.rules_precision import FP8_MULTIPLE
from ghostvis_mega.config.schema import RunConfig
from ghostvis_mega.data.batch import ImageSlot, MicroBatch, SequenceLayout
from ghostvis_mega.engine.pipeline import Picture, run_scoring_schedule
from ghostvis_mega.engine.step import TrainEngine
from ghostvis_mega.model.context import row_owners
from ghostvis_mega.parallel.dispatch import dispatch_images
from ghostvis_mega.parallel.exchange import EmbeddingExchange
from ghostvis_mega.parallel.image_rows import ImageRows, image_rows
from ghostvis_mega.parallel.plan import Degrees


def cut_length(longest: int, *, run: RunConfig, degrees: Degrees, rows: int) -> int:
    """The shortest length from `longest` on that the layout can cut, and of which a rank's part of
    `rows` rows is what FP8's matrix products take."""
    multiple = degrees.sequence_multiple
    if run.train.fp8 != "none":
        cut = degrees.context * (degrees.tensor if run.parallel.sequence_parallel else 1)
        whole = cut * FP8_MULTIPLE[run.train.fp8]
        multiple = math.lcm(multiple, whole // math.gcd(whole, rows))
    return -(-longest // multiple) * multiple


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
            gathered: list[list[list[int]] | None] = [None] * groups.data.size()
            dist.all_gather_object(gathered, answers, group=groups.data)
            # The context-parallel ranks of a replica, neighbours in the group, know the same.
            for share, part in zip(shares, gathered[:: groups.degrees.context], strict=True):
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
        # Empty rows fill the last batch: every micro-batch of a schedule has the same shape, and a
        # replica without prompts computes like the others.
        filler = Prompt(tokens=(self.stop_token,), image_ids=())
        replicas = [share + [filler] * (self.rows - len(share)) for share in shares]
        exchange = EmbeddingExchange(
            dispatch, groups, self._image_rows(replicas, max_new_tokens=max_new_tokens)
        )
        own = dispatch.encode[groups.rank]
        pictures: dict[int, Picture] = {}
        if engine.vision is not None:
            pictures = engine.image_embeddings(exchange, self.load_pixels(own), for_training=False)
        mine, filled = shares[groups.place.data], replicas[groups.place.data]
        rows = [self._expand(prompt) for prompt in filled]
        length = self._length(rows, max_new_tokens)
        texts = [list(tokens) for tokens, _ in rows]
        done = [index >= len(mine) for index in range(len(rows))]
        for _ in range(max_new_tokens):
            chosen = self._next_tokens(
                texts, filled, [starts for _, starts in rows], length, pictures
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
        pictures: dict[int, Picture],
    ) -> list[int]:
        per_batch = len(texts) // self.micro_batches
        context = self.engine.groups.context_slice
        owners = torch.from_numpy(row_owners([length], size=context.size))
        # Where a position stands among the rows of the context-parallel rank that has it.
        local = (owners == context.rank).cumsum(0) - 1
        batches, ends, scored = [], [], []
        for first in range(0, len(texts), per_batch):
            chosen = range(first, first + per_batch)
            batches.append(self._micro_batch([texts[i] for i in chosen], length, [
                ImageSlot(image_id=image, row=i - first, start=start)
                for i in chosen
                for image, start in zip(prompts[i].image_ids, starts[i], strict=True)
            ]))  # fmt: skip
            last = torch.tensor([len(texts[i]) - 1 for i in chosen])
            here = (owners[last] == context.rank).nonzero().flatten()
            ends.append((local[last[here]] * per_batch + here).to(self.engine.device))
            scored.append(first + here)
        scores = run_scoring_schedule(
            self.engine.parts.chunks, self.engine.work(batches), pictures, ends
        )
        return self._agree(scores, torch.cat(scored), count=len(texts))

    def _length(self, rows: list[tuple[list[int], list[int]]], max_new_tokens: int) -> int:
        """Positions that hold every prompt and answer, and that layout and FP8 can cut."""
        longest = max(len(tokens) for tokens, _ in rows) + max_new_tokens
        return cut_length(
            longest,
            run=self.engine.run,
            degrees=self.engine.groups.degrees,
            rows=self.rows // self.micro_batches,
        )

    def _image_rows(self, replicas: list[list[Prompt]], *, max_new_tokens: int) -> ImageRows | None:
        """What each context-parallel rank needs of the pictures; every rank knows all prompts."""
        context = self.engine.groups.degrees.context
        if context == 1:
            return None
        layouts = []
        for prompts in replicas:
            rows = [self._expand(prompt) for prompt in prompts]
            length = self._length(rows, max_new_tokens)
            layouts.append(
                [
                    SequenceLayout((length,), prompt.image_ids, tuple(starts))
                    for prompt, (_, starts) in zip(prompts, rows, strict=True)
                ]
            )
        width = self.engine.run.model.tokens_per_image
        return image_rows(layouts, tokens_per_image=width, context=context)

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

    def _agree(self, scores: list[torch.Tensor], scored: torch.Tensor, *, count: int) -> list[int]:
        """The best token of each row, told to the whole replica by the ranks of the last stage.

        Each has the scores of the rows `scored`; other context-parallel ranks have other rows.
        """
        groups = self.engine.groups
        tokens = torch.zeros(count, dtype=torch.int64, device=self.engine.device)
        if groups.is_last_stage and len(scored):
            part_RV = torch.cat(scores).float().contiguous()
            parts = [torch.empty_like(part_RV) for _ in range(groups.degrees.tensor)]
            dist.all_gather(parts, part_RV, group=groups.tensor)
            best_R = torch.cat(parts, dim=1)[:, : self.vocab_size].argmax(dim=1)
            tokens[scored.to(self.engine.device)] = best_R
        if groups.is_last_stage:
            # Where another rank has the scores, this one has a zero.
            dist.all_reduce(tokens, group=groups.context)
        if groups.degrees.pipeline > 1:
            dist.broadcast(tokens, groups.last_stage_rank, group=groups.pipeline)
        return tokens.tolist()
