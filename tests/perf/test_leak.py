"""The packing leak command: zero here, and its controls can fail."""

import math
from pathlib import Path
from unittest import mock

import pytest
import torch

from ghostvis_mega.model.attention import segmented_params
from ghostvis_mega.parallel.groups import Groups
from ghostvis_mega.perf import leak

pytestmark = pytest.mark.filterwarnings("ignore:If you are using transformer_engine:UserWarning")

CPU = torch.device("cpu")


LENGTHS = (40, 48, 32, 24)


def verdicts(groups: Groups) -> dict[str, bool]:
    run = leak.leak_run(precision="fp32")
    rows = leak.measure_leak(run, groups, device=CPU, bar=0.0, lengths=LENGTHS)
    return {row["name"].split(" (")[0].split(": ", 1)[1]: row["ok"] for row in rows}


def test_nothing_leaks_and_the_control_does(groups: Groups) -> None:
    found = verdicts(groups)
    assert found.keys() == {
        "logits of the other samples",
        "loss of the other samples",
        "gradient of the other samples",
        "the same pack twice",
        "the changed sample itself",
        "control, a boundary ignored",
    }
    assert all(found.values())


def test_attention_across_one_boundary_is_a_leak(groups: Groups) -> None:
    def merged(cu_seqlens: torch.Tensor, **options: object) -> object:
        ends = torch.cat([cu_seqlens[:1], cu_seqlens[2:]])
        return segmented_params(ends, **{**options, "max_seqlen": int(ends.diff().max())})

    with mock.patch("ghostvis_mega.model.inputs.segmented_params", merged):
        found = verdicts(groups)
    assert not found["logits of the other samples"]
    assert not found["loss of the other samples"]
    assert not found["gradient of the other samples"]
    assert found["the same pack twice"]


def test_a_nan_that_comes_second_is_not_forgotten() -> None:
    worst: dict[str, tuple[float, str]] = {}
    zero, nan = torch.zeros(1), torch.full((1,), math.nan)
    for name, after in (("loss a", zero), ("loss b", nan), ("loss c", zero + 1)):
        leak._compare({name: zero}, {name: after}, worst)
    assert math.isnan(worst["loss"][0]) and worst["loss"][1] == "loss b"


def test_every_text_token_changes() -> None:
    run = leak.leak_run(precision="fp32")
    pack = leak.make_pack(run, LENGTHS)
    for sample in range(len(LENGTHS)):
        changed = pack.changed(sample)
        different = pack.tokens_S != changed.tokens_S
        inside = torch.zeros_like(different)
        inside[pack.span(sample)] = True
        assert torch.equal(different, inside & (pack.tokens_S != leak.IMAGE_TOKEN))
        assert int(changed.tokens_S.min()) >= leak.IMAGE_TOKEN
        assert int(changed.tokens_S.max()) < 1024


def test_memory_bench_refuses_without_a_gpu(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from ghostvis_mega.cli.main import app

    with mock.patch("torch.cuda.is_available", return_value=False):
        result = CliRunner().invoke(app, ["bench", "memory", str(tmp_path / "run.yaml")])
    assert result.exit_code == 2
    assert "no CUDA device" in result.output
