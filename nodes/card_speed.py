"""The measured speed of the card. It is not measured while ComfyUI runs a prompt, which would slow both down."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from . import host_server

if TYPE_CHECKING:
    import torch

    from ..trainer_core.config import TrainConfig
    from ..trainer_core.planning.duration import Speed
    from ..trainer_core.planning.network import NetworkSize
    from ..trainer_core.planning.workload import Workload

_TOKENS = 512  # speeds at numbers of tokens that differ by less are taken as equal
_KEPT = 32

_lock = threading.Lock()
_speeds: dict[tuple[Any, ...], Speed] = {}


def known_speed(config: TrainConfig, network: NetworkSize, work: Workload, device: torch.device) -> Speed | None:
    """The device's speed for this run: measured now, or earlier if a prompt runs. None if it isn't known."""
    from ..trainer_core.planning.duration import probed_speed

    network_kind: tuple[Any, ...] = (
        *(str(device), network.width, network.heads, network.element_bytes, network.precision),
        *(config.memory.compile_blocks, config.model.matmul_precision),
    )
    key = (*network_kind, (work.tokens.image + work.tokens.text) // _TOKENS)
    with _lock:
        if key in _speeds:
            return _speeds[key]
        if host_server.is_busy():
            return next((speed for kind, speed in reversed(_speeds.items()) if kind[:-1] == network_kind), None)
        speed = probed_speed(config, network, work, device)
        if speed is not None:
            _speeds[key] = speed
            while len(_speeds) > _KEPT:
                del _speeds[next(iter(_speeds))]
        return speed
