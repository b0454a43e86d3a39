"""Helper nodes for server tests, loaded by the real ComfyUI beside the pack. Ids begin with QetTest_."""

from __future__ import annotations

import hashlib

import torch


class SaveText:
    """Makes any value visible in /history under `text`."""

    CATEGORY = "tests"
    FUNCTION = "run"
    OUTPUT_NODE = True
    RETURN_TYPES = ()

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802 - ComfyUI's name
        return {"required": {"value": ("*",)}}

    @classmethod
    def VALIDATE_INPUTS(cls, input_types):  # noqa: N802
        return True

    def run(self, value):
        return {"ui": {"text": [str(value)]}}


class GlobalState:
    """A fingerprint of the state a node must leave as it found it. Never cached; `after` only orders the nodes."""

    CATEGORY = "tests"
    FUNCTION = "run"
    OUTPUT_NODE = True
    RETURN_TYPES = ("STRING",)

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {}, "optional": {"after": ("*",)}}

    @classmethod
    def VALIDATE_INPUTS(cls, input_types):  # noqa: N802
        return True

    @classmethod
    def IS_CHANGED(cls, after=None):  # noqa: N802
        return float("nan")

    def run(self, after=None):
        generator = hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest()[:16]
        state = {
            "generator": generator,
            "grad": torch.is_grad_enabled(),
            "inference": torch.is_inference_mode_enabled(),
            "dtype": str(torch.get_default_dtype()),
            "threads": torch.get_num_threads(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        }
        return {"ui": {"state": [state]}, "result": (str(state),)}


NODE_CLASS_MAPPINGS = {"QetTest_SaveText": SaveText, "QetTest_GlobalState": GlobalState}
