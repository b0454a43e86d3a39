"""Settings of a training's parts: adapter, noise, rollout, batches, checkpoints, export."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..settings import check, check_at_least, check_choice, setting
from .layer_patterns import layer_patterns, value_for

LoraType = Literal["lora", "dora", "lokr"]
LoraTargets = Literal["image-attention", "attention", "attention-mlp", "all", "pattern"]
SigmaDistribution = Literal["logit_normal", "uniform", "mode", "cosmap"]
LossType = Literal["l2", "huber", "smooth_l1"]
HuberSchedule = Literal["snr", "exponential", "constant"]
RolloutStrategy = Literal["uniform", "biased_early", "biased_late"]
RolloutSampler = Literal["unipc", "euler", "dpm", "rk4"]
RampShape = Literal["linear", "cosine"]
LARGEST_MODE_SCALE = 2 / (math.pi - 2)  # beyond it the mapping turns back


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """The adapter's shape."""

    lora_rank: int = setting(16, "Width of the adapter. 8 to 32; larger learns more detail and weighs more.")
    lora_alpha: float = setting(
        0.0,
        "Scale is lora_alpha / lora_rank, or lora_alpha / √lora_rank under use_rslora. 0 means equal to the rank, so "
        "scale 1 or √rank.",
    )
    lora_targets: LoraTargets = setting(
        "image-attention",
        "Layers that get an adapter: image-attention, attention (image and text), attention-mlp, all (also "
        "modulation), or pattern.",
    )
    lora_target_pattern: str = setting("", "Regular expression over full module names, for lora_targets pattern.")
    lora_dropout: float = setting(0.0, "Share of the adapter's inputs zeroed at each step, 0 to below 1.")
    lora_type: LoraType = setting(
        "lora",
        "lora; dora also learns the length of each weight row, for more detail at low ranks and more time; lokr is a "
        "Kronecker product, a much smaller file. diffusers reads lora alone.",
    )
    use_rslora: bool = setting(
        False, "Scale by 1 / √rank instead of 1 / rank, so that high ranks (64 and more) learn as fast as low ones."
    )
    lokr_factor: int = setting(
        8, "Side of LoKr's first factor: 4 to 16, smaller is a larger file; -1 is near the root of the layer's width."
    )
    rank_pattern: tuple[str, ...] = setting(
        (),
        "Other ranks for some layers, a line each, the first that matches counts: '0-9 = 8' for blocks, "
        r"'.*attn\.to_q = 32' for full names.",
    )
    alpha_pattern: tuple[str, ...] = setting((), "Other alphas for some layers, written like rank_pattern.")
    init_lora: str = setting(
        "",
        "LoRA file to start from, in any layout that ComfyUI loads. Its layers keep its ranks; others start fresh.",
    )

    def __post_init__(self) -> None:
        check_choice(self, "lora_targets", "lora_type")
        self._check_patterns()
        self._check_lokr()
        check(1 <= self.lora_rank <= 1024, "lora_rank", self.lora_rank, "1 to 1024")
        check_at_least(self, 0.0, "lora_alpha")
        check(0 <= self.lora_dropout < 1, "lora_dropout", self.lora_dropout, "0 to below 1")
        if self.lora_targets == "pattern":
            check(bool(self.lora_target_pattern), "lora_target_pattern", "", "a regular expression")

    def _check_patterns(self) -> None:
        layer_patterns("alpha_pattern", self.alpha_pattern)
        for pattern in layer_patterns("rank_pattern", self.rank_pattern):
            whole = pattern.value == int(pattern.value) and pattern.value <= 1024
            check(whole, "rank_pattern", pattern.line, "lines with a whole rank from 1 to 1024")

    def _check_lokr(self) -> None:
        check(self.lokr_factor == -1 or self.lokr_factor >= 2, "lokr_factor", self.lokr_factor, "-1, or 2 and more")
        if self.lora_type == "lokr":
            check(self.lora_dropout == 0, "lora_dropout", self.lora_dropout, "0 for lora_type lokr")
            check(not self.use_rslora, "use_rslora", self.use_rslora, "false for lora_type lokr")

    def rank_of(self, layer: str) -> int:
        """The rank in force for the layer of this full name."""
        return int(value_for(layer_patterns("rank_pattern", self.rank_pattern), layer) or self.lora_rank)

    def scale_of(self, layer: str, rank: int) -> float:
        """The factor of the layer's weight change, whose rank this is."""
        alpha = value_for(layer_patterns("alpha_pattern", self.alpha_pattern), layer) or self.lora_alpha or float(rank)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseConfig:
    """Which noise levels are trained, and how an error counts."""

    sigma_distribution: SigmaDistribution = setting(
        "logit_normal",
        "Draw of the noise level before the shift: logit_normal favours the middle, uniform does not, mode favours the "
        "middle and keeps both ends, cosmap doubles the middle against the ends.",
    )
    logit_mean: float = setting(0.0, "Mean of the normal under logit_normal.")
    logit_std: float = setting(1.0, "Standard deviation of the normal under logit_normal.")
    flow_schedule_shift: float = setting(
        1.73, "Moves noise levels up: s·σ / (1 + (s-1)·σ). 1 is no shift; typical 1 to 3."
    )
    flow_schedule_auto_shift: bool = setting(
        False, "Take the shift from the picture's token count as Qwen's schedule does, instead of flow_schedule_shift."
    )
    edit_weight: float = setting(
        0.0, "How much the loss follows the edit: 0 counts all alike, 1 mostly where target and reference differ."
    )
    mode_scale: float = setting(
        1.29, "How much sigma_distribution mode favours the middle: 0 is uniform, below 0 favours the ends."
    )
    stratified_sigmas: bool = setting(
        False,
        "A step's pairs share the range of noise levels evenly between them instead of drawing by themselves: a "
        "quieter gradient, the same levels in the long run.",
    )
    loss_type: LossType = setting(
        "l2",
        "How an error of the velocity counts: l2 squared; huber squared when small, linear when large; smooth_l1 the "
        "same divided by its width. Spoilt pictures pull less with the latter two. Validation loss is always l2.",
    )
    huber_c: float = setting(0.1, "Error at which huber and smooth_l1 turn from squared to linear.")
    huber_schedule: HuberSchedule = setting(
        "snr",
        "Width over the noise level: snr and exponential lead from 1 without noise to huber_c at pure noise, by "
        "(1-σ)² and by huber_c^σ; constant is huber_c everywhere.",
    )

    def __post_init__(self) -> None:
        check_choice(self, "sigma_distribution", "loss_type", "huber_schedule")
        check(-1 <= self.mode_scale <= LARGEST_MODE_SCALE, "mode_scale", self.mode_scale, "-1 to 1.75, usually 1.29")
        check(0 < self.huber_c <= 1, "huber_c", self.huber_c, "above 0 and at most 1, usually 0.1")
        check(0 <= self.edit_weight <= 1, "edit_weight", self.edit_weight, "0 to 1; 0.5 is a strong effect")
        check(self.logit_std > 0, "logit_std", self.logit_std, "above 0")
        check(self.flow_schedule_shift > 0, "flow_schedule_shift", self.flow_schedule_shift, "above 0, usually 1 to 3")


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutConfig:
    """Scheduled sampling: training on points that the model has sampled itself. Off while max_step_offset is 0."""

    scheduled_sampling_max_step_offset: int = setting(
        0,
        "A rolled-out pair begins 0 to this many thousandths of the noise range further up and is sampled down, with a "
        "forward pass for each. 0 is off; begin with 5 to 10.",
    )
    scheduled_sampling_probability: float = setting(
        0.0, "Share of pairs that are rolled out, from start_step on. While it is 0 nothing changes."
    )
    scheduled_sampling_strategy: RolloutStrategy = setting(
        "uniform", "Draw of the offset: all alike, or biased_early for small and biased_late for large ones."
    )
    scheduled_sampling_start_step: int = setting(0, "Optimizer step at which rollouts begin.")
    scheduled_sampling_ramp_steps: int = setting(
        0, "Steps over which the probability goes from prob_start to prob_end, in place of probability. 0 is no ramp."
    )
    scheduled_sampling_ramp_shape: RampShape = setting("linear", "Course of that ramp; cosine begins and ends gently.")
    scheduled_sampling_prob_start: float = setting(0.0, "Probability where the ramp begins.")
    scheduled_sampling_prob_end: float = setting(0.5, "Probability from the ramp's end on.")
    scheduled_sampling_sampler: RolloutSampler = setting(
        "unipc", "Sampler of the rollout; rk4 takes four forward passes a step, the others one."
    )
    scheduled_sampling_order: int = setting(2, "Order of unipc and dpm, 1 to 3.")
    scheduled_sampling_reflexflow: bool = setting(
        True, "ReflexFlow for rolled-out pairs: the three terms below, against drifting off."
    )
    scheduled_sampling_reflexflow_alpha: float = setting(
        1.0, "How much more the loss counts where drifting changed the prediction. Above 0 it takes a forward pass."
    )
    scheduled_sampling_reflexflow_beta1: float = setting(
        10.0, "Factor of the term that turns the velocity towards the way back."
    )
    scheduled_sampling_reflexflow_beta2: float = setting(1.0, "Factor of the usual loss beside it.")

    def __post_init__(self) -> None:
        prefix = "scheduled_sampling_"
        check_choice(self, *(prefix + name for name in ("strategy", "ramp_shape", "sampler")))
        offset = self.scheduled_sampling_max_step_offset
        check(0 <= offset < 1000, f"{prefix}max_step_offset", offset, "0 to 999, usually 0 or 5 to 10")
        check_at_least(self, 0, *(prefix + name for name in ("start_step", "ramp_steps", "reflexflow_alpha")))
        check_at_least(self, 0, f"{prefix}reflexflow_beta1", f"{prefix}reflexflow_beta2")
        for name in ("probability", "prob_start", "prob_end"):
            check(0 <= getattr(self, prefix + name) <= 1, prefix + name, getattr(self, prefix + name), "0 to 1")
        order = self.scheduled_sampling_order
        check(1 <= order <= 3, f"{prefix}order", order, "1 to 3")


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchingConfig:
    """How many pairs make a step."""

    train_batch_size: int = setting(1, "Pairs per forward pass; only pairs of equal shape are put together.")
    gradient_accumulation_steps: int = setting(4, "Forward passes per optimizer step.")
    caption_dropout_probability: float = setting(
        0.0, "Share of turns seen with an empty caption; the references stay. Usually 0 for edits; needs such captions."
    )

    def __post_init__(self) -> None:
        check_at_least(self, 1, "train_batch_size", "gradient_accumulation_steps")
        share = self.caption_dropout_probability
        check(0 <= share < 1, "caption_dropout_probability", share, "0 to below 1, usually 0 and at most 0.1")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """When resumable state is written."""

    checkpoint_step_interval: int = setting(250, "Steps between checkpoints; one is always written at the end.")
    checkpoints_total_limit: int = setting(2, "Checkpoints kept; older ones are removed.")

    def __post_init__(self) -> None:
        check_at_least(self, 1, "checkpoint_step_interval", "checkpoints_total_limit")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportConfig:
    """The LoRA file."""

    lora_name: str = setting("", "File name without extension; empty: the run's name.")
    trigger_words: str = setting("", "Written into the file's header for programs that show it.")

    def __post_init__(self) -> None:
        check(Path(self.lora_name).name == self.lora_name, "lora_name", self.lora_name, "a name without folders")
