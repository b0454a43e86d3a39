"""Run waits for what is given to its data sets in the side panel Edit pairs, and starts on no half of it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from playwright.sync_api import Route, expect

from tests.support.browser_page import ComfyPage
from tests.support.comfyui_server import PackServer
from tests.support.pairs_panel import Panel, open_short_path

from .conftest import COUNT, OpenPage

pytestmark = pytest.mark.server

UPLOADS = "**/data_sets/slow/pictures?*"


def open_half(page: ComfyPage, folder: Path, sources: Path) -> Panel:
    """A graph of a data set with six pictures before the edit, and the panel that shows it."""
    (folder / "target").mkdir(parents=True)
    shutil.copytree(sources / "reference", folder / "reference")
    open_short_path(page)
    page.tab_button("qwen-edit-pairs").click()
    panel = Panel(page, folder)
    panel.root.get_by_role("combobox", name="Data set").select_option(folder.name)
    page.page.wait_for_function("name => app.graph.nodes[0].widgets[0].value === name", arg=folder.name)
    return panel


def test_a_run_waits_until_everything_is_on_the_disk(
    open_page: OpenPage, demo_server: PackServer, sources: Path, tmp_path: Path
):
    page = open_page()
    panel = open_half(page, demo_server.input / "slow", sources)
    slow: list[Route] = []
    queued: list[dict[str, bytes]] = []  # the files that were there when the graph was queued

    def answer(route: Route) -> None:
        queued.append(panel.files())
        route.fulfill(json={"prompt_id": "none", "number": 0, "node_errors": {}})

    def hold(route: Route) -> None:
        slow.append(route)

    page.page.route(UPLOADS, hold)
    page.page.route("**/prompt", answer)
    targets = sorted(path for path in (sources / "target").iterdir() if path.suffix == ".png")
    page.drop(panel.zone("target"), *targets)
    page.page.evaluate("() => { window.run = app.queuePrompt(0); }")
    expect(page.page.get_by_text("The run starts when all pictures are uploaded.")).to_be_visible()
    page.page.unroute(UPLOADS, hold)
    for other in (
        "class_type: 'SaveImage', inputs: {}",
        "class_type: 'QwenEdit_EditPairs', inputs: {data_set: 'demo'}",
    ):
        page.page.evaluate(f"() => app.api.queuePrompt(0, {{ output: {{ 1: {{ {other} }} }}, workflow: {{}} }})")
    assert [len(files) for files in queued] == [COUNT] * 2  # a graph without this data set does not wait
    queued.clear()
    for route in slow:
        route.continue_()
    page.page.evaluate("() => window.run")
    panel.instruction.fill("make it a drawing")
    page.page.evaluate("() => app.queuePrompt(0)")
    assert [sum(name.startswith("target/") for name in files) for files in queued] == [COUNT, 2 * COUNT]
    assert set(queued[1].values()) - set(queued[0].values()) == {b"make it a drawing\n"}

    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    page.page.route(UPLOADS, hold)
    slow.clear()
    page.drop(panel.zone("target"), broken, targets[0])
    page.page.evaluate("() => { window.run = app.queuePrompt(0); }")
    while len(slow) < 2:
        page.page.wait_for_timeout(20)
    next(route for route in slow if "broken" in route.request.url).continue_()
    expect(panel.root.get_by_role("alert", name="Problems of files").get_by_role("listitem")).to_have_count(1)
    panel.button("Cancel").click()
    page.page.evaluate("() => window.run")
    expect(page.page.get_by_text("Not started: files that could not be uploaded: 2.").first).to_be_visible()
    page.page.keyboard.press("Escape")
    page.page.unroute(UPLOADS, hold)
    panel.instruction.fill("typed, but its data set is gone")
    shutil.rmtree(panel.folder)
    page.reopen_pairs()
    expect(panel.state).to_contain_text("No data set")
    page.page.evaluate("() => app.queuePrompt(0)")
    assert len(queued) == 3
    assert all(re.search(r"Not started: |/slow/captions .*404", each) for each in page.problems)
    page.problems.clear()  # ComfyUI and the browser log what was refused


def test_a_dropped_folder_that_cannot_be_read_is_told(open_page: OpenPage):
    page = open_page()
    page.tab_button("qwen-edit-pairs").click()
    page.page.locator(".qet-pairs").evaluate(
        """root => {
            const readEntries = (_found, failed) => failed(new DOMException("", "NotFoundError"));
            const createReader = () => ({ readEntries });
            const entry = { isFile: false, isDirectory: true, name: "gone", createReader };
            const items = [{ kind: "file", webkitGetAsEntry: () => entry }];
            const drop = new Event("drop", { bubbles: true });
            root.dispatchEvent(Object.assign(drop, { dataTransfer: { files: [], items, types: ["Files"] } }));
        }"""
    )
    expect(page.page.get_by_text("A dropped file or folder can't be read, so nothing was uploaded.")).to_be_visible()
