"""Determines a network's entry in the cache of quantised weights."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from ..config import ModelConfig, digest
from ..errors import ConfigError
from ..precision.materialise import Placement
from ..precision.quantised_cache import QuantisedCache
from .folder import weights_digest

_FORMAT = 2  # raise it when the cache's files change, so that old entries are no longer found
_QUANTISERS = ("optimum-quanto", "bitsandbytes")


def quantised_entry(config: ModelConfig, place: Path, placement: Placement) -> QuantisedCache | None:
    """The cache entry for the network at `place` under `placement`; None if the cache is off.

    The key covers everything that determines the codes: the model file, precision, dtype, unquantised layers, type of
    the quantising device, and the versions of torch and the quantising packages.

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
    key = digest([_FORMAT, weights_digest(place), *settings, torch.__version__, *map(_version, _QUANTISERS)])
    return QuantisedCache(Path(config.quantised_cache_dir), key, int(config.quantised_cache_gb * 1e9))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
