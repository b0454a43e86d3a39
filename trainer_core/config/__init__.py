"""All settings: frozen dataclasses that are checked when they are made, with strict JSON input and output.

Settings have the names that SimpleTuner's Qwen edit quickstart uses. A field's `help` is its documentation in
docs/settings.md and in the tooltips of the nodes: effect, unit and typical values.
"""

# pyright: reportUnusedImport=false
from __future__ import annotations

from ..settings import digest, from_json, to_json
from .caption_drafts import CaptionDraftConfig
from .dataset import (
    CaptionConfig,
    CaptionStrategy,
    ConditioningType,
    DatasetConfig,
    DatasetPartConfig,
    EncodingConfig,
    Preprocessing,
    SizeConfig,
)
from .ema import EmaConfig
from .job import JobConfig, TrainConfig, completed_key, encoding_for, resume_key, unused_settings
from .memory import MemoryConfig
from .model import (
    DEMO_MODEL,
    BaseModelPrecision,
    FlavourName,
    FrozenLoraConfig,
    MatmulPrecision,
    MixedPrecision,
    ModelConfig,
)
from .optimizer import ENDLESS, OptimizerConfig, OptimizerName, SchedulerName
from .pair_check import PairCheckConfig
from .preservation import USUAL_PROMPTS, PreservationConfig
from .training import (
    BatchingConfig,
    CheckpointConfig,
    ExportConfig,
    LayerPrefix,
    LoraConfig,
    LoraTargets,
    LoraType,
    NoiseConfig,
    RolloutConfig,
    RolloutSampler,
    SigmaDistribution,
)
from .validation import Drawing, ValidationConfig, ValidationSchedule
