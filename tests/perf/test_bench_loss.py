"""What `bench loss` prints, that a wrong loss is seen, and that wrong settings are refused."""

from unittest import mock

import pytest
import torch
from typer.testing import CliRunner

from ghostvis_mega.cli.main import app
from ghostvis_mega.model.loss_kernels import TorchLossKernels
from ghostvis_mega.parallel.groups import Groups
from ghostvis_mega.perf.bench_loss import LayerSize, bench_run, measure_loss
from ghostvis_mega.utils.figures import Figure

SIZE = LayerSize(hidden=32, vocabulary=40_000)
KINDS = [
    ("forward and backward", "ms"),
    ("products of both, a process", "TFLOP/s"),
    ("loss alone", "ms"),
    ("peak beyond weights and gradients", "MiB"),
]
PARTS = ["loss", "gradient of the hidden states", "gradient of the matrix"]


def rows_of(groups: Groups, *, precision: str = "fp32", rows: int = 600) -> dict[str, Figure]:
    run = bench_run(SIZE, tensor=1, precision=precision, device="cpu")
    figures = measure_loss(
        [run],
        groups,
        device=torch.device("cpu"),
        rows=rows,
        repeats=1,
        progress=lambda _: None,
    )
    return {figure["name"]: figure for figure in figures}


def test_each_way_is_measured_and_both_agree(groups: Groups) -> None:
    found = rows_of(groups)
    names = [f"{SIZE}, {way}: {kind}" for way in ("unfused", "fused") for kind, _ in KINDS]
    parts = [f"{SIZE}: {part}, relative difference" for part in PARTS]
    assert list(found) == names + parts
    for kind, unit in KINDS:
        row = found[f"{SIZE}, fused: {kind}"]
        assert row["unit"] == unit and row["ok"] is None and row["value"] > 0
    assert [found[name]["ok"] for name in parts] == [True] * 3
    # All scores take 92 MiB.
    assert 80 < found[f"{SIZE}, unfused: {KINDS[3][0]}"]["value"] < 400


def test_several_sizes_of_chunks_stand_side_by_side(groups: Groups) -> None:
    run, shapes = bench_run(SIZE, tensor=1, precision="fp32", device="cpu"), []
    honest = TorchLossKernels.gradient_

    def noted(kernels: TorchLossKernels, logits_RV: torch.Tensor, labels_R: torch.Tensor, **rest):
        shapes.append(len(logits_RV))
        honest(kernels, logits_RV, labels_R, **rest)

    with mock.patch.object(TorchLossKernels, "gradient_", noted):
        figures = measure_loss(
            [run],
            groups,
            device=torch.device("cpu"),
            rows=600,
            repeats=1,
            progress=lambda _: None,
            chunks_mib=(20, 60),
        )
    # A row of scores takes 156 KiB.
    assert {max(shapes), *shapes} == {128, 88, 320, 280}
    found = {figure["name"]: figure for figure in figures}
    for size in (20, 60):
        for part in PARTS:
            assert found[f"{SIZE}, fused, {size} MiB: {part}, relative difference"]["ok"]
        assert found[f"{SIZE}, fused, {size} MiB: {KINDS[0][0]}"]["value"] > 0


def test_bf16_is_held_to_a_bar_of_its_own(groups: Groups) -> None:
    found = rows_of(groups, precision="bf16", rows=50)
    rows = [found[f"{SIZE}: {part}, relative difference"] for part in PARTS]
    assert [(row["bar"], row["ok"]) for row in rows] == [(2e-2, True)] * 3
    assert rows[1]["value"] > 1e-4


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_wrong_gradient_is_seen(groups: Groups, precision: str) -> None:
    honest = TorchLossKernels.gradient_

    def late(kernels: TorchLossKernels, logits_RV: torch.Tensor, labels_R: torch.Tensor, **rest):
        honest(kernels, logits_RV, labels_R + 1, **rest)

    with mock.patch.object(TorchLossKernels, "gradient_", late):
        found = rows_of(groups, precision=precision, rows=50)
    rows = [found[f"{SIZE}: {part}, relative difference"] for part in PARTS]
    assert [row["ok"] for row in rows] == [True, False, False]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--size", "64"], "'64' is not HIDDENxVOCABULARY, such as 3584x152064"),
        (["--size", "0x100"], "'0x100' is not HIDDENxVOCABULARY"),
        (["--size", "64x1001", "--processes", "2"], "does not divide over 2 processes"),
        (["--device", "tpu"], "'tpu' is not auto, cpu or cuda"),
        (["--chunk-mib", "0"], "greater than or equal to 1"),
        (["--precision", "fp16"], "'fp16' is not fp32 or bf16"),
        (["--device", "cpu", "--ranks-per-gpu", "2"], "no GPU to share"),
    ],
)
def test_wrong_settings_are_refused(arguments: list[str], said: str) -> None:
    done = CliRunner().invoke(app, ["bench", "loss", *arguments])
    assert done.exit_code == 2
    assert said in " ".join(done.output.replace("│", " ").split())
