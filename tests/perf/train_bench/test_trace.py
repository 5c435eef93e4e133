"""Kernels are counted by kind, and the GPU's idle time by what no kernel covers."""

import dataclasses
import gzip
import json
from pathlib import Path

import pytest

from ghostvis_mega.perf.train_bench.kernel_kinds import kind_of
from ghostvis_mega.perf.train_bench.trace import GAPS, gaps_us, phases_us, trace_figures
from ghostvis_mega.perf.train_bench.trace_reading import STEP, Span, StepTrace, read_step

TE, ATEN = "transformer_engine::", "at::native::"


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
        ("nvjet_sm90_qrsss_128x128_128x6_2x1_v_badd_coopA_algo2_TNT", "GEMM"),
        ("statistics_kernel", "loss"),
        ("gradient_kernel", "loss"),
        ("triton_red_fused_copy__exp_sub_sum_unsqueeze_2", "loss"),
        ("triton_poi_fused__to_copy_arange_index_index_put_rsub_sub_view_0", "loss"),
        ("triton_poi_fused_add_cat_mul_rsub_sigmoid_silu_split_0", "norm and activation"),
        ("triton_per_fused_add_addmm_native_layer_norm_1", "norm and activation"),
        ("triton_poi_fused_addmm_gelu_2", "norm and activation"),
        ("triton_poi_fused_add_addmm_3", "elementwise"),
        (f"void {TE}fused_rope_forward_kernel<__nv_bfloat16>(int const*)", "norm and activation"),
        (f"void {ATEN}multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata<4>", "optimizer"),
        ("void cudnn::fusion::compute_dot_do_o_ragged_specialized<true, 128>()", "attention"),
        # "lambda" is no LAMB optimizer, and "nocast" no cast.
        (f"void {ATEN}unrolled<{ATEN}direct_copy_kernel_cuda()::{{lambda()#3}}>", "copy and cast"),
        (f"void {ATEN}kernel<2, {ATEN}gpu_kernel_impl_nocast<BinaryFunctor>>", "other"),
        (f"void {ATEN}elementwise_kernel<2, gpu_kernel_impl_nocast<MulFunctor>>", "elementwise"),
        (f"void {ATEN}unrolled_elementwise_kernel<CUDAFunctor_add, LoadWithCast>", "elementwise"),
        ("void cast_transpose_optimized_kernel(__nv_bfloat16 const*)", "copy and cast"),
        ("reduce_1Block_kernel", "other"),
    ],
)
def test_kinds(kernel: str, kind: str) -> None:
    assert kind_of(kernel) == kind


def figures_of(step: StepTrace, *, on_gpu: bool = True) -> dict[str, float]:
    return {figure["name"]: figure["value"] for figure in trace_figures(step, on_gpu=on_gpu)}


def test_idle_is_what_no_kernel_of_any_stream_covers() -> None:
    # 0-40 and 30-50 overlap, 80-90 lies alone: 60 of 100 are busy, though 70 were worked.
    spans = [
        Span("aten::mm", 0, 40, 40),
        Span("nccl_all_reduce", 30, 50, 20),
        Span("aten::mm", 80, 90, 10),
    ]
    step = StepTrace(0.0, 100.0, spans, [])
    assert list(gaps_us(step)) == [30, 10]
    found = figures_of(step)
    assert found["GPU idle"] == pytest.approx(40.0)
    assert (found["GEMM"], found["communication"]) == (50.0, 20.0)
    assert found["kernel aten::mm"] == 50.0
    assert "GPU idle" not in figures_of(step, on_gpu=False)


def test_idle_time_is_told_by_the_length_of_its_gaps() -> None:
    """Five gaps, one of each class; the last lies behind the last kernel."""
    ends, spans = [0.0], []
    for gap in (4.0, 5.0, 50.0, 999.0):
        start = ends[-1] + gap
        spans.append(Span("nvjet_x", start, start + 10, 10))
        ends.append(start + 10)
    end = ends[-1] + 2902.0
    found = figures_of(StepTrace(0.0, end, spans, []))
    assert end == 4000.0
    shares = [found[f"GPU idle, gaps {name}"] for _, name in GAPS]
    assert shares == pytest.approx([0.1, 0.125, 1.25, 24.975, 72.55])
    assert sum(shares) == pytest.approx(found["GPU idle"])
    assert found["kernels, copies and fills"] == 4


