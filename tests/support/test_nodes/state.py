"""Nodes that read or change process-wide state, and one that summarises pictures as numbers."""

from __future__ import annotations

import gc
import hashlib
import logging
import os
import random
import sys
import warnings
from typing import Any

import numpy as np
import torch

from .base import ANY, Node, Uncached

LARGE = 1_000_000  # elements


def sha(data: bytes) -> str:
    """A short hash of the bytes."""
    return hashlib.sha256(data).hexdigest()[:16]


def is_image(tensor: torch.Tensor) -> bool:
    """Whether the tensor is shaped like an IMAGE [B, H, W, 3], which ComfyUI may keep in its cache."""
    return tensor.ndim == 4 and tensor.shape[-1] == 3


def tensors_held() -> dict[str, Any]:
    """Number of live parameters, and shapes of live large tensors except images."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    return {
        "weights": sum(1 for tensor in tensors if isinstance(tensor, torch.nn.Parameter)),
        "large": sorted(
            str(list(tensor.shape)) for tensor in tensors if tensor.numel() >= LARGE and not is_image(tensor)
        ),
    }


class GlobalState(Uncached):
    """The process-wide state that a node must leave unchanged. Never cached; `after` only orders the nodes."""

    OUTPUT_NODE = True
    RETURN_TYPES = (ANY,)

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802 - ComfyUI's name
        return {"required": {}, "optional": {"after": (ANY,)}}

    @classmethod
    def VALIDATE_INPUTS(cls, input_types):  # noqa: N802
        return True

    def run(self, after=None):
        state = {
            "generator": sha(torch.get_rng_state().numpy().tobytes()),
            "numpy": sha(np.random.get_state()[1].tobytes()),
            "python": sha(repr(random.getstate()).encode()),
            "grad": torch.is_grad_enabled(),
            "inference": torch.is_inference_mode_enabled(),
            "autocast": [torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")],
            "dtype": str(torch.get_default_dtype()),
            "device": str(torch.get_default_device()),
            "threads": torch.get_num_threads(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "matmul": torch.get_float32_matmul_precision(),
            "tf32": [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32],
            "anomaly": torch.is_anomaly_enabled(),
            "folder": str(os.path.realpath(".")),
            "arguments": sys.argv[1:],
            "search path": sys.path,
            "log level": logging.getLogger().level,
            "log handlers": len(logging.getLogger().handlers),
            "warning filters": len(warnings.filters),
            "environment": sha(repr(sorted(os.environ.items())).encode()),
            "tensors": tensors_held(),
        }
        return {"ui": {"state": [state]}, "result": (str(state),)}


class SeedGlobally(Uncached):
    """Seeds the global random generators, as some nodes do."""

    RETURN_TYPES = (ANY,)

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"seed": ("INT", {"default": 7})}}

    def run(self, seed):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        return (seed,)


class DrawGlobally(Uncached):
    """Draws from the global random generators, as some nodes do."""

    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"after": (ANY,)}}

    def run(self, after):
        return {"ui": {"drawn": [[torch.rand(()).item(), float(np.random.rand()), random.random()]]}}


class Digest(Node):
    """Puts shape, mean, extent (max - min), finiteness and hash of an IMAGE or LATENT into /history, as `digest`."""

    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"value": (ANY,)}}

    @classmethod
    def VALIDATE_INPUTS(cls, input_types):  # noqa: N802
        return True

    def run(self, value):
        tensor = (value["samples"] if isinstance(value, dict) else value).detach().float().cpu().contiguous()
        numbers = {
            "shape": list(tensor.shape),
            "mean": tensor.mean().item(),
            "extent": (tensor.max() - tensor.min()).item(),
            "finite": bool(tensor.isfinite().all()),
            "sha": sha(tensor.numpy().tobytes()),
        }
        return {"ui": {"digest": [numbers]}}
