"""Every precision with every place for weights and activations, for every kind of adapter, on a GPU."""

from __future__ import annotations

import dataclasses
import functools
from typing import get_args

import pytest
import torch
from torch import Tensor

from tests.support.narrow import NARROW
from tests.support.random_base import relative_error
from trainer_core.adapters.inject import for_file, inject_lora
from trainer_core.adapters.master_weights import master_weights
from trainer_core.adapters.plan import plan_adapter
from trainer_core.config import BaseModelPrecision, LoraConfig, LoraType, MemoryConfig, TrainConfig
from trainer_core.events import SILENT
from trainer_core.memory.capture import CapturePool
from trainer_core.memory.compilation import Compilation
from trainer_core.memory.offload import HostCopies
from trainer_core.memory.placement import apply_memory, blocks_on_host, stream_blocks
from trainer_core.memory.step_graphs import StepGraphs
from trainer_core.precision.frozen_linear import set_products
from trainer_core.precision.quantise import quantise
from trainer_core.qwen_image import attention_choice
from trainer_core.qwen_image.attention_kernels import Kernel
from trainer_core.qwen_image.base_model import empty_transformer
from trainer_core.qwen_image.frozen_forward import optimise_frozen_forward
from trainer_core.qwen_image.transformer import SENSITIVE_LAYERS, predict_velocities
from trainer_core.qwen_image.types import Condition
from trainer_core.rng import seeded_globally

LAYERS = 4
pytestmark = pytest.mark.usefixtures("same_attention")
PRECISIONS = [each for each in get_args(BaseModelPrecision) if each != "file"]  # its layers are those of fp8 and int8
STREAMED = MemoryConfig(memory="manual", blocks_to_stream=3)
OFFLOADED = MemoryConfig(memory="manual", gradient_checkpointing_blocks=3, activation_offload=True)
KEPT = MemoryConfig(memory="manual", gradient_checkpointing_blocks=0)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A velocity, and by name the adapter's gradients and tensors for its file."""

    velocity: Tensor
    gradients: dict[str, Tensor]
    tensors: dict[str, Tensor]


def step(
    precision: BaseModelPrecision,
    kind: LoraType,
    memory: MemoryConfig = KEPT,
    *,
    targets: str = "all",
    compiled: bool = False,
    graphed: bool = False,
    dropout: float = 0.0,
    pairs: int = 1,
    in_8_bits: bool = False,
    device: str = "cuda",
) -> Outcome:
    """Forward and backward of a narrow transformer with the same random weights on each call, made on the device.

    `graphed`: the outcome is that of the second replay of CUDA graphs. Several `pairs` have different sizes.
    """
    lora = LoraConfig(lora_rank=4, lora_type=kind, lora_targets=targets, lora_dropout=dropout)
    config = TrainConfig(run_dir="-", encoded="-", memory=memory, lora=lora)
    there, draws = torch.device(device), torch.Generator(device).manual_seed(0)
    transformer = empty_transformer({**NARROW, "num_layers": LAYERS, "num_attention_heads": 4}).to_empty(device=there)
    transformer.pos_embed = empty_transformer(NARROW).pos_embed
    for name, weight in transformer.named_parameters():
        weight.data = torch.randn(weight.shape, generator=draws, device=there, dtype=torch.bfloat16)
        weight.data.mul_(weight.shape[-1] ** -0.5 if weight.ndim > 1 else 0.1).add_("norm" in name)
    optimise_frozen_forward(transformer.requires_grad_(False).eval())
    quantise(transformer, precision, SENSITIVE_LAYERS, there, SILENT)
    set_products(transformer, there, in_8_bits=in_8_bits)
    stream = stream_blocks(transformer, blocks_on_host(memory, LAYERS, checkpointing=True), there, memory)
    weights = master_weights(inject_lora(transformer, plan_adapter(transformer, config.lora), seed=1), torch.bfloat16)
    for name, weight in weights.masters.items():
        if name.endswith(("lora_B", "lokr_w1")):
            weight.data.copy_(torch.randn(weight.shape, generator=draws, device=there) * 0.3)
    weights.publish()
    graphs = StepGraphs(weights.masters.values(), CapturePool(there, apply_memory(transformer, stream, there, config)))
    transformer.train(dropout > 0)
    if compiled:
        Compilation(list(transformer.transformer_blocks), dropout=dropout > 0).start()
    latents, conditions = inputs(pairs, draws)
    sigma = torch.full((pairs,), 0.6, device=there)

    def passes() -> Tensor:
        """The velocities of all pairs, flat."""
        for weight in weights.masters.values():
            weight.grad = None
        with seeded_globally(0, "dropout", 0, there):
            velocities = predict_velocities(transformer, latents, sigma, conditions, graphs)
        velocity = torch.cat([each.flatten() for each in velocities])
        velocity.float().square().mean().backward()
        return velocity.detach()

    velocity = passes()
    if graphed:
        graphs.start()
        passes()  # captured, then replayed
        velocity = passes()
        assert graphs.is_active and len(graphs._graphs) == 1
    gradients = {name: each.grad for name, each in weights.masters.items() if each.grad is not None}
    return Outcome(velocity, gradients, for_file(transformer, weights.masters))


