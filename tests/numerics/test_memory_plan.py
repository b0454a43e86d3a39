"""The planned bytes against those that torch uses on the CPU: saved tensors, weights and the peak of a step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch.profiler import ProfilerActivity, profile

from tests.support.narrow import planned_size
from trainer_core.adapters.inject import inject_lora
from trainer_core.adapters.master_weights import master_weights
from trainer_core.adapters.plan import plan_adapter
from trainer_core.config import (
    BaseModelPrecision,
    FlavourName,
    LoraConfig,
    LoraTargets,
    MixedPrecision,
    ModelConfig,
    TrainConfig,
)
from trainer_core.events import SILENT
from trainer_core.geometry import Size
from trainer_core.memory.compilation import Compilation
from trainer_core.memory.recompute import Recomputation
from trainer_core.planning import activations
from trainer_core.planning.activations import Tokens, saved_activation_bytes
from trainer_core.planning.plan import plan_memory
from trainer_core.planning.workload import Workload, pair_size
from trainer_core.precision.quantise import quantise
from trainer_core.qwen_image.attention import OfPair
from trainer_core.qwen_image.base_model import empty_transformer
from trainer_core.qwen_image.block import Shared
from trainer_core.qwen_image.frozen_forward import optimise_frozen_forward
from trainer_core.qwen_image.transformer import SENSITIVE_LAYERS, predict_velocity
from trainer_core.qwen_image.types import Condition

TEXT = 16


def network_of(heads: int, num_layers: int, *, dtype: torch.dtype, zero_cond_t: bool = False) -> nn.Module:
    """A transformer with Qwen-Image's layout and `heads` heads. All its weights are 0.01."""
    settings = {"num_layers": num_layers, "num_attention_heads": heads, "zero_cond_t": zero_cond_t}
    network = empty_transformer(settings)
    rotary = network.pos_embed
    network.to_empty(device="cpu").to(dtype).requires_grad_(False)
    network.pos_embed = rotary
    optimise_frozen_forward(network)
    for weight in network.parameters():
        weight.data.fill_(0.01)
    return network


def bytes_of(tensors: list[Tensor]) -> int:
    """Bytes of the tensors' storages, each counted once."""
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())


def of_pairs(tokens: Tokens) -> list[OfPair] | None:
    """The prompt and picture tokens of each pair, if there are several."""
    if tokens.batch == 1:
        return None
    prompts = torch.arange(tokens.batch * tokens.text).split(tokens.text)
    pictures = (tokens.batch * tokens.text + torch.arange(tokens.batch * tokens.image)).split(tokens.image)
    both = map(torch.cat, zip(prompts, pictures, strict=True))
    return [OfPair(each, each) for each in both]


