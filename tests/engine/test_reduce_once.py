"""An error on one rank ends it: DeepSpeed's reduction, in which others are missing, is left out."""

from types import MethodType, SimpleNamespace

import pytest
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.config import ZeroStageEnum
from torch import nn

from ghostvis_mega.engine.zero import ZeroEngine


def engine(stage: int, reduced: list[int]) -> ZeroEngine:
    """Of one parameter, around DeepSpeed's own context."""
    inner = SimpleNamespace(
        managed_gradient_accumulation=lambda: True,
        zero_optimization_stage=lambda: ZeroStageEnum(stage),
        pipeline_parallelism=False,
        optimizer=SimpleNamespace(
            _coalesce_grad_reduction=False, set_gradient_accumulation_boundary=lambda _: None
        ),
        inside_no_sync_ctxt=False,
        _is_gradient_accumulation_boundary=True,
        _flush_coalesced_reduction_zero3=lambda _: reduced.append(3),
        _flush_coalesced_reduction_zero12=lambda _: reduced.append(12),
    )
    inner.coalesce_grad_reduction = MethodType(DeepSpeedEngine.coalesce_grad_reduction, inner)
    made = ZeroEngine.__new__(ZeroEngine)
    made.engine, made.stage, made.flat, made.fused_wgrad = inner, stage, None, False
    made.optimizer = SimpleNamespace(use_grad_accum_attribute=False)
    made.trained = [nn.Parameter(torch.zeros(2))]
    return made


@pytest.mark.parametrize(("stage", "path"), [(1, 12), (2, 12), (3, 3)])
def test_nothing_is_reduced_after_an_error(stage: int, path: int) -> None:
    reduced: list[int] = []
    with engine(stage, reduced).reduce_once():
        pass
    assert reduced == [path], "without an error it is"
    broken = engine(stage, reduced)
    with pytest.raises(ValueError, match="only here"), broken.reduce_once():
        raise ValueError("only here")
    assert reduced == [path]
