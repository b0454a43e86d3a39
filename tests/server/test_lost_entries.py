"""Deleted cache entries must be encoded again when the same graph is queued, even if ComfyUI has cached the node."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.comfyui_server import PackServer
from tests.support.training_graph import ENCODE, cache_entries, encoding, place_pairs

pytestmark = pytest.mark.server


def all_entries(server: PackServer) -> dict[Path, int]:
    """Modification time (ns) of every cached latent and prompt file."""
    return {**cache_entries(server, "latents"), **cache_entries(server, "prompt")}


def test_only_what_is_missing_is_made(studio: PackServer):
    earlier = set(all_entries(studio))
    prompt = encoding(place_pairs(studio, "for losses", 3, sizes=((224, 96),)))  # a size that no other test encodes
    studio.run(prompt)
    before = all_entries(studio)
    lost = next(path for path in before if path not in earlier)
    lost.unlink()
    studio.run(prompt)
    after = all_entries(studio)
    assert after.keys() == before.keys()
    assert {path for path in before if before[path] != after[path]} == {lost}
    prompt_id = studio.queue(prompt)
    studio.wait(prompt_id)
    (cached,) = studio.events_of(prompt_id, "execution_cached")
    assert ENCODE in cached["data"]["nodes"]
