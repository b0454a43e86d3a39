"""The fast tier: what `make test-fast` runs. It starts no ComfyUI server, no browser and no training."""

from __future__ import annotations

# Folders and files of tests. In them, tests marked `slow` or `server` are left out.
FAST_PATHS = (
    "tests/architecture",
    "tests/core",
    "tests/nodes",
    "tests/tools",
    "tests/integration/test_early_refusals.py",
    "tests/numerics/test_adapter.py",
    "tests/numerics/test_frozen_norm.py",
    "tests/numerics/test_noise_and_loss.py",
    "tests/numerics/test_objective.py",
    "tests/numerics/test_positions.py",
    "tests/numerics/test_wrong_files.py",
)
FAST_MARKERS = "not slow and not server"
