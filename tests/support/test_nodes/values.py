"""Nodes that show a value, pass one on, or wait."""

from __future__ import annotations

import json
import os
import time

import comfy.model_management

from .base import ANY, Node, Uncached


class SaveText(Node):
    """Puts any value as text into /history, under `text`."""

    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802 - ComfyUI's name
        return {"required": {"value": (ANY,)}}

    @classmethod
    def VALIDATE_INPUTS(cls, input_types):  # noqa: N802
        return True

    def run(self, value):
        return {"ui": {"text": [str(value)]}}


class PassOn(Node):
    """Outputs a JSON value for any input, hidden from validation. `after` only orders the nodes."""

    RETURN_TYPES = (ANY,)

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"value": ("STRING", {"default": ""})}, "optional": {"after": (ANY,)}}

    def run(self, value, after=None):
        return (json.loads(value),)


class Environment(Uncached):
    """Sets an environment variable of the server."""

    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"name": ("STRING", {"default": ""}), "value": ("STRING", {"default": ""})}}

    def run(self, name, value):
        os.environ[name] = value
        return {"ui": {}}


class Wait(Uncached):
    """Keeps the queue busy for `seconds` or until it is interrupted."""

    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"seconds": ("FLOAT", {"default": 60.0})}}

    def run(self, seconds):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            comfy.model_management.throw_exception_if_processing_interrupted()
            time.sleep(0.02)
        return {"ui": {}}