def inputs(pairs: int, draws: torch.Generator) -> tuple[list[Tensor], list[Condition]]:
    """Latents and conditions of pairs of different sizes, on the generator's device."""
    latents, conditions = [], []
    for number in range(pairs):
        shapes = (1, 16, 12, 12 - 4 * number), (1, 16, 8, 12), (1, 20 - number, 128)
        target, *seen, prompt = (torch.randn(shape, generator=draws, device=draws.device) for shape in shapes)
        latents, conditions = [*latents, target], [*conditions, Condition(tuple(seen), prompt)]
    return latents, conditions


@functools.cache
def plain(precision: BaseModelPrecision, kind: LoraType, targets: str = "all") -> Outcome:
    """The step with everything on the device."""
    return step(precision, kind, targets=targets)


@pytest.mark.parametrize("kind", get_args(LoraType))
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("memory", [STREAMED, OFFLOADED], ids=["streamed", "offloaded"])
def test_placement_is_bit_equal(precision: BaseModelPrecision, kind: LoraType, memory: MemoryConfig) -> None:
    wanted, found = plain(precision, kind), step(precision, kind, memory)
    assert torch.equal(found.velocity, wanted.velocity)
    assert len(wanted.gradients) > 50
    for one, other in ((found.gradients, wanted.gradients), (found.tensors, wanted.tensors)):
        assert one.keys() == other.keys()
        assert [name for name, each in one.items() if not torch.equal(each, other[name])] == []


GRAPHED = [
    *((precision, "lora", memory, False) for precision in PRECISIONS for memory in (KEPT, STREAMED, OFFLOADED)),
    *(("int8-quanto", kind, memory, False) for kind in ("dora", "lokr") for memory in (KEPT, STREAMED)),
    *(("int8-quanto", "lora", memory, True) for memory in (KEPT, STREAMED, OFFLOADED)),
]


@pytest.fixture
def no_late_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention's kernel is chosen before a capture, so that a replay uses that of ordinary steps."""
    on_card = attention_choice._on_card

    def chosen(query: Tensor, key: Tensor, *, in_8_bits: bool) -> Kernel | None:
        kernel = on_card(query, key, in_8_bits=in_8_bits)
        assert kernel is None or "/" in kernel.name, "without a choice, a capture uses the first of torch's kernels"
        return kernel

    monkeypatch.setattr(attention_choice, "_on_card", chosen)


