"""Agreeing before a step: on damaged data, so that all ranks leave out the same samples, and on
whether to take the step at all.

A rank reads the tokens of its own replica and the pictures that it encodes. What it cannot read
must count nowhere: not on the other ranks of its replica, whose copy may be sound, and not in the
number of trained tokens that every rank divides by. A damaged picture takes the samples that show
it with it: the answer to a question about a black square teaches nothing.
"""

import dataclasses
from collections.abc import Collection
from itertools import repeat

import torch
import torch.distributed as dist

from ghostvis_mega.data.batch import GlobalBatch, MicroBatch
from ghostvis_mega.data.corpus import Corpus
from ghostvis_mega.engine.step import StepInput
from ghostvis_mega.parallel.groups import Groups


def agree_before_step(
    batch: GlobalBatch,
    work: StepInput,
    corpus: Corpus,
    groups: Groups,
    *,
    device: torch.device,
    stop: int,
) -> tuple[StepInput, int]:
    """The step's input without the samples that any rank found damaged, and whether any rank was
    asked to stop; collective.

    One all-reduce of two numbers where nothing is damaged.

    Args:
        batch: The global batch.
        work: This rank's part, with its own findings.
        corpus: Index of samples and images.
        groups: Of this rank.
        device: Of this rank.
        stop: Number of the signal that this rank was sent, 0 without one.

    Returns:
        The input, and the highest `stop` of all ranks.
    """
    found = torch.tensor([len(work.damage), stop], dtype=torch.int64, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX, group=groups.world)
    damaged, stop = found.tolist()
    if damaged == 0 or stop:
        return work, stop
    return _without_damage(batch, work, corpus, groups), 0


def agree_on_damage(
    batch: GlobalBatch, work: StepInput, corpus: Corpus, groups: Groups, *, device: torch.device
) -> StepInput:
    """`agree_before_step` for steps that nobody stops."""
    return agree_before_step(batch, work, corpus, groups, device=device, stop=0)[0]


def _without_damage(
    batch: GlobalBatch, work: StepInput, corpus: Corpus, groups: Groups
) -> StepInput:
    gathered: list[tuple[list[int], list[int]] | None] = [None] * len(groups.places)
    own = (sorted(work.damage.samples), sorted(work.damage.images))
    dist.all_gather_object(gathered, own, group=groups.world)
    samples = {sample for part in gathered if part for sample in part[0]}
    images = {image for part in gathered if part for image in part[1]}
    left_out = {
        sample
        for row in batch.sequences
        for sample in row.sample_ids
        if sample in samples or (images and not images.isdisjoint(corpus.images_of(sample)))
    }
    # From the index, as the planned number was: a rank may hold a blanked copy or a sound one.
    lost = sum(
        corpus.trained_tokens(sample, piece)
        for row in batch.sequences
        for sample, piece in zip(row.sample_ids, row.pieces or repeat(None), strict=False)
        if sample in left_out
    )
    return dataclasses.replace(
        work,
        micro_batches=[without_samples(micro, left_out) for micro in work.micro_batches],
        trained_tokens=max(work.trained_tokens - lost, 1.0),
    )


def without_samples(batch: MicroBatch, left_out: Collection[int]) -> MicroBatch:
    """The same micro-batch with the loss weights of some samples at zero."""
    if not any(sample in left_out for sample in batch.sample_ids):
        return batch
    weights_BS = batch.weights_BS.clone()
    for place, sample in enumerate(batch.sample_ids):
        if sample not in left_out:
            continue
        if batch.cu_seqlens is None:
            weights_BS[place] = 0.0
        else:
            weights_BS[0, int(batch.cu_seqlens[place]) : int(batch.cu_seqlens[place + 1])] = 0.0
    return dataclasses.replace(batch, weights_BS=weights_BS)
