"""Kernels are counted by kind, and the GPU's idle time by what no kernel covers."""

import pytest

from ghostvis_mega.perf.train_bench.trace import Span, busy_us, kind_of, trace_figures


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_tst_192x192_64x4_2x1_v_bz_coopA_TNN", "GEMM"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "GEMM"),
        ("aten::addmm", "GEMM"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL", "communication"),
        ("transformer_engine::cross_entropy_kernel", "loss"),
        ("cunn_SoftMaxForward<LogSoftMaxForwardEpilogue>", "loss"),
        ("softmax_warp_forward", "attention"),
        ("multi_tensor_apply_kernel<AdamFunctor>", "optimizer"),
        ("rmsnorm_fwd_tuned_kernel", "norm and activation"),
        ("swiglu_backward", "norm and activation"),
        ("direct_copy_kernel_cuda", "copy and cast"),
        ("Memcpy DtoD (Device -> Device)", "copy and cast"),
        ("reduce_1Block_kernel", "other"),
    ],
)
def test_kinds(kernel: str, kind: str) -> None:
    assert kind_of(kernel) == kind


def test_idle_is_what_no_kernel_of_any_stream_covers() -> None:
    # 0-40 and 30-50 overlap, 80-90 lies alone: 60 of 100 are busy, though 70 were worked.
    spans = [
        Span("aten::mm", 0, 40, 40),
        Span("nccl_all_reduce", 30, 50, 20),
        Span("aten::mm", 80, 90, 10),
    ]
    assert busy_us(spans) == 60
    figures = trace_figures(spans, step_us=100.0, on_gpu=True)
    found = {figure["name"]: figure["value"] for figure in figures}
    assert found["GPU idle"] == pytest.approx(40.0)
    assert (found["GEMM"], found["communication"]) == (50.0, 20.0)
    assert found["kernel aten::mm"] == 50.0
    on_cpu = trace_figures(spans, step_us=100.0, on_gpu=False)
    assert "GPU idle" not in {figure["name"] for figure in on_cpu}
