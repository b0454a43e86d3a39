"""Settings of a training run: adapter, noise, rollout, batches, checkpoints and export."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import ConfigError
from ..settings import If, Limits, Settings, check, setting
from ..text import brief
from .layer_patterns import layer_patterns, value_for
from .regular_expression import compiled

LoraType = Literal["lora", "dora", "lokr"]
LayerPrefix = Literal["diffusion_model", "transformer"]
LoraTargets = Literal["image-attention", "attention", "attention-mlp", "all", "pattern"]
SigmaDistribution = Literal["logit_normal", "uniform", "mode", "cosmap"]
LossType = Literal["l2", "huber", "smooth_l1"]
HuberSchedule = Literal["snr", "exponential", "constant"]
EditWeightKind = Literal["linear", "logarithmic"]
EditWeightFrom = Literal["latents", "pixels"]
RolloutStrategy = Literal["uniform", "biased_early", "biased_late"]
RolloutSampler = Literal["unipc", "euler", "dpm", "rk4"]
RampShape = Literal["linear", "cosine"]
LARGEST_MODE_SCALE = 2 / (math.pi - 2)  # above it the mapping of noise levels is no longer monotonic
_LOW_RANK = If("lora_type", ("lora", "dora"))
_LOGIT_NORMAL = If("sigma_distribution", ("logit_normal",))
_WEIGHTS_EDIT = If("edit_weight", differs=(0.0,))
_HUBER = If("loss_type", ("huber", "smooth_l1"))
_ROLLS_OUT = If("scheduled_sampling_max_step_offset", differs=(0,))


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig(Settings):
    """Type, size and target layers of the adapter."""

    lora_rank: int = setting(
        16,
        "Rank of the adapter. 8 to 32 is typical; a higher rank learns more detail and makes a larger file.",
        Limits(min=1, max=1024),
    )
    lora_alpha: float = setting(
        0.0,
        "The adapter is scaled by lora_alpha / lora_rank, or by lora_alpha / √lora_rank with use_rslora. 0 means equal "
        "to the rank: a scale of 1 or √rank.",
        Limits(min=0, soft_max=4096, step=0.5),
    )
    lora_targets: LoraTargets = setting(
        "image-attention",
        "Layers that get an adapter. image-attention: the attention layers for the pictures. attention: also those for "
        "the instruction. attention-mlp: also the feed-forward layers. all: also the layers that tell a block the "
        "noise level. pattern: those that lora_target_pattern names.",
    )
    lora_target_pattern: str = setting(
        "",
        "Regular expression for full module names, for lora_targets pattern.",
        used_if=(If("lora_targets", ("pattern",)),),
    )
    lora_dropout: float = setting(
        0.0,
        "Fraction of the adapter's inputs that is zeroed at random in each step.",
        Limits(min=0, below=1, soft_max=0.95, step=0.01),
        used_if=(_LOW_RANK,),
        unused=0.0,
    )
    lora_type: LoraType = setting(
        "lora",
        "lora: low-rank update. dora: also learns the norm of each weight row; more detail at low ranks, but slower. "
        "lokr: Kronecker product, a much smaller file. diffusers loads only lora.",
    )
    use_rslora: bool = setting(
        False,
        "Scale by 1 / √rank instead of 1 / rank, so that ranks of 64 and more learn as fast as low ones.",
        used_if=(_LOW_RANK,),
        unused=False,
    )
    lokr_factor: int = setting(
        8,
        "Size of LoKr's first factor. 4 to 16 is typical; smaller makes a larger file. -1 is about the square root of "
        "the layer's width.",
        Limits(min=2, also=-1, soft_max=256),
        used_if=(If("lora_type", ("lokr",)),),
    )
    rank_pattern: tuple[str, ...] = setting(
        (),
        "Different ranks for some layers, one per line; the first match applies. '0-9 = 8' is for blocks, "
        r"'.*attn\.to_q = 32' for full module names.",
    )
    alpha_pattern: tuple[str, ...] = setting((), "Different alphas for some layers, written like rank_pattern.")
    init_lora: str = setting(
        "",
        "LoRA file to start from, in any format that ComfyUI loads. Its layers keep their ranks; all other layers "
        "start fresh.",
    )

    def check_combinations(self) -> None:
        """Checks that patterns are valid and that LoKr gets no setting that it does not support."""
        layer_patterns("alpha_pattern", self.alpha_pattern)
        for pattern in layer_patterns("rank_pattern", self.rank_pattern):
            whole = pattern.value == int(pattern.value) and pattern.value <= 1024
            check(whole, "rank_pattern", pattern.line, "lines with a whole rank from 1 to 1024")
        if self.lora_type == "lokr":
            check(self.lora_dropout == 0, "lora_dropout", self.lora_dropout, "0 with lora_type lokr")
            check(not self.use_rslora, "use_rslora", self.use_rslora, "false with lora_type lokr")
        if self.lora_targets == "pattern":
            allowed = "a regular expression with lora_targets pattern"
            check(bool(self.lora_target_pattern), "lora_target_pattern", "", allowed)
            try:
                compiled(self.lora_target_pattern)
            except ValueError as error:
                raise ConfigError(
                    f"lora_target_pattern {brief(self.lora_target_pattern)} is wrong: {error}."
                ) from error

    def rank_of(self, layer: str) -> int:
        """The rank of the layer with this full name."""
        return int(value_for(layer_patterns("rank_pattern", self.rank_pattern), layer) or self.lora_rank)

    def scale_of(self, layer: str, rank: int) -> float:
        """The factor on the weight change of a layer that has this rank."""
        alpha = value_for(layer_patterns("alpha_pattern", self.alpha_pattern), layer) or self.lora_alpha or float(rank)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseConfig(Settings):
    """Which noise levels are trained, and how errors are weighted."""

    sigma_distribution: SigmaDistribution = setting(
        "logit_normal",
        "Distribution of noise levels before the shift. logit_normal: more in the middle. uniform: all alike. mode: "
        "more in the middle, but the ends are sampled too. cosmap: twice as many in the middle as at the ends.",
    )
    logit_mean: float = setting(
        0.0,
        "Mean of the normal distribution of logit_normal.",
        Limits(soft_min=-10, soft_max=10, step=0.05),
        used_if=(_LOGIT_NORMAL,),
    )
    logit_std: float = setting(
        1.0,
        "Standard deviation of the normal distribution of logit_normal.",
        Limits(above=0, soft_min=0.01, soft_max=10, step=0.05),
        used_if=(_LOGIT_NORMAL,),
    )
    flow_schedule_shift: float = setting(
        1.73,
        "Shift s towards higher noise levels: s·σ / (1 + (s-1)·σ). 1 is no shift.",
        Limits(above=0, usual="1 to 3", soft_min=0.01, soft_max=20, step=0.01),
        used_if=(If("flow_schedule_auto_shift", (False,)),),
    )
    flow_schedule_auto_shift: bool = setting(
        False,
        "Compute the shift from the number of image tokens, as Qwen's schedule does. flow_schedule_shift is ignored.",
    )
    edit_weight: float = setting(
        0.0,
        "How much the loss concentrates on the edit. 0: all pixels count alike. 1: mostly where target and reference "
        "differ. 0.5 is a strong effect.",
        Limits(min=0, max=1, step=0.05),
    )
    mode_scale: float = setting(
        1.29,
        "How much sigma_distribution mode favours the middle. 0 is uniform, below 0 favours the ends.",
        Limits(min=-1, max=LARGEST_MODE_SCALE, usual="1.29", soft_max=1.75, step=0.05),
        used_if=(If("sigma_distribution", ("mode",)),),
    )
    stratified_sigmas: bool = setting(
        False,
        "Spread the noise levels of a step's pairs evenly over the range instead of drawing each one independently. "
        "Reduces gradient noise; the distribution stays the same.",
    )
    loss_type: LossType = setting(
        "l2",
        "Loss of the predicted velocity. l2: squared error. huber: squared for small errors, linear for large ones. "
        "smooth_l1: huber divided by huber_c. The last two reduce the influence of bad pictures. Validation loss is "
        "always l2.",
    )
    huber_c: float = setting(
        0.1,
        "Error above which huber and smooth_l1 are linear.",
        Limits(above=0, max=1, usual="0.1", soft_min=0.001, step=0.01, round=0.001),
        used_if=(_HUBER,),
    )
    huber_schedule: HuberSchedule = setting(
        "snr",
        "How huber_c depends on the noise level σ. snr: rises from huber_c without noise to 1 at pure noise, as in "
        "SimpleTuner. exponential: falls from 1 to huber_c, as huber_c^σ. constant: huber_c at all levels.",
        used_if=(_HUBER,),
    )
    edit_weight_kind: EditWeightKind = setting(
        "linear",
        "Weights at edit_weight 1. linear: they grow with the difference, to ten times that of an unchanged spot. "
        "logarithmic: all of the changed region gets the weight 1 + log2(whole area / changed area), the rest 1.",
        used_if=(_WEIGHTS_EDIT,),
    )
    edit_weight_from: EditWeightFrom = setting(
        "latents",
        "Where edit_weight looks for the edit: in the latents of target and first reference, or in their pixels. "
        "pixels needs encode_pixel_difference of Encode Edit Pairs; Train Qwen Edit LoRA and the command line turn it "
        "on.",
        used_if=(_WEIGHTS_EDIT,),
    )

    @property
    def needs_pixels(self) -> bool:
        """Whether training needs the pixel differences of its pairs."""
        return self.edit_weight > 0 and self.edit_weight_from == "pixels"


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutConfig(Settings):
    """Scheduled sampling: training on points that the model sampled itself. Off while max_step_offset is 0."""

    scheduled_sampling_max_step_offset: int = setting(
        0,
        "A rolled-out pair starts 0 to this many thousandths of the noise range higher and is sampled down in "
        "steps of one thousandth, with a forward pass for each. 0 turns rollouts off; start with 5 to 10.",
        Limits(min=0, max=999, usual="0 or 5 to 10"),
    )
    scheduled_sampling_probability: float = setting(
        0.0,
        "Fraction of pairs that are rolled out, from start_step on. 0 rolls out none.",
        Limits(min=0, max=1, step=0.05),
        used_if=(_ROLLS_OUT, If("scheduled_sampling_ramp_steps", (0,))),
    )
    scheduled_sampling_strategy: RolloutStrategy = setting(
        "uniform",
        "Distribution of the offset. uniform: all alike. biased_early: favours small ones. biased_late: favours large "
        "ones.",
        used_if=(_ROLLS_OUT,),
    )
    scheduled_sampling_start_step: int = setting(
        0, "Optimizer step at which rollouts start.", Limits(min=0, soft_max=1_000_000), used_if=(_ROLLS_OUT,)
    )
    scheduled_sampling_ramp_steps: int = setting(
        0,
        "Steps over which the probability goes from prob_start to prob_end; it replaces probability. 0 for no ramp.",
        Limits(min=0, soft_max=1_000_000),
        used_if=(_ROLLS_OUT,),
    )
    scheduled_sampling_ramp_shape: RampShape = setting(
        "linear",
        "Shape of the ramp. cosine starts and ends slowly.",
        used_if=(_ROLLS_OUT, If("scheduled_sampling_ramp_steps", differs=(0,))),
    )
    scheduled_sampling_prob_start: float = setting(
        0.0,
        "Probability at the start of the ramp.",
        Limits(min=0, max=1, step=0.05),
        used_if=(_ROLLS_OUT, If("scheduled_sampling_ramp_steps", differs=(0,))),
    )
    scheduled_sampling_prob_end: float = setting(
        0.5,
        "Probability at the end of the ramp and after it.",
        Limits(min=0, max=1, step=0.05),
        used_if=(_ROLLS_OUT, If("scheduled_sampling_ramp_steps", differs=(0,))),
    )
    scheduled_sampling_sampler: RolloutSampler = setting(
        "unipc",
        "Sampler of the rollout. rk4 needs four forward passes per step, the others one.",
        used_if=(_ROLLS_OUT,),
    )
    scheduled_sampling_order: int = setting(
        2,
        "Order of the samplers unipc and dpm.",
        Limits(min=1, max=3),
        used_if=(_ROLLS_OUT, If("scheduled_sampling_sampler", ("unipc", "dpm"))),
    )
    scheduled_sampling_reflexflow: bool = setting(
        True,
        "Use ReflexFlow for rolled-out pairs: the three terms below, which counteract drift.",
        used_if=(_ROLLS_OUT,),
    )
    scheduled_sampling_reflexflow_alpha: float = setting(
        1.0,
        "Extra weight of the loss where drift changed the prediction. Needs one forward pass if above 0.",
        Limits(min=0, soft_max=100, step=0.1),
        used_if=(_ROLLS_OUT, If("scheduled_sampling_reflexflow", (True,))),
    )
    scheduled_sampling_reflexflow_beta1: float = setting(
        10.0,
        "Weight of the term that aligns the velocity with the line from the target picture to the sampled point.",
        Limits(min=0, soft_max=1000, step=0.5),
        used_if=(_ROLLS_OUT, If("scheduled_sampling_reflexflow", (True,))),
    )
    scheduled_sampling_reflexflow_beta2: float = setting(
        1.0,
        "Weight of the usual loss of rolled-out pairs.",
        Limits(min=0, soft_max=100, step=0.1),
        used_if=(_ROLLS_OUT, If("scheduled_sampling_reflexflow", (True,))),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchingConfig(Settings):
    """How many pairs form a step."""

    train_batch_size: int = setting(1, "Pairs per forward pass, of any sizes.", Limits(min=1, soft_max=256))
    gradient_accumulation_steps: int = setting(4, "Forward passes per optimizer step.", Limits(min=1, soft_max=1024))
    caption_dropout_probability: float = setting(
        0.0,
        "Probability that a pair is trained with an empty caption; the references stay. Usually 0 for edits. In "
        "ComfyUI, turn on encode_empty_caption; the command line does so automatically.",
        Limits(min=0, below=1, usual="0 and at most 0.1", soft_max=0.99, step=0.01),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig(Settings):
    """When checkpoints for resuming are written."""

    checkpoint_step_interval: int = setting(
        250, "Steps between checkpoints. One is always written at the end.", Limits(min=1, soft_max=1_000_000)
    )
    checkpoints_total_limit: int = setting(
        2, "Number of checkpoints to keep. Older ones are deleted.", Limits(min=1, soft_max=1000)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportConfig(Settings):
    """The exported LoRA file."""

    lora_name: str = setting(
        "",
        "File name without extension. Empty: the name of the run.",
        Limits(valid=lambda name: Path(name).name == name, allowed="a name without folders"),
    )
    trigger_words: str = setting("", "Trigger words, written into the header of the file for programs that show them.")
    layer_prefix: LayerPrefix = setting(
        "diffusion_model",
        "What the names of layers begin with in the file. diffusion_model is read by ComfyUI, diffusers and most other "
        "programs; transformer only by ComfyUI, diffusers and programs that use its names.",
    )
