"""Which GPU a rank takes, alone or beside others."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ghostvis_mega import session
from ghostvis_mega.config.schema import TrainConfig
from ghostvis_mega.perf.certify.gpu_layouts import LAYOUTS
from ghostvis_mega.perf.certify.ranks import opening_run
from ghostvis_mega.perf.certify.request import Entry, Request
from ghostvis_mega.utils.errors import ConfigError
from ghostvis_mega.utils.launch import run_ranks


def device_of(local: int, share: int) -> torch.device:
    run = SimpleNamespace(train=TrainConfig(steps=1, ranks_per_gpu=share))
    os.environ["LOCAL_RANK"] = str(local)
    return session.local_device(run)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "0")


@pytest.mark.parametrize(("share", "gpus"), [(1, [0, 1]), (2, [0, 0, 1, 1]), (3, [0, 0, 0, 1])])
def test_ranks_fill_one_gpu_after_the_other(two_gpus: None, share: int, gpus: list[int]) -> None:
    assert [device_of(rank, share).index for rank in range(len(gpus))] == gpus


@pytest.mark.parametrize(("local", "share", "enough"), [(2, 1, 2), (4, 2, 3), (7, 1, 4)])
def test_a_rank_without_a_gpu_is_refused(
    two_gpus: None, local: int, share: int, enough: int
) -> None:
    with pytest.raises(ConfigError, match=f"LOCAL_RANK={local}: 2 GPUs .*gpu={enough}[.]"):
        device_of(local, share)
    assert device_of(local, enough).index == 1


def test_ranks_that_share_are_of_different_machines_to_nccl_and_of_one_gpu_to_deepspeed() -> None:
    first, second = (
        session.sharing_environment(torch.device("cuda", 1), rank=rank) for rank in (2, 3)
    )
    assert first["NCCL_HOSTID"] != second["NCCL_HOSTID"]
    assert first["LOCAL_RANK"] == second["LOCAL_RANK"] == "1"


def test_a_certificate_opens_its_ranks_as_it_was_asked_to(tmp_path: Path) -> None:
    entry = Entry(LAYOUTS[0].name, 2)
    asked = Request(set="gpu", entries=(entry,), steps=1, folder=tmp_path, ranks_per_gpu=4)
    asked.write(tmp_path / "request.json")
    assert opening_run(Request.read(tmp_path / "request.json")).train.ranks_per_gpu == 4


@pytest.mark.gpu
def test_ranks_that_share_a_gpu_reach_each_other(tmp_path: Path) -> None:
    worker = Path(__file__).with_name("sharing_worker.py")
    run_ranks(
        [str(worker)], ranks=2, timeout_s=120, folder=tmp_path, environment={"OMP_NUM_THREADS": "1"}
    )