@pytest.mark.usefixtures("no_late_choice")
@pytest.mark.parametrize("pairs", [1, 2])
@pytest.mark.parametrize(("precision", "kind", "memory", "compiled"), GRAPHED, ids=lambda value: case_name(value))
def test_graphs_are_bit_equal(
    precision: BaseModelPrecision,
    kind: LoraType,
    memory: MemoryConfig,
    compiled: bool,
    pairs: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(HostCopies.__init__.__kwdefaults__, "small_bytes", 1)  # or nothing would be large enough
    how = {"compiled": compiled, "pairs": pairs}
    wanted, found = (step(precision, kind, memory, graphed=graphed, **how) for graphed in (False, True))
    assert torch.equal(found.velocity, wanted.velocity)
    assert found.gradients.keys() == wanted.gradients.keys() and len(wanted.gradients) > 50
    assert [name for name, each in found.gradients.items() if not torch.equal(each, wanted.gradients[name])] == []


@pytest.mark.usefixtures("in_fixed_order")
@pytest.mark.parametrize("precision", ["int8-quanto", "fp8-quanto", "nf4-bnb"])
def test_8_bit_products_are_alike_in_every_place_and_near_exact_ones(precision: BaseModelPrecision) -> None:
    exact, wanted = plain(precision, "lora", "attention"), step(precision, "lora", targets="attention", in_8_bits=True)
    assert relative_error(wanted.velocity.float(), exact.velocity.float()) > 1e-3, "nothing was rounded"
    for memory in (STREAMED, OFFLOADED):
        found = step(precision, "lora", memory, targets="attention", in_8_bits=True)
        assert torch.equal(found.velocity, wanted.velocity)
        assert [name for name, each in found.gradients.items() if not torch.equal(each, wanted.gradients[name])] == []
    compiled = step(precision, "lora", STREAMED, targets="attention", in_8_bits=True, compiled=True)
    for found in (compiled, exact):
        assert_close(found, wanted, 6e-2)


@pytest.mark.parametrize("precision", ["nf4-bnb", "int4-quanto"])
def test_compiled_blocks_keep_no_codes_of_weights(precision: BaseModelPrecision) -> None:
    """Codes for 8-bit products, made in the forward pass, would take a byte per weight until the backward pass."""
    kept = list[Tensor]()
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each) or each, lambda each: each):
        step(precision, "lora", targets="attention", in_8_bits=True, compiled=True)
    assert len(kept) > 50 and not any(each.dtype == torch.int8 for each in kept)


def case_name(value: object) -> str:
    """A parameter's name in the test's id."""
    names = {id(KEPT): "kept", id(OFFLOADED): "offloaded", id(STREAMED): "streamed"}
    return names.get(id(value), str(value))


COMPILED = [
    *((precision, kind, KEPT) for precision in PRECISIONS for kind in get_args(LoraType)),
    *((precision, "lora", memory) for precision in PRECISIONS for memory in (OFFLOADED, STREAMED)),
    *((precision, "dora", STREAMED) for precision in ("none", "int8-quanto")),
]


@pytest.mark.parametrize(("precision", "kind", "memory"), COMPILED, ids=case_name)
def test_compiled_blocks_differ_by_rounding(
    precision: BaseModelPrecision, kind: LoraType, memory: MemoryConfig
) -> None:
    """In bfloat16, where the compiler rounds less often than single operations do. Fewer targets compile faster."""
    wanted = plain(precision, kind, "attention")
    assert_close(step(precision, kind, memory, targets="attention", compiled=True), wanted)


def test_compiled_blocks_drop_the_same_values_again() -> None:
    """With other values in the recomputation, the gradients would differ from those of kept activations."""
    wanted, found = (
        step("none", "lora", memory, targets="attention", dropout=0.5, compiled=True) for memory in (KEPT, OFFLOADED)
    )
    assert_close(found, wanted)
    undropped = plain("none", "lora", "attention")
    assert relative_error(wanted.velocity.float(), undropped.velocity.float()) > 6e-2  # dropout has an effect


def assert_close(found: Outcome, wanted: Outcome, bound: float = 3e-2) -> None:
    """The velocity and all gradients differ by at most 3 %. bfloat16 and float32 differ by 0.6 % and 0.9 % here."""
    assert found.gradients.keys() == wanted.gradients.keys()
    every = [torch.cat([each.gradients[name].flatten() for name in wanted.gradients]) for each in (found, wanted)]
    errors = relative_error(found.velocity.float(), wanted.velocity.float()), relative_error(*every)
    assert max(errors) < bound, errors
