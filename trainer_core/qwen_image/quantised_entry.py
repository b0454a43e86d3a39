"""Determines a network's entry in the cache of quantised weights."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..config import ModelConfig, digest
from ..errors import ConfigError
from ..precision.materialise import Placement
from ..precision.quantised_cache import QuantisedCache
from ..weights.stored import WeightSource
from .folder import weights_digest

_FORMAT = 2  # raise it when the cache's files change, so that old entries are no longer found
_QUANTISERS = ("optimum-quanto", "bitsandbytes")


def quantised_entry(config: ModelConfig, source: WeightSource, placement: Placement) -> QuantisedCache | None:
    """The cache entry for the network in `source` under `placement`; None if the cache is off.

    The key covers everything that determines the codes: the model file, frozen LoRAs, precision, dtype, unquantised
    layers, type of the quantising device (also its model, see `_card`), and the versions of torch and the quantising
    packages.

    Raises:
        ConfigError: the cache is on, but has no folder.
    """
    if config.quantised_cache_gb == 0:
        return None
    if not config.quantised_cache_dir:
        raise ConfigError(
            f"quantised_cache_gb is {config.quantised_cache_gb:g}, but quantised_cache_dir is empty. Set it to a "
            "folder, or quantised_cache_gb to 0."
        )
    settings = [placement.precision, str(placement.dtype), placement.keep, placement.quantise_on.type]
    versions = [torch.__version__, *map(_version, _QUANTISERS), *_card(config, source, placement)]
    loras = [[weights_digest(Path(lora.file)), lora.strength] for lora in config.frozen_loras]
    key = digest([_FORMAT, weights_digest(source.place), *settings, *versions, *loras])
    return QuantisedCache(Path(config.quantised_cache_dir), key, int(config.quantised_cache_gb * 1e9))


def _card(config: ModelConfig, source: WeightSource, placement: Placement) -> list[Any]:
    """The compute capability of the quantising card, where the codes depend on it; otherwise empty.

    bitsandbytes is compiled with --use_fast_math, so its kernel divides approximately, in a way that each generation of
    cards has for itself. The rotation of a rotated int8 file is undone by a product of matrices, and a frozen LoRA is
    one: their order of summation depends on the card. quanto's codes, and the other formats of files, come from single
    float32 operations, which IEEE 754 defines to the last bit.
    """
    if placement.quantise_on.type == "cuda" and (
        placement.precision == "nf4-bnb" or source.is_rotated or config.frozen_loras
    ):
        return [torch.cuda.get_device_capability(placement.quantise_on)]
    return []


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
