"""Nodes show the widgets that change something, and the text that they output.

UI_FRONTENDS=folder:folder tests further frontends, each the `static` folder of a comfyui_frontend_package.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.support.browser_page import ComfyPage, other_frontends

from .conftest import OpenPage

pytestmark = pytest.mark.server

FRONTENDS = [None, *other_frontends()]
BUILD = """() => {
    app.graph.clear();
    const made = (kind, x, values = {}) => {
        const node = LiteGraph.createNode(`QwenEdit_${kind}`);
        node.pos = [x, 80];
        app.graph.add(node);
        for (const [name, value] of Object.entries(values)) node.widgets.find(each => each.name === name).value = value;
        return node;
    };
    const folders = { target_folder: 'demo/target', reference_folder_1: 'demo/reference' };
    made('PairFolders', 40, folders).connect(0, made('PreviewPairs', 480), 0);
    made('OptimizerSettings', 900);
    [app.canvas.ds.scale, app.canvas.ds.offset[0], app.canvas.ds.offset[1]] = [0.7, 80, 60];
}"""
# Names of an optimizer node's widgets that are seen: in Nodes 2.0 the elements, else what the canvas lays out.
SEEN = """() => {
    const node = app.graph.nodes.find(each => each.comfyClass === 'QwenEdit_OptimizerSettings');
    if (!LiteGraph.vueNodesMode) return node.widgets.filter(each => node.isWidgetVisible(each)).map(each => each.name);
    const rows = document.querySelectorAll(`[data-node-id="${node.id}"] .lg-node-widget`);
    return [...rows].map(row => node.widgets.find(({ name }) => row.textContent.replaceAll(' ', '_').includes(name)
        || row.querySelector(`[aria-label="${name}"]`))?.name);
}"""
BOX = """() => {
    const { pos, size } = app.graph.nodes.find(each => each.comfyClass === 'QwenEdit_OptimizerSettings');
    return [...pos, size[0], size[1]].map(Math.round);
}"""
TRY_A_RUN = """() => {
    app.graph.clear();
    const kinds = ['QwenEdit_Train', 'QwenEdit_TryLora', 'KSampler'];
    const [train, trial, own] = kinds.map(kind => LiteGraph.createNode(kind));
    [train, trial, own].forEach((node, index) => { node.pos = [500 * index, 80]; app.graph.add(node); });
    const input = trial.inputs.findIndex(each => each.name === 'run');
    train.connect(train.outputs.findIndex(each => each.type === trial.inputs[input].type), trial, input);
}"""
# Compared with ComfyUI's own node, because Nodes 2.0 of frontend 1.32.9 shrink every node when they load a graph.
HEIGHTS = """() => {
    const heights = Object.fromEntries(app.graph.nodes.map(node => [node.comfyClass, node.size[1]]));
    return ['Train', 'TryLora'].map(kind => Math.round(heights[`QwenEdit_${kind}`] - heights.KSampler));
}"""
ALWAYS = {"optimizer", "learning_rate", "lr_scheduler", "weight_decay", "max_grad_norm"}
ADAM = {"adam_beta1", "adam_beta2", "adam_epsilon"}


def see(page: ComfyPage, expected: set[str]) -> None:
    """Wait until the optimizer node shows these widgets and no others."""
    names = sorted(expected)
    page.page.wait_for_function(f"names => JSON.stringify(({SEEN})().sort()) === JSON.stringify(names)", arg=names)


def laid_out(page: ComfyPage, read: str) -> list[int]:
    """What a script reads from the graph when the renderer no longer changes it."""
    before: list[int] = []
    while (now := page.page.evaluate(read)) != before:
        before = now
        page.page.wait_for_timeout(500)
    return now


@pytest.mark.parametrize("frontend", FRONTENDS, ids=lambda folder: folder.parts[-3] if folder else "installed")
@pytest.mark.parametrize("renderer", ["classic", "nodes 2.0"])
def test_what_means_nothing_is_not_shown_and_what_is_said_is(renderer: str, frontend: Path | None, open_page: OpenPage):
    page = open_page(renderer, frontend=frontend)
    page.page.evaluate(BUILD)

    warmup = {"lr_warmup_steps"}
    see(page, ALWAYS | ADAM | warmup)
    x, y, width, height = laid_out(page, BOX)
    page.set_widgets("OptimizerSettings", optimizer="prodigy", learning_rate=1.0)
    see(page, ALWAYS | ADAM | warmup | {"prodigy_d_coef"})
    assert page.page.evaluate(BOX)[:3] == [x, y, width]
    assert page.page.evaluate(BOX)[3] > height
    page.set_widgets("OptimizerSettings", prodigy_d_coef=2.0)
    page.set_widgets("OptimizerSettings", optimizer="lion", learning_rate=1e-4, lr_scheduler="polynomial")
    see(page, ALWAYS | warmup | {"adam_beta1", "lion_beta2", "lr_power", "lr_end"})
    page.set_widgets("OptimizerSettings", optimizer="adafactor", lr_scheduler="constant")
    see(page, ALWAYS | warmup)  # 10 steps of warm-up are refused here, so they are seen
    page.set_widgets("OptimizerSettings", lr_warmup_steps=0)
    see(page, ALWAYS)
    assert page.page.evaluate(BOX)[3] < height
    sent = page.page.evaluate("async () => Object.values((await app.graphToPrompt()).output)")
    assert next(each["inputs"] for each in sent if "Optimizer" in each["class_type"])["prodigy_d_coef"] == 2.0

    text = page.page.locator(".qet-report-text")
    page.run()
    expect(text).to_contain_text("6 pairs with 1 reference each.")
    page.page.locator(".qet-report").get_by_role("button").click()
    expect(page.page.locator(".qet-report").get_by_role("button")).to_have_text("Copied")
    saved = page.page.evaluate("() => JSON.stringify(app.graph.serialize())")
    assert "6 pairs with" not in saved
    # As ComfyUI does when people come back to a tab, or open a graph from the queue.
    page.page.evaluate(
        """async () => {
            const outputs = JSON.parse(JSON.stringify(app.nodeOutputs));
            await app.loadGraphData(app.graph.serialize());
            document.querySelectorAll('.qet-report-text').forEach(each => { each.textContent = ''; });
            app.nodeOutputs = outputs;
        }"""
    )
    expect(text).to_contain_text("6 pairs with 1 reference each.")
    see(page, ALWAYS)


@pytest.mark.parametrize("frontend", FRONTENDS, ids=lambda folder: folder.parts[-3] if folder else "installed")
@pytest.mark.parametrize("renderer", ["classic", "nodes 2.0"])
def test_a_saved_graph_keeps_the_heights_of_its_nodes(renderer: str, frontend: Path | None, open_page: OpenPage):
    page = open_page(renderer, frontend=frontend)
    page.page.evaluate(TRY_A_RUN)
    laid_out(page, HEIGHTS)
    page.page.evaluate("() => app.graph.nodes.forEach(node => node.setSize([node.size[0], node.size[1] + 900]))")
    heights: list[list[int]] = []
    for _ in range(4):
        page.page.evaluate("async () => { await app.loadGraphData(app.graph.serialize()); }")
        heights.append(laid_out(page, HEIGHTS))
    assert heights == heights[:1] * 4