def saved_bytes(block: nn.Module, network: nn.Module, tokens: Tokens, dtype: torch.dtype, zero_cond_t: bool) -> int:
    """Bytes that autograd saves in a block's forward pass, without weights and tensors that all blocks share."""
    width, prompts = network.inner_dim, tokens.batch * tokens.text
    image, text = (
        torch.randn(1, length, width, dtype=dtype, requires_grad=True)
        for length in (tokens.batch * tokens.image, prompts)
    )
    rotary = network.pos_embed([[(1, 1, tokens.image)]], max_txt_seq_len=tokens.text, device=torch.device("cpu"))
    angles = torch.view_as_real(torch.cat([each for each in rotary[::-1] for _ in range(tokens.batch)]))
    temb = torch.randn(tokens.batch * (1 + zero_cond_t), width, dtype=dtype)
    rows = torch.arange(len(temb)).repeat_interleave(tokens.image // (1 + zero_cond_t))
    same = Shared(
        time=temb,
        prompt_time=temb[: tokens.batch],
        angles=angles,
        targets=slice(None),
        picture_rows=rows if len(temb) > 1 else None,
        prompt_rows=torch.arange(tokens.batch).repeat_interleave(tokens.text) if tokens.batch > 1 else None,
        pairs=of_pairs(tokens),
    )
    shared = [*network.parameters(), *network.buffers(), angles, rows]
    known = {each.untyped_storage().data_ptr() for each in shared}
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        kept = block(image, text, same)
    assert kept[0].requires_grad
    return bytes_of(saved)


CASES = {
    "image-attention": {},
    "attention": {"targets": "attention"},
    "attention-mlp": {"targets": "attention-mlp"},
    "all": {"targets": "all"},
    "dropout": {"targets": "attention-mlp", "dropout": 0.1},
    "dora": {"kind": "dora", "targets": "attention-mlp"},
    "dora with dropout": {"kind": "dora", "dropout": 0.1},
    "lokr": {"kind": "lokr", "targets": "attention-mlp"},
    "lokr without a third factor": {"kind": "lokr", "factor": 16, "heads": 1},
    "batch": {"batch": 2},
    "edit-v3": {"flavour": "edit-v3"},
    "float32": {"precision": "no"},
    "full width": {"heads": 24},
}


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_a_block_keeps_what_is_planned(case: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """The difference between two lengths shows that the bytes per token are right, so the plan holds for any length."""
    monkeypatch.setattr(activations, "MASK_BYTES", 2)  # the CPU keeps the dropout mask in bfloat16
    targets, dropout = case.get("targets", "image-attention"), case.get("dropout", 0.0)
    flavour, heads = case.get("flavour", "edit-v1"), case.get("heads", 2)
    dtype = torch.float32 if case.get("precision") == "no" else torch.bfloat16
    kind = {"lora_type": case.get("kind", "lora"), "lokr_factor": case.get("factor", 8)}
    lora = LoraConfig(lora_rank=4, lora_targets=targets, lora_dropout=dropout, **kind)
    model = ModelConfig(flavour=flavour, mixed_precision=case.get("precision", "bf16"))
    v3 = flavour == "edit-v3"
    settings = {"num_layers": 2, "num_attention_heads": heads, "zero_cond_t": v3}
    size = planned_size(settings, model, lora)
    network = network_of(heads, settings["num_layers"], dtype=dtype, zero_cond_t=v3)
    weights = inject_lora(network, plan_adapter(network, lora), 0)
    master_weights(weights, dtype)
    network.train(dropout > 0)
    tokens = [Tokens(batch=case.get("batch", 1), image=image, target=image, text=TEXT) for image in (64, 192)]
    found = [saved_bytes(network.transformer_blocks[0], network, each, dtype, v3) for each in tokens]
    planned = [saved_activation_bytes(size, each, dropout=dropout > 0) for each in tokens]
    assert planned[1] - planned[0] == pytest.approx(found[1] - found[0], rel=0.002)
    assert planned[1] == pytest.approx(found[1], rel=0.03)


@pytest.mark.parametrize(("targets", "flavour"), [("image-attention", "edit-v1"), ("all", "edit-v3")])
def test_a_compiled_block_keeps_what_is_planned(
    targets: LoraTargets, flavour: FlavourName, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler decides for itself what to keep. It runs here without its code generator.

    A dequantised weight that it kept would be 2 bytes per weight, more than all activations here.
    """
    compiler = aot_autograd(
        fw_compiler=lambda graph, _: make_boxed_func(graph.forward),
        partition_fn=partial(min_cut_rematerialization_partition, compiler="inductor"),
        decompositions=select_decomp_table(),
    )
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=compiler))
    lora = LoraConfig(lora_rank=4, lora_targets=targets)
    model, v3 = ModelConfig(base_model_precision="int8-quanto", flavour=flavour), flavour == "edit-v3"
    size = planned_size({"num_layers": 2, "num_attention_heads": 2, "zero_cond_t": v3}, model, lora)
    network = network_of(2, 2, dtype=torch.bfloat16, zero_cond_t=v3)
    quantise(network, model.base_model_precision, SENSITIVE_LAYERS, torch.device("cpu"), SILENT)
    master_weights(inject_lora(network, plan_adapter(network, lora), 0), torch.bfloat16)
    Compilation(list(network.transformer_blocks)).start()
    tokens = [Tokens(batch=1, image=image, target=image, text=TEXT) for image in (64, 192)]
    found = [saved_bytes(network.transformer_blocks[0], network, each, torch.bfloat16, v3) for each in tokens]
    planned = [saved_activation_bytes(size, each, compiled=True) for each in tokens]
    assert planned[1] - planned[0] == pytest.approx(found[1] - found[0], rel=0.003)
    assert planned[1] == pytest.approx(found[1], rel=0.03)


PRECISIONS: tuple[BaseModelPrecision, ...] = (
    "none",
    "int8-quanto",
    "fp8-quanto",
    "int4-quanto",
    "int2-quanto",
    "nf4-bnb",
)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_take_what_is_planned(precision: BaseModelPrecision) -> None:
    model = ModelConfig(base_model_precision=precision)
    size = planned_size({"num_layers": 2, "num_attention_heads": 3}, model, LoraConfig())
    network = network_of(3, 2, dtype=torch.bfloat16)
    quantise(network, precision, SENSITIVE_LAYERS, torch.device("cpu"), SILENT)
    assert size.block_bytes == pytest.approx(held_bytes(network.transformer_blocks[0]), rel=0.002)
    assert size.weight_bytes == pytest.approx(held_bytes(network), rel=0.002)


def held_bytes(module: nn.Module) -> int:
    """Bytes of the module's parameters and buffers."""
    return sum(each.nbytes for each in (*module.parameters(), *module.buffers()))


@pytest.mark.parametrize("mixed_precision", ["bf16", "no"])
@pytest.mark.parametrize(("stored", "kept"), [(1, True), (2, False), (4, False)])
def test_file_keeps_codes_of_a_byte_and_nothing_else(mixed_precision: MixedPrecision, stored: int, kept: bool) -> None:
    """Precision `file` counts a file of larger elements, such as bf16, like `none`, also for float32 arithmetic."""
    settings, lora = {"num_layers": 2, "num_attention_heads": 3}, LoraConfig()
    plain = ModelConfig(mixed_precision=mixed_precision)
    none = planned_size(settings, plain, lora)
    file = dataclasses.replace(plain, base_model_precision="file")
    found = planned_size(settings, file, lora, stored_bytes=stored)
    matrices = sum(rows * columns for rows, columns in none.block.matrices)
    assert none.block_bytes - found.block_bytes == (matrices * (none.element_bytes - 1) if kept else 0)


def peak_bytes(step: Callable[[], None]) -> int:
    """Peak bytes allocated during a call, beyond those allocated before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.mark.parametrize(("recomputed", "flavour"), [(0, "edit-v2"), (4, "edit-v2"), (6, "edit-v2"), (6, "edit-v3")])
def test_the_peak_of_a_step_is_within_a_tenth_of_the_plan(recomputed: int, flavour: str) -> None:
    """Forward and backward of six blocks, of which none, four or all recompute their activations."""
    v3, lora = flavour == "edit-v3", LoraConfig(lora_rank=4)
    model = ModelConfig(flavour=flavour)
    size = planned_size({"num_layers": 6, "num_attention_heads": 4, "zero_cond_t": v3}, model, lora)
    config = TrainConfig(run_dir="run", encoded="data", model=model, lora=lora, gradient_checkpointing=recomputed > 0)
    memory = dataclasses.replace(config.memory, gradient_checkpointing_blocks=recomputed)
    work = Workload(train=pair_size(Size(384, 384), [Size(384, 384)], 32), batch=1)
    plan = plan_memory(dataclasses.replace(config, memory=memory), size, work)
    parts = dict(plan.device[1].parts)
    working = (
        parts.get("kept by recomputed blocks", 0)
        + parts["activations"]
        + parts["backward pass"]
        + parts["latents and embeddings"]
    )

    network = network_of(4, 6, dtype=torch.bfloat16, zero_cond_t=v3)
    master_weights(inject_lora(network, plan_adapter(network, lora), 0), torch.bfloat16)
    if recomputed:
        network.enable_gradient_checkpointing(Recomputation(list(network.transformer_blocks), recomputed))
    latents = [torch.randn(1, 16, 48, 48) for _ in range(2)]
    condition = Condition((latents[1],), torch.randn(1, 32, 3584))

    def step() -> None:
        velocity = predict_velocity(network, latents[0], torch.tensor([0.5]), condition)
        (velocity.float() - latents[1]).square().mean().backward()

    step()
    found = peak_bytes(step)
    assert working == pytest.approx(found, rel=0.1)
