"""Puts what a checkpoint holds into the model and the optimizers of this rank."""

from collections.abc import Collection, Iterator

import torch
import torch.distributed as dist

from ghostvis_mega.checkpoint.capture import parameter_entries, saved_kinds
from ghostvis_mega.checkpoint.held import (
    Held,
    Span,
    gather_persistent,
    held_parameters,
    optimizer_span,
    release_gathered,
    set_optimizer_steps,
    weight_span,
)
from ghostvis_mega.checkpoint.layout import (
    engine_name,
    layout_of,
    layout_problem,
    model_differences,
)
from ghostvis_mega.checkpoint.reader import CheckpointReader
from ghostvis_mega.checkpoint.resharding import Part, missing_part, read_part
from ghostvis_mega.checkpoint.together import on_every_rank
from ghostvis_mega.engine.optimizer import module_of
from ghostvis_mega.engine.step import TrainEngine


def resume_problems(engine: TrainEngine, reader: CheckpointReader) -> Iterator[str]:
    """What keeps this rank from resuming, without reading a tensor."""
    manifest = reader.manifest
    here = layout_of(engine)
    if problem := layout_problem(reader.path, saved=manifest.layout, here=here):
        yield problem
        return
    yield from _parameter_problems(engine, reader, set(engine.run.model.modules), same_dtype=True)
    engines = {engine_name(engine, zero) for zero in engine.engines}
    if engines != set(manifest.optimizer_steps):
        yield f"{reader.path} holds no optimizer_steps of {sorted(engines)}"
    for held in held_parameters(engine):
        for kind, span in (("weights", weight_span(held)), ("optimizer", optimizer_span(held))):
            if span is not None and held.name in manifest.parameters:
                wanted = _part(engine, held, span)
                if problem := missing_part(reader, kind, held.name, wanted):
                    yield problem


def model_parameters(engine: TrainEngine) -> frozenset[str]:
    """Global names of all parameters of the model, whichever rank has them; collective."""
    return frozenset().union(
        *on_every_rank(lambda: [held.name for held in held_parameters(engine)])
    )


def weight_problems(
    engine: TrainEngine,
    reader: CheckpointReader,
    modules: Collection[str],
    *,
    own_names: Collection[str],
) -> Iterator[str]:
    """What keeps this rank from taking over the weights of `modules`.

    Args:
        engine: Of this run.
        reader: The checkpoint.
        modules: Parts to take over.
        own_names: All parameters of the model here, those of other ranks as well.
    """
    saved = reader.manifest.parameters
    inside = {info.module for info in saved.values()}
    for side, has in (("checkpoint", inside), ("model", set(engine.run.model.modules))):
        if lacking := [module for module in modules if module not in has]:
            yield (
                f"{reader.path}: the weights of {', '.join(lacking)} are wanted, but the {side} "
                f"has only {', '.join(sorted(has))}. Name only parts that both have."
            )
            return
    layout, here = reader.manifest.layout, layout_of(engine)
    if sentences := model_differences(saved=layout, here=here, modules=modules):
        yield f"{reader.path} does not fit this model: {' '.join(sentences)}"
        return
    yield from _parameter_problems(engine, reader, modules, same_dtype=False)
    chosen = [name for name, info in saved.items() if info.module in modules]
    if unknown := sorted(set(chosen) - set(own_names)):
        others = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        yield (
            f"{reader.path} holds {unknown[0]}{others}, which this model lacks: its weights would "
            "be taken over in part. Set the model settings of the run that saved it."
        )


def _parameter_problems(
    engine: TrainEngine, reader: CheckpointReader, modules: Collection[str], *, same_dtype: bool
) -> Iterator[str]:
    for name, mine in parameter_entries(engine).items():
        if mine["module"] not in modules:
            continue
        saved = reader.manifest.parameters.get(name)
        if saved is None:
            yield f"{reader.path} does not hold {name}, which this model has"
        elif saved.shape != mine["shape"]:
            yield (
                f"{reader.path}: {name} has shape {saved.shape} in the checkpoint and "
                f"{mine['shape']} here: the model settings differ"
            )
        elif same_dtype and saved.dtype != mine["dtype"]:
            yield f"{reader.path}: {name} is {saved.dtype} in the checkpoint, {mine['dtype']} here"


@torch.no_grad()
def restore(
    engine: TrainEngine, reader: CheckpointReader, *, group: dist.ProcessGroup | None = None
) -> None:
    """Weights, masters, moments and update counts, each element exactly as saved; collective.

    Args:
        engine: Newly built, or between two steps.
        reader: A checkpoint that fits it.
        group: Of all ranks, who wait in it for the slowest disk; by default the one of training.

    Raises:
        CheckpointError: A file could not be read on some rank; raised on all of them.
    """
    for zero in engine.engines:
        release_gathered(zero)
    on_every_rank(lambda: _restore_elements(engine, reader), group=group)
    for zero in engine.engines:
        set_optimizer_steps(zero, reader.manifest.optimizer_steps[engine_name(engine, zero)])
        gather_persistent(zero)


def _restore_elements(engine: TrainEngine, reader: CheckpointReader) -> None:
    """Without any collective: a rank that fails here must not leave others in one."""
    for held in held_parameters(engine):
        if (span := weight_span(held)) is not None:
            weight = read_part(reader, "weights", held.name, _part(engine, held, span))
            span.tensors["weight"].copy_(weight)
        _restore_optimizer(engine, reader, held)


def _restore_optimizer(engine: TrainEngine, reader: CheckpointReader, held: Held) -> None:
    span = optimizer_span(held)
    if span is None:
        return
    kinds, wanted = saved_kinds(held), _part(engine, held, span)
    for kind in kinds:
        value = read_part(reader, "optimizer", held.name, wanted, prefix=f"{kind}/")
        span.tensors[kind].copy_(value)
    if "master" not in kinds:
        span.tensors["master"].copy_(read_part(reader, "weights", held.name, wanted))


def _part(engine: TrainEngine, held: Held, span: Span) -> Part:
    parts = engine.groups.degrees.tensor if held.cut else 1
    return Part(rank=held.tensor_rank, parts=parts, start=span.start, length=span.length)


@torch.no_grad()
def restore_weights(
    engine: TrainEngine,
    reader: CheckpointReader,
    modules: Collection[str],
    *,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Weights of `modules` alone, from a checkpoint of any layout; masters follow the weights;
    `group` as for `restore`; collective.

    Raises:
        CheckpointError: A file could not be read on some rank; raised on all of them.
    """
    for zero in engine.engines:
        release_gathered(zero)
    on_every_rank(lambda: _restore_parts(engine, reader, modules), group=group)
    for zero in engine.engines:
        if zero.stage > 0:
            zero.optimizer.refresh_fp32_params()
        gather_persistent(zero)


def _restore_parts(engine: TrainEngine, reader: CheckpointReader, modules: Collection[str]) -> None:
    """This rank's share of them, without any collective."""
    for held in held_parameters(engine):
        span = weight_span(held)
        if span is not None and module_of(held.name) in modules:
            weight = read_part(reader, "weights", held.name, _part(engine, held, span))
            span.tensors["weight"].copy_(weight)
