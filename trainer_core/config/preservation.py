"""Settings of preservation, which keeps the base model's other edits."""

from __future__ import annotations

from dataclasses import dataclass

from ..settings import Limits, Settings, setting

# Instructions of other edits, for trainings that preserve and name none. Short ones of many kinds.
USUAL_PROMPTS = (
    "Keep the picture exactly as it is.",
    "Make it night.",
    "Turn it into a black and white photo.",
    "Turn it into a watercolor painting.",
    "Change the background to a plain white wall.",
    "Make it look like winter with snow.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreservationConfig(Settings):
    """Training that keeps what the base model does with other instructions. Off while preservation_probability is 0.

    Such a turn has a pair's references and one of the encoding's preservation_prompts. The model learns to predict what
    the base model predicts.
    """

    preservation_probability: float = setting(
        0.0,
        "Fraction of the turns that train what the base model does with one of preservation_prompts, instead of the "
        "edit. 0.25 to 0.5 is typical; 0.5 with twice as many steps keeps most of what the model can do. Such a turn "
        "needs a forward pass more. 0 is off.",
        Limits(min=0, max=0.9, step=0.05),
    )
    preservation_weight: float = setting(
        1.0,
        "Weight of the loss in turns that preserve, also of those of regularisation data.",
        Limits(min=0, soft_max=100, step=0.1),
    )
