"""The side panel Edit pairs, for tests of the page."""

from __future__ import annotations

from pathlib import Path

from playwright.sync_api import Locator

from tests.support.browser_page import ComfyPage


class Panel:
    """The panel of a page, and the folder of a data set that is made in it."""

    def __init__(self, page: ComfyPage, folder: Path) -> None:
        self.page, self.folder = page, folder
        self.root = page.page.locator(".qet-pairs")
        self.state = self.root.locator(".qet-state")
        self.instruction = self.root.get_by_role("textbox", name="Instruction for all pairs")

    def zone(self, side: str) -> Locator:
        """Where pictures of a side are dropped."""
        return self.root.locator(f'.qet-zone[data-side="{side}"]')

    def row(self, key: str) -> Locator:
        """A pair, or a picture without a partner."""
        return self.root.get_by_role("listitem", name=key, exact=True)

    def button(self, name: str) -> Locator:
        """A button by its text."""
        return self.root.get_by_role("button", name=name, exact=True)

    def files(self) -> dict[str, bytes]:
        """The data set's files, without the trash."""
        paths = (path for path in self.folder.rglob("*") if path.is_file() and ".trash" not in path.parts)
        return {path.relative_to(self.folder).as_posix(): path.read_bytes() for path in paths}


def open_short_path(page: ComfyPage) -> None:
    """A graph of Edit Pairs and the two nodes that a training on the demo model needs besides."""
    page.page.evaluate(
        """() => {
            app.graph.clear();
            const [pairs, model, train] = ["EditPairs", "ChooseModel", "Train"].map((kind, index) => {
                const node = LiteGraph.createNode(`QwenEdit_${kind}`);
                node.pos = [500 + 500 * index, 200];
                app.graph.add(node);
                return node;
            });
            model.connect(0, train, train.inputs.findIndex(input => input.name === "model"));
            pairs.connect(0, train, train.inputs.findIndex(input => input.name === "dataset"));
        }"""
    )
    page.set_widgets("ChooseModel", model="demo (embedded)")
    page.set_widgets("EditPairs", data_set="demo (embedded)")
