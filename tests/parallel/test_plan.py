"""Degrees are arithmetic, and chunks hold the layers that Megatron-Core puts there."""

from pathlib import Path

import pytest
import torch
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from ghostvis_mega.config.load import load_run_config
from ghostvis_mega.config.rules import find_problems
from ghostvis_mega.config.schema import RunConfig
from ghostvis_mega.engine.build import block_layout
from ghostvis_mega.model.megatron import transformer_config
from ghostvis_mega.parallel.plan import Degrees

EXAMPLE = Path(__file__).resolve().parents[2] / "examples/configs/vlm_tiny_easyvqa.yaml"


def run_of(
    *, tensor: int = 1, pipeline: int = 1, virtual: int = 1, layers: int = 8, **ends: int | None
) -> RunConfig:
    return load_run_config(
        EXAMPLE,
        [
            f"parallel.tensor={tensor}",
            f"parallel.pipeline={pipeline}",
            f"parallel.virtual_pipeline={virtual}",
            f"model.llm.num_layers={layers}",
            "batch.global_size=16",
            *(f"parallel.{name}_stage_layers={size}" for name, size in ends.items() if size),
        ],
    )


def test_what_the_model_leaves_over_is_data_parallel():
    run = run_of(tensor=2, pipeline=2)
    degrees = Degrees.of(run, world_size=16)
    assert (degrees.data, degrees.model_parallel) == (4, 4)
    assert degrees.num_micro_batches(run) == 4
    assert degrees.describe() == "16 processes = TP 2 x PP 2 x DP 4"


def test_a_world_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="6 processes cannot hold replicas of 4"):
        Degrees.of(run_of(tensor=2, pipeline=2), world_size=6)


def test_the_bubble_shrinks_with_micro_batches_and_chunks():
    plain, interleaved = run_of(pipeline=2), run_of(pipeline=2, virtual=2)
    assert Degrees.of(plain, world_size=2).bubble_share(plain) == 1 / 16
    assert Degrees.of(interleaved, world_size=2).bubble_share(interleaved) == 1 / 32


# Megatron-Core's configuration warns of a default of its own.
@pytest.mark.filterwarnings("ignore:full scope is deprecated:UserWarning")
@pytest.mark.parametrize(
    ("pipeline", "virtual", "layers", "first", "last"),
    [
        (1, 1, 8, None, None),
        (2, 1, 8, None, None),
        (4, 1, 8, None, None),
        (2, 2, 8, None, None),
        (4, 2, 8, None, None),
        (2, 1, 8, 3, None),
        (2, 1, 8, None, 3),
        (2, 1, 8, 3, 5),
        (4, 1, 8, 1, 1),
        (4, 1, 8, 2, None),
        (2, 2, 6, 4, None),
        (2, 2, 6, 4, 2),
        (4, 2, 12, 2, 2),
        (4, 3, 18, None, 9),
    ],
)
def test_layers_lie_where_megatron_puts_them(
    pipeline: int, virtual: int, layers: int, first: int | None, last: int | None
):
    run = run_of(pipeline=pipeline, virtual=virtual, layers=layers, first=first, last=last)
    assert find_problems(run, world_size=pipeline, device="cpu") == []
    degrees = Degrees.of(run, world_size=pipeline)
    layout = block_layout(run, degrees)
    config = transformer_config(run.model.llm, layout=layout, dtype=torch.float32, backend="cpu")
    seen = []
    for stage in range(pipeline):
        ranges = degrees.layers_of_stage(run, stage)
        assert sum(map(len, ranges)) == degrees.layers_per_stage(run)[stage]
        for chunk, numbers in enumerate(ranges):
            number = chunk if virtual > 1 else None
            start = get_transformer_layer_offset(config, vp_stage=number, pp_rank=stage)
            count = get_num_layers_to_build(config, vp_stage=number, pp_rank=stage)
            assert numbers == range(start, start + count)
            seen += numbers
    assert sorted(seen) == list(range(layers))


def test_layers_that_cannot_be_dealt_out_are_refused():
    run = run_of(pipeline=4, first=1)
    with pytest.raises(ValueError, match="8 layers cannot be dealt out over 4"):
        Degrees.of(run, world_size=4).layers_of_stage(run, 0)
