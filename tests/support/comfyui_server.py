"""A real ComfyUI server for tests, with this pack installed by copying it into custom_nodes."""

from __future__ import annotations

import shutil
from pathlib import Path

from tools.comfyui import ComfyUI, device_arguments, install_pack, make_base

ODD_NAME = "Qwen-Edit.Trainer test"  # users rename the folder; a dot and a space must work
TEST_NODES = "qet_test_nodes"


class PackServer(ComfyUI):
    """ComfyUI with this pack, by default in an oddly named folder, and with the nodes of tests/support/test_nodes."""

    def __init__(
        self, base: Path, *arguments: str, environment: dict[str, str] | None = None, name: str = ODD_NAME
    ) -> None:
        make_base(base)
        self.pack = install_pack(base, name)
        helpers = Path(__file__).parent / "test_nodes"
        shutil.copytree(helpers, base / "custom_nodes" / TEST_NODES, ignore=shutil.ignore_patterns("__pycache__"))
        only_ours = ["--disable-all-custom-nodes", "--whitelist-custom-nodes", name, TEST_NODES]
        super().__init__(
            base,
            *device_arguments(),
            "--disable-api-nodes",
            *only_ours,
            *arguments,
            log=base / "comfyui.log",
            environment={"OMP_NUM_THREADS": "1", **(environment or {})},  # threads slow narrow models down
        )

    def stop(self) -> None:
        """Kill the server, because Python's shutdown with torch takes up to ten seconds."""
        self.kill()
        super().stop()

    @property
    def input(self) -> Path:
        """ComfyUI's input folder."""
        return self.base / "input"

    @property
    def output(self) -> Path:
        """ComfyUI's output folder."""
        return self.base / "output"

    def our_nodes(self) -> dict[str, dict]:
        """The entries of this pack's nodes in /object_info, by node id."""
        return {name: info for name, info in self.get("/object_info").items() if name.startswith("QwenEdit_")}
