"""The fast tier: the tests that `make test-fast` runs. They need no ComfyUI server, browser or training."""

from __future__ import annotations

# Test folders and files of the fast tier. FAST_MARKERS leaves out the tests in them marked `slow` or `server`.
FAST_PATHS = (
    "tests/architecture",
    "tests/core",
    "tests/nodes",
    "tests/tools",
    "tests/integration/test_early_refusals.py",
    "tests/numerics/test_adapter.py",
    "tests/numerics/test_query_key.py",
    "tests/numerics/test_noise_and_loss.py",
    "tests/numerics/test_objective.py",
    "tests/numerics/test_positions.py",
    "tests/numerics/test_wrong_files.py",
)
FAST_MARKERS = "not slow and not server"
