"""Breaking a layout on purpose, one way for each of `faults.FAULTS`."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from megatron.core.tensor_parallel import mappings

from ghostvis_mega.config.schema import OptimConfig
from ghostvis_mega.data.batch import MicroBatch
from ghostvis_mega.engine import step as engine_step
from ghostvis_mega.engine.step import StepInput, TrainEngine
from ghostvis_mega.model.attention import SDPACoreAttention
from ghostvis_mega.model.context import ContextSlice, row_owners
from ghostvis_mega.model.inputs import ModelInput
from ghostvis_mega.model.llm import LLMChunk
from ghostvis_mega.parallel.exchange import EmbeddingExchange
from ghostvis_mega.parallel.groups import Place
from ghostvis_mega.parallel.image_rows import ImageRows
from ghostvis_mega.perf.certify.compare import Row
from ghostvis_mega.perf.certify.faults import Fault
from ghostvis_mega.perf.certify.lab import Lab
from ghostvis_mega.perf.certify.problem import ROWS
from ghostvis_mega.perf.reference import PlainTrainer


def measure_broken(lab: Lab, fault: Fault) -> Row:
    """The row of a broken layout."""
    return BREAKS[fault.name](lab, fault)


def _patched(target: Any, name: str, value: Any) -> Callable[[Lab, Fault], Row]:
    def run(lab: Lab, fault: Fault) -> Row:
        with mock.patch.object(target, name, value):
            return lab.measure(lab.case(fault.layout))

    return run


def _exchanged_pictures(lab: Lab, fault: Fault) -> Row:
    def alter(rows: list[MicroBatch]) -> None:
        # Rows 2 and 3 are one micro-batch; each shows picture 1, row 2 another one as well.
        first, second = rows[2].images[1], rows[3].images[0]
        rows[2] = replace(
            rows[2], images=(rows[2].images[0], replace(first, image_id=second.image_id))
        )
        rows[3] = replace(rows[3], images=(replace(second, image_id=first.image_id),))

    return lab.measure(lab.case(fault.layout), alter=alter)


def _late_boundary(lab: Lab, fault: Fault) -> Row:
    def alter(rows: list[MicroBatch]) -> None:
        for index, row in enumerate(rows):
            assert row.cu_seqlens is not None
            ends = row.cu_seqlens.clone()
            ends[1] += 1
            rows[index] = replace(row, cu_seqlens=ends, max_seqlen=int(ends.diff().max()))

    return lab.measure(lab.case(fault.layout), alter=alter)


def _no_boundaries(lab: Lab, fault: Fault) -> Row:
    def alter(rows: list[MicroBatch]) -> None:
        whole = torch.tensor([0, rows[0].tokens_BS.shape[1]], dtype=torch.int32)
        rows[:] = [replace(row, cu_seqlens=whole, max_seqlen=int(whole[1])) for row in rows]

    return lab.measure(lab.case(fault.layout), alter=alter)


def _late_positions(lab: Lab, fault: Fault) -> Row:
    def alter(rows: list[MicroBatch]) -> None:
        for index, row in enumerate(rows):
            late = row.positions_BS.roll(1, dims=1)
            late[:, 0] = 0
            rows[index] = replace(row, positions_BS=late)

    return lab.measure(lab.case(fault.layout), alter=alter)


def _keys_not_restarted(lab: Lab, fault: Fault) -> Row:
    # Of queries and keys alike it would be no fault: attention sees differences of positions.
    rotary = LLMChunk._rotary

    def split(chunk: LLMChunk, inputs: ModelInput) -> tuple[torch.Tensor, torch.Tensor]:
        plain = torch.arange(inputs.positions_BW.shape[1], device=inputs.positions_BW.device)
        running = replace(inputs, positions_BW=plain[None])
        return rotary(chunk, inputs), rotary(chunk, running)

    with mock.patch.object(LLMChunk, "_rotary", split):
        return lab.measure(lab.case(fault.layout))


def _mean_of_replicas(lab: Lab, fault: Fault) -> Row:
    right = TrainEngine.train_llm

    def by_own_tokens(engine: TrainEngine, batch: StepInput, *rest: Any) -> torch.Tensor:
        own = sum(float(micro.weights_BS.sum()) for micro in batch.micro_batches)
        alike = replace(batch, trained_tokens=own * engine.groups.degrees.data)
        return right(engine, alike, *rest)

    with mock.patch.object(TrainEngine, "train_llm", by_own_tokens):
        return lab.measure(lab.case(fault.layout))


def _mean_of_means(lab: Lab, fault: Fault) -> Row:
    loss_sum = LLMChunk.loss_sum

    def averaged(
        chunk: LLMChunk,
        hidden_SBH: torch.Tensor,
        inputs: ModelInput,
        *,
        expected_grad: float | None = None,
    ) -> torch.Tensor:
        # Times the mean count, so that only the weighting between micro-batches differs.
        share = tokens / ROWS / float(inputs.weights_R.sum())
        expected = None if expected_grad is None else expected_grad * share
        return loss_sum(chunk, hidden_SBH, inputs, expected_grad=expected) * share

    case = lab.case(fault.layout)
    rows, _ = case.stream.rows(case.run, lab.alone(), 0)
    tokens = sum(float(row.weights_BS.sum()) for row in rows)
    with mock.patch.object(LLMChunk, "loss_sum", averaged):
        return lab.measure(lab.case(fault.layout))


@torch.no_grad()
def _exchange_gate_and_up(trainer: PlainTrainer) -> None:
    weight = trainer.llm.decoder.layers[1].mlp.linear_fc1.weight
    gate, up = weight.clone().chunk(2)
    weight.copy_(torch.cat([up, gate]))


def _windows_scaled(lab: Lab, fault: Fault) -> Row:
    right = TrainEngine.loss_scale

    def of_step(engine: TrainEngine, count: int, *, trained_tokens: float) -> float:
        # As if a schedule went over all micro-batches of the step, not over those of a window.
        return right(engine, ROWS // engine.groups.degrees.data, trained_tokens=trained_tokens)

    with mock.patch.object(TrainEngine, "loss_scale", of_step):
        return lab.measure(lab.case(fault.layout))


def _wrong_reference(lab: Lab, fault: Fault) -> Row:
    truth = lab.solve(lab.case(fault.layout), lab.alone(), _exchange_gate_and_up)
    return lab.measure(lab.case(fault.layout), truth=truth)


def _wrong_reference_of_noise(lab: Lab, fault: Fault) -> Row:
    # As if a kernel that one process and all layouts use were wrong.
    case, alone = lab.case(fault.layout), lab.alone()
    truth = lab.solve(case, alone, _exchange_gate_and_up)
    return lab.measure(case, truth=truth, noise=lab.measure_noise(case, alone, truth=truth))


def _batched_exchange(lab: Lab, fault: Fault) -> Row:
    def prepare(engine: TrainEngine) -> None:
        for chunk in engine.parts.chunks:
            chunk.config.batch_p2p_comm = True

    return lab.measure(lab.case(fault.layout), prepare=prepare)


def _norm_of_llm_alone(lab: Lab, fault: Fault) -> Row:
    def prepare(engine: TrainEngine) -> None:
        engine.parts.vision_engine.square_sum = lambda: torch.zeros((), device=engine.device)

    return lab.measure(lab.case(fault.layout), prepare=prepare)


def _norm_of_vision_alone(lab: Lab, fault: Fault) -> Row:
    def prepare(engine: TrainEngine) -> None:
        engine.parts.llm_engine.square_sum = lambda: torch.zeros((), device=engine.device)

    return lab.measure(lab.case(fault.layout), prepare=prepare)


def _norms_not_updated(lab: Lab, fault: Fault) -> Row:
    def prepare(engine: TrainEngine) -> None:
        zero = engine.parts.llm_engine
        set_all = zero.set_learning_rates

        def set_most(factor: float, optim: OptimConfig) -> None:
            set_all(factor, optim)
            (norms,) = (group for group in zero.optimizer.param_groups if not group["weight_decay"])
            norms["lr"] = 0.0

        zero.set_learning_rates = set_most

    return lab.measure(lab.case(fault.layout), prepare=prepare)


def _shifted_rows(ctx: ContextSlice, lengths: np.ndarray) -> np.ndarray:
    owners = row_owners(lengths, size=ctx.size)
    return np.flatnonzero(np.roll(owners, 1) == ctx.rank)


def _not_summed(
    attention: SDPACoreAttention, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each rank keeps the gradient of its own queries alone."""
    both = mappings.gather_from_sequence_parallel_region(
        torch.cat([key, value], dim=-1),
        tensor_parallel_output_grad=False,
        group=attention.context_group,
    )
    return both.split([key.shape[-1], value.shape[-1]], dim=-1)