def test_a_real_shape_of_trace_is_cut_into_its_parts(tmp_path: Path) -> None:
    """Names and fields as PyTorch writes them. The vision backward is launched from a thread of
    autograd; the gradient norm, asked for within the LLM's part, ends the step."""
    kernels = (
        # name, asked for at, ran from, to
        ("nvjet_sm90_tst_192x192_64x4_2x1_v_bz_coopB_TNN", 110, 130, 150),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", 210, 212, 300),
        ("gradient_kernel", 220, 402, 412),
        ("nvjet_sm90_tss_192x192_64x3_2x1_v_badd_coopB_NTN", 410, 430, 500),
        (f"void {ATEN}reduce_kernel<NormTwoOps<float>>", 290, 510, 540),
        (f"void {ATEN}multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata", 515, 550, 580),
    )
    sections = (("vision", 105, 190), ("llm", 200, 400), ("vision", 401, 470))
    annotation = {"ph": "X", "cat": "user_annotation", "pid": 1, "tid": 1}
    events = [
        {**annotation, "name": STEP, "ts": 100, "dur": 500},
        {**annotation, "name": "nccl:all_reduce", "ts": 480, "dur": 20},
        {"ph": "M", "name": "process_name", "pid": 1},
        {"ph": "X", "cat": "gpu_user_annotation", "name": STEP, "ts": 130, "dur": 450},
    ]
    events += [
        {**annotation, "name": f"section: {name}", "ts": start, "dur": end - start}
        for name, start, end in sections
    ]
    for number, (name, asked, start, end) in enumerate(kernels):
        shared = {"ph": "X", "pid": 0, "tid": 7, "args": {"correlation": number}}
        launch = {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": asked, "dur": 2}
        events.append({**shared, **launch, "pid": 1, "tid": 2 + number % 2})
        events.append({**shared, "cat": "kernel", "name": name, "ts": start, "dur": end - start})
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    step = read_step(path, on_gpu=True)
    assert phases_us(step) == {
        "before the first kernel": 30,
        "vision": 20 + 88,
        "llm": 262,
        "end of step": 100,
    }
    found = figures_of(step)
    assert found["phase: llm"] == pytest.approx(100 * 262 / 500)
    assert found["optimizer"] == pytest.approx(100 * 60 / 500)
    assert found["GPU idle, gaps 20 to 100 us"] == pytest.approx(100 * (30 + 62 + 20) / 500)
    # By the time at which it ran, the end of the LLM's backward would be the vision side's.
    blind = dataclasses.replace(
        step, spans=[dataclasses.replace(s, launch_us=s.start_us) for s in step.spans]
    )
    assert phases_us(blind) != phases_us(step)


def test_operators_of_a_cpu_lose_the_time_of_those_they_call(tmp_path: Path) -> None:
    shared = {"ph": "X", "cat": "cpu_op", "pid": 1}
    events = [
        {**shared, "cat": "user_annotation", "name": STEP, "ts": 0, "dur": 100, "tid": 1},
        {**shared, "name": "aten::linear", "ts": 10, "dur": 50, "tid": 1},
        {**shared, "name": "aten::mm", "ts": 10, "dur": 30, "tid": 1},
        {**shared, "name": "aten::copy_", "ts": 45, "dur": 10, "tid": 1},
        {**shared, "name": "aten::mm", "ts": 20, "dur": 30, "tid": 2},
    ]
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    own = [(span.name, span.own_us) for span in read_step(path, on_gpu=False).spans]
    assert own == [("aten::linear", 10), ("aten::mm", 30), ("aten::copy_", 10), ("aten::mm", 30)]
