"""What tests share: the device environment, the skip of GPU tests, groups and a dataset."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from ghostvis_mega.parallel.groups import Groups

# Before torch or DeepSpeed is imported: both read these once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where torch sees no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu") is not None]
    if not marked:
        return
    import torch

    if torch.cuda.is_available():
        return
    for item in marked:
        item.add_marker(pytest.mark.skip(reason="needs CUDA"))


@pytest.fixture(scope="module")
def groups() -> "Iterator[Groups]":
    """Process groups of size one in the test process, which Megatron-Core's layers want even alone;
    they are gone after the module's tests."""
    import torch

    from ghostvis_mega.parallel.cpu_shim import apply_cpu_shim

    if torch.cuda.is_available():
        pytest.skip("tests the CPU layers; run with CUDA_VISIBLE_DEVICES='' on this machine")
    apply_cpu_shim()
    with _groups_of_one() as made:
        yield made


@pytest.fixture(scope="module")
def gpu_groups() -> "Iterator[Groups]":
    """The same for tests marked `gpu`, on the first GPU; nothing is sent there."""
    import torch

    torch.cuda.set_device(0)
    with _groups_of_one() as made:
        yield made


@contextmanager
def _groups_of_one() -> "Iterator[Groups]":
    import torch.distributed as dist

    from ghostvis_mega.parallel.groups import build_groups, destroy_groups
    from ghostvis_mega.parallel.plan import Degrees

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    degrees = Degrees(world_size=1, tensor=1, pipeline=1, virtual_pipeline=1, context=1, data=1)
    try:
        yield build_groups(degrees, seed=1)
    finally:
        destroy_groups()
        dist.destroy_process_group()


@pytest.fixture(scope="session")
def easy_vqa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `train.gvd` and `test.gvd`: real pictures and questions, a few of easy-vqa."""
    from ghostvis_mega.data.ingest import Source, ingest
    from ghostvis_mega.data.readers.easy_vqa import easy_vqa_rows, easy_vqa_text
    from ghostvis_mega.data.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("easy-vqa")
    tokenizer = train_tokenizer(
        (*easy_vqa_text("train"), "system", "user", "assistant", "tool"),
        vocab_size=512,
        path=folder / "tokenizer.model",
    )
    for split, count in (("train", 24), ("test", 12)):
        # Every fourth row: some pictures are asked about twice, and none more often.
        rows = islice(easy_vqa_rows(split), 0, 4 * count, 4)
        ingest([Source(split, rows)], tokenizer=tokenizer, path=folder / f"{split}.gvd")
    return folder