def _other_rows(lab: Lab, fault: Fault) -> Row:
    def other(rows: ImageRows, place: Place) -> dict[int, np.ndarray]:
        # As many rows, counted from the picture's other end.
        mine = rows.needed[place.data][place.context]
        return {image: rows.tokens_per_image - 1 - own[::-1] for image, own in mine.items()}

    def right(exchange: EmbeddingExchange, image: int) -> np.ndarray:
        place = exchange.groups.place
        return exchange.rows.needed[place.data][place.context][image]

    with (
        mock.patch.object(ImageRows, "of", other),
        mock.patch.object(EmbeddingExchange, "rows_of", right),
    ):
        return lab.measure(lab.case(fault.layout))


def _keys_from_zero(chunk: LLMChunk, inputs: ModelInput) -> torch.Tensor | None:
    # What a generator with the same seed on every tensor rank gives: the first part's masks
    # everywhere.
    keys_SB = inputs.dropout_keys_SB
    return None if keys_SB is None else keys_SB.chunk(chunk.tp_group.size())[0]


BREAKS: dict[str, Callable[[Lab, Fault], Row]] = {
    "no sum over the sequence": _patched(
        engine_step, "sum_sequence_parallel_gradients", lambda *_: None
    ),
    "tied embeddings not summed": _patched(engine_step, "sum_tied_gradients", lambda *_: None),
    "picture gradients not rescaled": _patched(TrainEngine, "vision_gradient_scale", lambda _: 1.0),
    "windows of pictures scaled as a step": _windows_scaled,
    "pictures of two rows exchanged": _exchanged_pictures,
    "loss averaged in each micro-batch": _mean_of_means,
    "loss averaged in each replica": _mean_of_replicas,
    "gate and up exchanged in the reference": _wrong_reference,
    "gate and up exchanged in all but the reference": _wrong_reference_of_noise,
    "segment boundary one token late": _late_boundary,
    "segment boundaries ignored": _no_boundaries,
    "RoPE restarted one token late in a pack": _late_positions,
    "RoPE of the keys not restarted in a pack": _keys_not_restarted,
    "norm without the vision engine": _norm_of_llm_alone,
    "norm without the offloaded engine": _norm_of_vision_alone,
    "batched exchange between two interleaved stages": _batched_exchange,
    "dropout seed shared across tensor ranks": _patched(LLMChunk, "_dropout_keys", _keys_from_zero),
    "context rows shifted by one": _patched(ContextSlice, "rows", _shifted_rows),
    "gradients of fetched keys and values not summed": _patched(
        SDPACoreAttention, "gather_context", _not_summed
    ),
    "a picture's rows given to the wrong context rank": _other_rows,
    "one parameter group not updated": _norms_not_updated,
}
