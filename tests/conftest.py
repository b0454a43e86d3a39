"""Fixtures for all tests, the fast tier and the server marker."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # more threads only slow the tests' small networks down
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

from tests.support.comfyui_server import PackServer
from tests.support.fixtures import (  # noqa: F401 - fixtures
    base_of,
    encoded,
    model,
    one_tokenizer,
    small_sight,
    tokenizer_dir,
    true_areas,
    unbroken,
)
from tests.support.tiers import FAST_MARKERS, FAST_PATHS
from tools.comfyui import REPO
from tools.comfyui import comfyui_dir as find_comfyui

hypothesis.settings.register_profile(
    "suite",
    derandomize=True,
    database=None,
    deadline=None,  # nor `too_slow`: both depend on the machine's load
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
    max_examples=100,
)
hypothesis.settings.load_profile("suite")  # the same examples on every machine

# Folders whose files share a worker, and so a server, by that worker's name.
ONE_WORKER = {"tests/ui": "page", "tests/server": "server", "tests/nodes": "server"}
LONGEST_FIRST = ("ui", "server", "numerics", "integration")  # so that no worker has long tests left at the end


@pytest.fixture(scope="session")
def repo() -> Path:
    """Root folder of this repository."""
    return REPO


@pytest.fixture(scope="session")
def comfyui_dir() -> Path:
    """ComfyUI's folder: COMFYUI_DIR, or the one that `make setup` unpacked."""
    return find_comfyui()


@pytest.fixture(scope="session")
def comfyui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PackServer]:
    """The session's ComfyUI server with the pack installed. It starts on first use."""
    with PackServer(tmp_path_factory.mktemp("comfyui")) as server:
        yield server


@pytest.fixture(scope="module", autouse=True)
def freed_memory() -> Iterator[None]:
    """After each file, gives back the memory that the Makefile's malloc settings keep: other workers need it."""
    yield
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture
def comfyui_of_its_own(tmp_path: Path) -> Iterator[Callable[..., PackServer]]:
    """Starts a server that only this test uses, and may kill: `comfyui_of_its_own("--cache-none")`."""
    servers: list[PackServer] = []

    def boot(*arguments: str, environment: dict[str, str] | None = None) -> PackServer:
        servers.append(PackServer(tmp_path / f"comfyui-{len(servers)}", *arguments, environment=environment))
        servers[-1].start()
        return servers[-1]

    yield boot
    for server in servers:
        server.stop()


@pytest.hookimpl(optionalhook=True, hookwrapper=True)
def pytest_xdist_auto_num_workers() -> Iterator[None]:
    """With -n auto, one worker more than cores, because the tests of servers and pages wait most of their time."""
    outcome = yield
    outcome.force_result(outcome.get_result() + 1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With --dist loadfile, a worker gets a whole file, or all files of the folders that share a worker."""
    from xdist.scheduler import LoadFileScheduling

    class ByServer(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return ONE_WORKER.get(file.rpartition("/")[0], file)

    config.option.loadscopereorder = False  # not the files with most tests first, but the order of collection
    return ByServer(config, log) if config.getoption("dist") == "loadfile" else None


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """Adds the end of the server's log to the report of a failed server test."""
    outcome = yield
    report = outcome.get_result()
    server = getattr(item, "funcargs", {}).get("comfyui")
    if report.failed and isinstance(server, PackServer):
        report.sections.append(("end of ComfyUI's log", server.log_end()))


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Skips tests/gpu on machines without a CUDA device."""
    import torch

    return True if "gpu" in collection_path.parts and not torch.cuda.is_available() else None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="only the fast tier (tests/support/tiers.py)")


def pytest_configure(config: pytest.Config) -> None:
    """Makes --fast run FAST_PATHS unless paths are given, and FAST_MARKERS unless -m is given."""
    if config.getoption("--fast"):
        if config.args_source is pytest.Config.ArgsSource.TESTPATHS:
            config.args = list(FAST_PATHS)
        config.option.markexpr = config.option.markexpr or FAST_MARKERS


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Adds the marker `server` to each test that uses a ComfyUI server, whatever its folder. Sorts LONGEST_FIRST."""
    items.sort(key=lambda item: next((n for n, folder in enumerate(LONGEST_FIRST) if folder in item.path.parts), 99))
    for item in items:
        if {"comfyui", "comfyui_of_its_own"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.server)
