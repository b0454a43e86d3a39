"""Every decimal widget of this pack keeps its value while it is shown and focused, and takes what is typed.

UI_FRONTENDS=folder:folder tests further frontends, each the `static` folder of a comfyui_frontend_package.
"""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from tests.support.browser_page import ComfyPage, other_frontends

from .conftest import OpenPage

pytestmark = pytest.mark.server

FRONTENDS = [None, *other_frontends()]
KINDS = """() => Object.entries(LiteGraph.registered_node_types).filter(([name, kind]) => name.startsWith('QwenEdit_')
    && Object.values({ ...kind.nodeData.input.required, ...kind.nodeData.input.optional })
        .some(spec => spec[0] === 'FLOAT')).map(([name]) => name)"""
# Shows one node alone, and returns name, value and another value of its decimal widgets. The other value has more
# decimals than the widget's step.
SHOW = """kind => {
    app.graph.clear();
    const { required, optional } = LiteGraph.registered_node_types[kind].nodeData.input;
    for (const spec of Object.values({ ...required, ...optional })) delete spec[1]?.qwen_edit_used; // show all
    const node = LiteGraph.createNode(kind);
    node.pos = [100, 60];
    app.graph.add(node);
    app.canvas.ds.scale = 1;
    app.canvas.ds.offset[0] = app.canvas.ds.offset[1] = 60;
    window.floats = node.widgets.filter(each => ({ ...required, ...optional })[each.name]?.[0] === 'FLOAT');
    return floats.map(({ name, value, options: { min, step2 } }) =>
        [name, value, Number(((min > 0 ? min : step2) * 1.25).toPrecision(12))]);
}"""
VALUE = "name => floats.find(each => each.name === name).value"
FIELD = """name => [...document.querySelectorAll('[data-node-id] input')]
    .find(each => each.closest('[aria-label]')?.getAttribute('aria-label') === name)"""
TYPE_ON_CANVAS = """([name, text]) => {
    const widget = floats.find(each => each.name === name), node = app.graph.nodes[0];
    LGraphCanvas.active_canvas = app.canvas; // as a click does
    const shown = Number(widget._displayValue);
    const e = { canvasX: node.pos[0] + node.size[0] / 2, clientX: 9, clientY: 9 };
    widget.onClick({ e, node, canvas: app.canvas });
    const dialog = document.querySelector('.graphdialog'), offered = Number(dialog.querySelector('input').value);
    if (text) dialog.querySelector('input').value = text;
    dialog.querySelector('button').click();
    return [shown, offered, widget.value, Number(widget._displayValue)];
}"""


def in_decimals(value: float) -> str:
    return format(Decimal(repr(value)), "f")


@pytest.mark.parametrize("frontend", FRONTENDS, ids=lambda folder: folder.parts[-3] if folder else "installed")
def test_decimals_in_the_classic_renderer(frontend: Path | None, open_page: OpenPage):
    page = open_page(frontend=frontend).page
    kinds = page.evaluate(KINDS)
    assert len(kinds) > 10
    for kind in kinds:
        for name, value, other in page.evaluate(SHOW, kind):
            assert page.evaluate(TYPE_ON_CANVAS, [name, ""]) == [value] * 4, (kind, name)
            typed = page.evaluate(TYPE_ON_CANVAS, [name, in_decimals(other)])
            assert typed == [value, value, other, other], (kind, name)


class Fields:
    """The fields of the node that Nodes 2.0 shows."""

    def __init__(self, page: ComfyPage) -> None:
        self.page = page.page

    def edit(self, name: str, text: str = "") -> Any:
        """Focus a field, type a text over its own, and leave it by Tab. Returns the widget's value."""
        field = self.page.evaluate_handle(FIELD, name).as_element()
        assert field is not None
        field.evaluate("field => { field.focus(); field.select(); }")
        self.page.keyboard.type(text)
        self.page.keyboard.press("Tab")
        return self.page.evaluate(VALUE, name)

    def shown(self, name: str) -> float:
        return float(self.page.evaluate(f"name => ({FIELD})(name).value", name).replace(",", ""))


@pytest.mark.parametrize("frontend", FRONTENDS, ids=lambda folder: folder.parts[-3] if folder else "installed")
def test_decimals_in_nodes_2(frontend: Path | None, open_page: OpenPage):
    page = open_page("nodes 2.0", frontend=frontend)
    fields = Fields(page)
    for kind in page.page.evaluate(KINDS):
        floats = page.page.evaluate(SHOW, kind)
        page.page.wait_for_function(f"name => Boolean(({FIELD})(name))", arg=floats[-1][0])
        for name, value, other in floats:
            assert (fields.shown(name), fields.edit(name)) == (value, value), (kind, name)
            assert (fields.edit(name, in_decimals(other)), fields.shown(name)) == (other, other), (kind, name)
            assert fields.edit(name) == other, (kind, name)
        if kind == "QwenEdit_OptimizerSettings":
            assert [fields.edit("learning_rate", text) for text in ("1e-4", "2.5E-5")] == [1e-4, 2.5e-5]
            assert fields.shown("learning_rate") == 2.5e-5
