"""A first training on a new server, with the mouse and the keyboard alone, as somebody does who reads nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, expect

from tests.support.browser_page import ComfyPage, new_tab, other_frontends, show_frontend
from tests.support.comfyui_server import PackServer
from tools.comfyui import PACK_NAME
from trainer_core.demo.pictures import copy_demo_pairs

pytestmark = pytest.mark.server

COUNT = 12
MOST_CLICKS, MOST_FIELDS = 8, 1
FRONTENDS = [None, *other_frontends()]
PROGRESS_TEXTS = """() => app.graph.nodes.flatMap(node => node.widgets ?? [])
    .filter(each => each.name === "$$node-text-preview").length"""
COUNT_PROGRESS_TEXTS = f"""() => setInterval(
    () => {{ window.mostProgressTexts = Math.max(window.mostProgressTexts ?? 0, ({PROGRESS_TEXTS})()); }}, 50)"""


class Beginner:
    """Somebody at the page. Counts the clicks and the fields that are typed into."""

    def __init__(self, page: ComfyPage) -> None:
        self.page, self.clicks, self.fields = page, 0, 0

    def click(self, place: Locator) -> None:
        place.click()
        self.clicks += 1

    def type(self, text: str) -> None:
        self.page.page.keyboard.type(text)
        self.fields += 1


@pytest.fixture
def new_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PackServer]:
    """A server with this pack and nothing else: no pictures, no models, no runs, ComfyUI's own settings."""
    with PackServer(tmp_path_factory.mktemp("beginner"), name=PACK_NAME) as server:
        server.post("/settings", {"Comfy.TutorialCompleted": True})
        yield server


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Twelve pairs without captions."""
    copy_demo_pairs(tmp_path)
    for path in tmp_path.glob("*/*.txt"):
        path.unlink()
    for name in sorted(path.stem for path in (tmp_path / "target").iterdir())[COUNT:]:
        for path in tmp_path.glob(f"*/{name}.*"):
            path.unlink()
    return tmp_path


@pytest.fixture
def page(frontend: Path | None, browser: Browser, new_server: PackServer) -> Iterator[ComfyPage]:
    """The new server's page in a tab of its own."""
    tab = new_tab(browser)
    if frontend is not None:
        show_frontend(tab, new_server, frontend)
    yield ComfyPage(tab, new_server)
    tab.context.close()


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_from_the_template_to_the_lora(frontend: Path | None, page: ComfyPage, new_server: PackServer, pictures: Path):
    person, panel = Beginner(page), page.page.locator(".qet-pairs")

    person.click(page.tab_button("templates"))
    person.click(page.page.get_by_role("dialog").get_by_text(new_server.pack.name))
    card = page.page.get_by_text("Qwen edit LoRA - Try the demo")
    expect(card).to_be_visible()
    page.picture("beginner 1 templates")
    person.click(card)
    page.page.wait_for_function("() => app.graph.nodes.some(node => node.comfyClass === 'QwenEdit_Train')")
    page.picture("beginner 2 graph")

    page.press_node_button("EditPairs", "Edit pairs…")
    person.clicks += 1
    for side in ("reference", "target"):
        zone = panel.locator(f'.qet-zone[data-side="{side}"]')
        page.drop(zone, *sorted((pictures / side).iterdir()))
        expect(zone).to_contain_text(str(COUNT))  # while files arrive, the zones can move
    expect(panel.get_by_role("textbox", name="Instruction for all pairs")).to_be_focused()
    person.type("Turn the photo into a negative")
    page.picture("beginner 3 pairs")
    page.page.evaluate(COUNT_PROGRESS_TEXTS)
    person.click(page.page.get_by_test_id("queue-button"))
    expect(page.node_view.locator(".qet-thumb").nth(2)).to_be_visible()
    page.picture("beginner 4 training")

    person.click(page.tab_button("qwen-edit-trainer"))
    person.click(page.panel.get_by_role("button", name="Stop and keep"))
    person.click(page.panel.locator(".qet-ending").get_by_role("button", name="Try it"))
    tried = page.panel.get_by_role("region", name="Try the LoRA")
    expect(tried.get_by_text("LoRA at strength 1.00")).to_be_visible()
    page.picture("beginner 5 tried")
    trial = page.page.locator(".qet-node", has=page.page.get_by_text("strength 1 Likeness"))
    expect(trial).to_be_visible()
    if frontend is None:
        assert page.page.evaluate("() => window.mostProgressTexts") > 0
    assert page.page.evaluate(PROGRESS_TEXTS) == 0  # progress ends with the run

    assert person.clicks <= MOST_CLICKS
    assert person.fields <= MOST_FIELDS
    assert page.problems == []
