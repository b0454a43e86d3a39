"""From quantised weights to int8 codes without a card: the kernels in Triton's interpreter, their code for cards of all
kinds, and what the compiler makes of their operator."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.fx import GraphModule
from torch.nn import functional

from tests.support.both_passes import quantised_layer
from tests.support.weight_codes import FORMATS
from tools.comfyui import REPO
from trainer_core.precision import card_operators, eight_bit

INTERPRETED = """
import torch
from tests.support import weight_codes
from trainer_core.precision import card_operators, eight_bit, weight_kernels

for form in weight_codes.FORMATS:
    for rows, columns in ((37, 200), (130, 448), (3, 8)):
        weight = weight_codes.quantised_weight(form, rows, columns, "cpu")
        weight_codes.assert_codes_are_those_of_plain_torch(weight)

weight = weight_codes.quantised_weight("nf4-bnb", 8, 2048, "cpu")
weight.tensors["nested_absmax"][:] = torch.nan  # of 256 blocks of 64 weights: of all rows
tensors = list(weight.tensors.values())
codes, scales = weight_kernels.quantise("nf4", (8, 2048), (64, 256), tensors, 127.0, transposed=False)
assert scales.isnan().all() and eight_bit.coded(weight.format, tensors, torch.int8).scales.isnan().all()
print("same")
"""
# Pointers to a format's tensors, and the kernels' numbers of it
POINTERS = {
    "nf4": (["*u8", "*u8", "*fp32", "*fp32", "*fp32", "*fp32"], (64, 256)),
    "packed": (["*u8", "*bf16", "*bf16"], (4, 128)),
    "fp8": (["*u8", "*fp32"], (False, True)),
}


def test_the_interpreter_finds_what_plain_torch_computes() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], capture_output=True, text=True, cwd=REPO, env=environment, check=False
    )
    assert done.stdout.strip() == "same", done.stderr[-3000:]


@pytest.mark.parametrize("card", [80, 86, 89, 90, 120])
@pytest.mark.parametrize("kind", POINTERS)
def test_the_kernels_compile_for_every_card(card: int, kind: str) -> None:
    """For the widest layers. Plain torch rounds a product before it adds to it, so the code must not join the two."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from trainer_core.precision import weight_kernels as kernels

    pointers, (first, second) = POINTERS[kind]
    names = ("inputs", "a", "b", "c", "d", "e")
    types = {**dict(zip(names, pointers, strict=False)), "codes": "*i8", "scales": "*fp32"}
    count = kernels.numbers_in_word(kind)
    words, block = 12288 // count, triton.next_power_of_2(12288 // count)
    form = {**dict.fromkeys(names[len(pointers) :]), "WORDS": words, "KIND": kind, "FIRST": first, "SECOND": second}
    by_rows = {"LARGEST": 127.0, "LEAST": torch.finfo(torch.float32).tiny, "BLOCK": block, "WRITES": True}
    by_tiles = {"BM": kernels.ROWS, "BW": kernels.SECTOR}
    for kernel, others, size in (
        (kernels.quantise_rows_kernel, by_rows, block),
        (kernels.quantise_transposed_kernel, by_tiles, kernels.ROWS * kernels.SECTOR),
    ):
        fixed = {**form, **others}
        signature = {each: "constexpr" if each in fixed else types.get(each, "i32") for each in kernel.arg_names}
        places = [(place,) for place, each in enumerate(signature) if each not in fixed]
        aligned = {place: [["tt.divisibility", 16]] for place in places}
        source = ASTSource(kernel, signature, constexprs=fixed, attrs=aligned)
        target = GPUTarget("cuda", card, 32)
        made = triton.compile(source, target=target, options=kernels.options(size * count // 16))
        assert made.metadata.shared <= 99 * 1024
        assert "fma.rn.f32" not in made.asm["ptx"]


@pytest.mark.parametrize("form", [each for each in FORMATS if not each.startswith("e")])
def test_compiled_passes_each_make_the_codes(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """int8 codes of all weights, kept from the forward to the backward pass, would take as much memory as the weights
    without quantisation. The operator as on a card, computed by plain torch."""
    layer, graphs = quantised_layer(form, 256, 128, "cpu"), list[GraphModule]()
    layer.codes = torch.int8

    def plain(tensors, kind, shape, sizes, gradient):
        found = eight_bit.quantised(layer.format.dequantise(tensors, torch.float32), torch.int8)
        return found.codes if gradient is None else found.codes.T.contiguous(), found.scales

    def compiled(graph, _inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    def passes(forward) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(40, 256, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
        y = functional.gelu(forward(x))
        return y, torch.autograd.grad(y.sum(), x)[0]

    wanted = passes(layer)
    card_operators.define_operators()
    monkeypatch.setattr(eight_bit, "_is_on_card", lambda tensor: tensor.dtype == torch.uint8)
    backend = aot_autograd(fw_compiler=compiled, bw_compiler=compiled, partition_fn=min_cut_rematerialization_partition)
    with torch.library._scoped_library(card_operators.NAMESPACE, "FRAGMENT") as library:
        library.impl("quantise_weight", plain, "CPU")
        torch._dynamo.reset()
        found = passes(torch.compile(layer.forward, backend=backend))
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
    _, backward = graphs
    made = [[node for node in graph.graph.nodes if "quantise_weight" in str(node.target)] for graph in graphs]
    assert [len(each) for each in made] == [1, 1]
    kept = [node.meta["val"].dtype for node in backward.graph.nodes if node.op == "placeholder"]
    assert torch.int8 not in kept and torch.uint8 in kept
