"""Process groups of size one in the test process: Megatron-Core's layers want them even alone."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from ghostvis_mega.parallel.cpu_shim import apply_cpu_shim
from ghostvis_mega.parallel.groups import Groups, build_groups, destroy_groups
from ghostvis_mega.parallel.plan import Degrees


@pytest.fixture(scope="module")
def groups() -> Iterator[Groups]:
    """Groups of one process; they are gone after the module's tests."""
    if torch.cuda.is_available():
        pytest.skip("tests the CPU layers; run with CUDA_VISIBLE_DEVICES='' on this machine")
    apply_cpu_shim()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    degrees = Degrees(world_size=1, tensor=1, pipeline=1, virtual_pipeline=1, context=1, data=1)
    try:
        yield build_groups(degrees, seed=1)
    finally:
        destroy_groups()
        dist.destroy_process_group()
