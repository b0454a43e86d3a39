"""Device time of a profiled step by group: names as torch's profiler shows them, and a real trace of the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from tests.support.kernel_groups import (
    ATTENTION_BACKWARD,
    ATTENTION_FORWARD,
    CODES,
    COPIES,
    ELEMENTWISE,
    OPTIMIZER,
    PRODUCTS,
    PRODUCTS_8BIT,
    PRODUCTS_THIN,
    TRANSFERS,
    Work,
    busy_time,
    group_of,
    profiled,
    work_in,
)

RANK = 16
BF16, INT8, FP8 = "c10::BFloat16", "signed char", "c10::Float8_e4m3fn"
WIDE = ((8422, 3072), (3072, 3072))


def work(
    name: str,
    operation: str = "",
    shapes: tuple[tuple[int, ...], ...] = (),
    types: tuple[str, ...] = (BF16,),
    start: float = 0.0,
    end: float = 1.0,
) -> Work:
    return Work(name, operation, shapes, types, start, end, end - start)


@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        (work("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3"), ATTENTION_FORWARD),
        (work("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_2"), ATTENTION_BACKWARD),
        (work("void cudnn::fusion::compute_dot_do_o_specialized<true>(...)"), ATTENTION_BACKWARD),
        (work("void flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64>>(Flash_fwd_params)"), ATTENTION_FORWARD),
        (work("fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention)"), ATTENTION_FORWARD),
        (work("fmha_cutlassB_bf16_aligned_64x64_k128_sm80(PyTorchMemEffAttention)"), ATTENTION_BACKWARD),
        (work("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT", "aten::mm", WIDE), PRODUCTS),
        (work("nvjet_tst_64x8_64x16_4x1_v_bz_TNT", "aten::mm", ((8422, 3072), (3072, 16))), PRODUCTS_THIN),
        (work("sm80_xmma_gemm_bf16bf16_bf16f32", "aten::mm", ((48, 8422), (8422, 3072))), PRODUCTS_THIN),
        (work("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT"), PRODUCTS),
        (work("void cutlass::device_kernel<at::cuda::enable_3x>", "aten::_scaled_mm", WIDE, (FP8,)), PRODUCTS_8BIT),
        (work("cutlass_80_tensorop_i16832gemm_s8_128x128", "aten::_int_mm", WIDE, (INT8, INT8)), PRODUCTS_8BIT),
        (work("int8_product_kernel", "trainer::product", WIDE, (INT8, INT8)), PRODUCTS_8BIT),
        (work("triton_tem_fused_mm_0"), PRODUCTS),
        (work("triton_poi_fused__to_copy_mul_3", "triton_poi_fused__to_copy_mul_3", (), (INT8, BF16)), CODES),
        (work("quantise_kernel", "trainer::product"), CODES),
        (work("transposed_kernel", "trainer::product"), CODES),
        (work("triton_poi_fused_add_0", "_Product"), ELEMENTWISE),
        (work("void at::native::(anonymous namespace)::rounding", "_Product"), ELEMENTWISE),
        (work("void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>"), CODES),
        (work("triton_red_fused_native_layer_norm_mul_mm_attention_2"), ELEMENTWISE),
        (work("void at::native::vectorized_elementwise_kernel<8, at::native::GeluCUDAKernelImpl>"), ELEMENTWISE),
        (work("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>"), OPTIMIZER),
        (work("void at::native::(anonymous namespace)::CatArrayBatchedCopy<...>", "aten::cat"), COPIES),
        (work("Memcpy DtoD (Device -> Device)", "aten::copy_"), COPIES),
        (work("Memset (Device)"), COPIES),
        (work("Memcpy HtoD (Pinned -> Device)", "aten::copy_"), TRANSFERS),
    ],
)
def test_a_kernel_has_the_group_of_what_it_does(kernel: Work, group: str) -> None:
    assert group_of(kernel, RANK) == group


def test_kernels_are_linked_to_the_operations_that_launch_them() -> None:
    launcher = {"External id": 7, "Input Dims": [[8422, 3072], [3072, 16], []], "Input type": [BF16, BF16, "Scalar"]}
    events: list[dict[str, Any]] = [
        {"cat": "cpu_op", "name": "aten::mm", "ts": 0.0, "dur": 3.0, "tid": 1, "args": launcher},
        {"cat": "kernel", "name": "nvjet_tst", "ts": 10.0, "dur": 4.0, "args": {"External id": 7}},
        {"cat": "kernel", "name": "in a graph", "ts": 20.0, "dur": 5.0, "args": {"External id": 9}},
        {"cat": "gpu_user_annotation", "name": "Optimizer.step", "ts": 0.0, "dur": 99.0, "args": {"External id": 7}},
    ]
    linked, unlinked = work_in(events)
    assert linked == work("nvjet_tst", "aten::mm", ((8422, 3072), (3072, 16), ()), (BF16, BF16, "Scalar"), 10.0, 14.0)
    assert group_of(linked, RANK) == PRODUCTS_THIN
    assert unlinked == work("in a graph", types=(), start=20.0, end=25.0)


def test_time_in_which_two_kernels_run_counts_once() -> None:
    spans = [(0.0, 4.0), (1.0, 2.0), (3.0, 6.0), (8.0, 9.0)]
    assert busy_time([work("", start=start, end=end) for start, end in spans]) == 7.0


def test_on_the_cpu_an_operation_counts_without_those_that_it_calls() -> None:
    x, wide, thin = torch.randn(200, 96), torch.randn(96, 96), torch.randn(96, RANK)
    heads = torch.randn(1, 2, 200, 64, requires_grad=True)

    def step() -> None:
        functional.linear(x, wide)
        x @ thin
        functional.scaled_dot_product_attention(heads, heads, heads).sum().backward()

    found = profiled(step, torch.device("cpu"))
    groups = {group_of(each, RANK) for each in found}
    assert {PRODUCTS, PRODUCTS_THIN, ATTENTION_FORWARD, ATTENTION_BACKWARD} <= groups
    assert sum(each.busy for each in found) == pytest.approx(busy_time(found), rel=1e-3)  # one thread
