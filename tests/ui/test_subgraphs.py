"""Our nodes work inside subgraphs: the blueprint, and one that a user makes.

UI_FRONTENDS=folder:folder tests further frontends, each the `static` folder of a comfyui_frontend_package.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.support.browser_page import other_frontends
from tools.comfyui import REPO

from .conftest import OpenPage

pytestmark = pytest.mark.server

FRONTENDS = [None, *other_frontends()]
GRAPH = "import('/extensions/qwen-edit-trainer/trainer/graph.js')"
OUTER = "app.graph.nodes.find(node => node.subgraph)"
NAMED = """name => {
    const widget = app.graph.nodes[0].widgets.find(each => each.name === 'run_name');
    widget.value = name;
    app.extensionManager.workflow.activeWorkflow.changeTracker.checkState();
}"""
SELECTED = "title => Object.values(app.canvas.selected_nodes).some(node => node.title === title)"
PREVIEW_IN_SUBGRAPH = """() => {
    app.canvas.setGraph(app.graph);
    app.graph.clear();
    const [pairs, preview] = ['EditPairs', 'PreviewPairs'].map(kind => LiteGraph.createNode(`QwenEdit_${kind}`));
    app.graph.add(pairs);
    app.graph.add(preview);
    pairs.connect(0, preview, 0);
    app.graph.convertToSubgraph(new Set([pairs, preview]));
}"""


@pytest.mark.parametrize("frontend", FRONTENDS, ids=lambda folder: folder.parts[-3] if folder else "installed")
def test_our_nodes_in_subgraphs(frontend: Path | None, open_page: OpenPage):
    page = open_page(frontend=frontend)
    blueprint = json.loads((REPO / "subgraphs" / "Train a Qwen edit LoRA.json").read_text(encoding="utf-8"))
    page.page.evaluate("graph => app.loadGraphData(graph, true, true, 'blueprint')", blueprint)
    values = f"() => Object.fromEntries({OUTER}.widgets.map(each => [each.name, each.value]))"
    demo = "demo (embedded)"
    expected = {"model": demo, "data_set": demo, "instruction": "", "run_name": "my_edit"}
    assert page.page.evaluate(values) == expected

    page.page.evaluate(NAMED, "a/b")
    page.run()
    notice = page.page.locator(".qet-notice")
    expect(notice.locator("p")).to_contain_text("must be the name of a folder")
    notice.get_by_role("button", name="Go to node").click()
    page.page.wait_for_function(SELECTED, arg="Train Qwen Edit LoRA")
    assert page.page.evaluate(f"() => app.canvas.graph === {OUTER}.subgraph")
    expect(page.page.locator(".qet-before-head")).to_have_text("Run would be refused: 1 problem")

    ids = f"""async () => {{
        const {{ hasId }} = await {GRAPH}, {{ id, subgraph }} = {OUTER};
        const train = subgraph.nodes.find(node => node.comfyClass === 'QwenEdit_Train');
        return [`${{id}}:${{train.id}}`, `${{train.id}}`, `7:${{train.id}}`].map(each => hasId(train, each));
    }}"""
    assert page.page.evaluate(ids) == [True, False, False]

    button = f"{OUTER}.subgraph.nodes.flatMap(node => node.widgets).find(each => each.name === 'Edit pairs…')"
    page.page.evaluate(f"() => {button}.callback()")
    page.page.locator(".qet-pairs select").first.select_option("demo")
    page.page.wait_for_function(f"({values})().data_set === 'demo'")

    page.page.evaluate(PREVIEW_IN_SUBGRAPH)
    page.run()
    read = (
        f"{OUTER}.subgraph.nodes.map(node => node.widgets?.find(each => each.name === 'report')?.element.textContent)"
    )
    page.page.wait_for_function(f"() => {read}.some(text => text?.includes('6 pairs'))")
    page.problems[:] = [each for each in page.problems if "Prompt execution failed" not in each and "400" not in each]
