"""Fixtures: a browser, and a ComfyUI server with a small demo dataset."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from tests.support.browser_page import ARGUMENTS, ComfyPage, new_tab, show_frontend
from tests.support.comfyui_server import PackServer
from tools.comfyui import PACK_NAME
from tools.setup import find_browser
from trainer_core.demo.pictures import copy_demo_pairs

OpenPage = Callable[..., ComfyPage]
COUNT = 6  # pairs of `sources`


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Headless Chromium with a temporary profile."""
    path = find_browser()
    assert path, "No Chromium found. `make setup` installs it on Debian and Ubuntu; elsewhere set CHROMIUM to its path."
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def demo_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PackServer]:
    """Server with six demo pairs, not the shared one: ComfyUI serves no scripts of a pack with a space in its name."""
    server = PackServer(tmp_path_factory.mktemp("comfyui-page"), name=PACK_NAME)
    folder = server.input / "demo"
    copy_demo_pairs(folder)
    for name in sorted(path.stem for path in (folder / "target").glob("*.png"))[6:]:
        for path in folder.glob(f"*/{name}.*"):
            path.unlink()
    shutil.copy(folder / "reference" / "00_chelsea.png", server.input / "example.png")  # ComfyUI ships one
    with server:
        yield server


@pytest.fixture(scope="session")
def tabs() -> list[Page]:
    """The tab that the next test uses again, if there is one: compiling ComfyUI's scripts takes seconds."""
    return []


@pytest.fixture
def open_page(browser: Browser, tabs: list[Page], demo_server: PackServer) -> Iterator[OpenPage]:
    """Opens tabs with a node renderer (`classic` or `nodes 2.0`) and a palette. Any console error fails the test.

    The tabs of one test share no storage.
    """
    pages: list[ComfyPage] = []

    def opened(renderer: str = "classic", palette: str = "dark", frontend: Path | None = None) -> ComfyPage:
        settings = {"Comfy.VueNodes.Enabled": renderer != "classic", "Comfy.ColorPalette": palette}
        demo_server.post("/settings", {**settings, "Comfy.TutorialCompleted": True})
        tab = tabs.pop() if tabs else new_tab(browser)
        if frontend is not None:
            show_frontend(tab, demo_server, frontend)
        pages.append(ComfyPage(tab, demo_server))
        return pages[-1]

    yield opened
    problems = [problem for page in pages for problem in page.problems]
    for page in pages[1:]:
        page.page.context.close()
    tabs += [page.leave() for page in pages[:1]]
    if demo_server.get("/queue")["queue_running"]:  # left running by a failed test
        demo_server.interrupt()
    assert not problems, "\n".join(problems)


@pytest.fixture(scope="session")
def runs_dir(demo_server: PackServer) -> Path:
    """Where the server keeps its runs."""
    return demo_server.output / "qwen_edit_trainer" / "runs"


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pairs of the demo, with a caption each."""
    folder = tmp_path_factory.mktemp("pairs")
    copy_demo_pairs(folder)
    for number, path in enumerate(sorted((folder / "target").glob("*.png"))):
        path.with_suffix(".txt").write_text(f"edit {number}\n")
        if number >= COUNT:
            for each in folder.glob(f"*/{path.stem}.*"):
                each.unlink()
    return folder
