"""Four ranks compute the loss of one output layer with its vocabulary cut in 1, 2 and 4."""

from contextlib import AbstractContextManager, nullcontext
from unittest import mock

import torch
import torch.distributed as dist

from ghostvis_mega.model import loss as loss_module
from ghostvis_mega.model.inputs import ModelInput
from ghostvis_mega.model.llm import LLMChunk
from ghostvis_mega.model.megatron import BlockLayout, transformer_config
from ghostvis_mega.parallel.cpu_shim import apply_cpu_shim
from ghostvis_mega.parallel.groups import Groups, build_groups, destroy_groups
from ghostvis_mega.parallel.plan import Degrees
from tests.launch import write_result
from tests.model.llm_cases import llm_config, make_rows, to_input
from tests.model.loss_cases import (
    PADDING,
    SCALE,
    VOCABULARY,
    Case,
    Outcome,
    distance,
    make_case,
    unfused,
)

ROWS, HIDDEN = 48, 32
LENGTH = 64
"""Of the sequence, of which so many rows are trained."""
CHUNKS = (16, 20, 1000)
"""Rows of a chunk: one divides, one does not, one takes all."""


def main() -> None:
    torch.set_num_threads(1)
    apply_cpu_shim()
    dist.init_process_group("gloo")
    case = make_case(rows=ROWS, hidden=HIDDEN)
    truth = unfused(case, dtype=torch.float64)
    found = {}
    for tensor, sequence in ((1, False), (2, False), (2, True), (4, False), (4, True)):
        groups = build_groups(
            Degrees(
                world_size=4,
                tensor=tensor,
                pipeline=1,
                virtual_pipeline=1,
                context=1,
                data=4 // tensor,
            ),
            seed=1,
        )
        layout = f"TP{tensor}{'(SP)' if sequence else ''}"
        chunk = make_chunk(case, groups, tensor=tensor, sequence=sequence)
        chunk.fused_loss = False
        found[f"{layout}, unfused"] = measure(chunk, case, truth, groups)
        chunk.fused_loss = True
        for rows in CHUNKS:
            chunk.loss_chunk_bytes = rows * 4 * (VOCABULARY // tensor)
            found[f"{layout}, {rows} rows"] = measure(chunk, case, truth, groups)
        if tensor == 4:
            for name, broken in breaks(chunk).items():
                with broken:
                    found[f"{layout}, {name}"] = measure(chunk, case, truth, groups)
        found[f"{layout}, calls"] = calls_of(chunk, case, groups)
        destroy_groups()
    if dist.get_rank() == 0:
        write_result(found)
    dist.barrier()
    dist.destroy_process_group()


def make_chunk(case: Case, groups: Groups, *, tensor: int, sequence: bool) -> LLMChunk:
    """A model whose head has this rank's rows of the case's matrix."""
    llm = llm_config(
        num_layers=1,
        hidden_size=HIDDEN,
        num_kv_heads=4,
        vocab_size=VOCABULARY,
        vocab_padding=PADDING,
        tied_embeddings=False,
    )
    layout = BlockLayout(tensor=tensor, sequence_parallel=sequence)
    config = transformer_config(llm, layout=layout, dtype=torch.float32, backend="cpu")
    chunk = LLMChunk(config, llm, groups=groups.megatron, backend="cpu")
    with torch.no_grad():
        chunk.head.weight.copy_(case.weight_VH.chunk(tensor)[groups.place.tensor])
    return chunk


def inputs_of(case: Case) -> ModelInput:
    """One sequence whose last positions but one are the case's rows."""
    weights = torch.zeros(1, LENGTH)
    weights[0, LENGTH - ROWS - 1 : -1] = case.weights_R
    tokens = torch.zeros(1, LENGTH, dtype=torch.int64)
    tokens[0, LENGTH - ROWS :] = case.labels_R
    return to_input(make_rows(tokens, weights))


def run(chunk: LLMChunk, case: Case, groups: Groups) -> Outcome:
    """Loss and gradients, of the hidden states and of this rank's part of the matrix."""
    inputs = inputs_of(case)
    hidden_SBH = torch.zeros(LENGTH, 1, HIDDEN)
    hidden_SBH[inputs.trained_rows, 0] = case.hidden_RH
    cut = groups.degrees.tensor if chunk.config.sequence_parallel else 1
    own_SBH = hidden_SBH.chunk(cut)[groups.place.tensor % cut].clone().requires_grad_()
    chunk.head.weight.grad = None
    loss = chunk.loss_sum(own_SBH, inputs)
    (loss * SCALE).backward()
    parts = [own_SBH.grad]
    if cut > 1:
        parts = [torch.empty_like(own_SBH) for _ in range(cut)]
        dist.all_gather(parts, own_SBH.grad, group=groups.tensor)
    hidden_RH = torch.cat(parts)[inputs.trained_rows, 0]
    return Outcome(loss.detach(), hidden_RH, chunk.head.weight.grad)


def measure(chunk: LLMChunk, case: Case, truth: Outcome, groups: Groups) -> list[float]:
    """Worst distances of any rank from the truth: loss, hidden states, matrix."""
    outcome = run(chunk, case, groups)
    part = truth.weight.chunk(groups.degrees.tensor)[groups.place.tensor]
    worst = torch.tensor(
        [
            distance(outcome.loss, truth.loss),
            distance(outcome.hidden, truth.hidden),
            distance(outcome.weight, part),
        ]
    )
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return worst.tolist()


def breaks(chunk: LLMChunk) -> dict[str, AbstractContextManager]:
    """Ways to be wrong."""
    honest, chunks = loss_module._over_ranks, loss_module.row_chunks

    def alone(own_R3: torch.Tensor, group: dist.ProcessGroup) -> tuple[torch.Tensor, ...]:
        _, _, score = honest(own_R3, group)
        return own_R3[:, 0].contiguous(), own_R3[:, 1].contiguous(), score

    def fewer(*args: int, **options: int) -> list[slice]:
        return chunks(*args, **{**options, "chunk_bytes": 16 * 4 * (VOCABULARY // 4)})[:-1]

    unmasked = chunk.llm.model_copy(update={"vocab_padding": 0})
    return {
        "nothing broken": nullcontext(),
        "statistics of one rank": mock.patch.object(loss_module, "_over_ranks", alone),
        "last chunk dropped": mock.patch.object(loss_module, "row_chunks", fewer),
        "padding not masked": mock.patch.object(chunk, "llm", unmasked),
    }


def calls_of(chunk: LLMChunk, case: Case, groups: Groups) -> int:
    """How often the loss gathers anything from the other ranks, in chunks of 20 rows."""
    chunk.loss_chunk_bytes = 20 * 4 * (VOCABULARY // groups.degrees.tensor)
    with mock.patch.object(loss_module, "_over_ranks", wraps=loss_module._over_ranks) as calls:
        run(chunk, case, groups)
    return calls.call_count


if __name__ == "__main__":
    main()
