"""Our nodes work inside subgraphs: the blueprint, and one that a user makes.

UI_FRONTENDS=folder:folder tests further frontends, each the `static` folder of a comfyui_frontend_package.
"""

from __future__ import annotations

import json
import re
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
NAME_OF_BOX = f"""() => {{
    const {{ element, name }} = {OUTER}.widgets.find(each => each.name === 'instruction');
    return [element.checkVisibility(), element.placeholder, element.value];
}}"""
COUNT_ENDS = f"""async () => {{
    const {{ whenGone }} = await import('/extensions/qwen-edit-trainer/trainer/node_parts.js');
    const train = {OUTER}.subgraph.nodes.find(node => node.comfyClass === 'QwenEdit_Train');
    window.ended ??= 0;
    whenGone(train, () => window.ended += 1);
}}"""
PROMPTS = """async () => {
    const real = app.graphToPrompt;
    let count = 0;
    app.graphToPrompt = (...given) => (count += 1, real.apply(app, given));
    app.api.dispatchEvent(new CustomEvent('graphChanged'));
    await new Promise(done => setTimeout(done, 1500)); // the page waits for a second without a change
    app.graphToPrompt = real;
    return count;
}"""
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
    for count in range(2):
        page.page.evaluate("graph => app.loadGraphData(graph, true, true, 'blueprint')", blueprint)
        page.page.wait_for_function("count => (window.ended ?? 0) === count", arg=count)
        page.page.evaluate(COUNT_ENDS)
    values = f"() => Object.fromEntries({OUTER}.widgets.map(each => [each.name, each.value]))"
    demo = "demo (embedded)"
    expected = {"model": demo, "data_set": demo, "instruction": "", "run_name": "my_edit"}
    assert page.page.evaluate(values) == expected
    page.page.wait_for_function(f"() => ({NAME_OF_BOX})()[0]")
    assert page.page.evaluate(NAME_OF_BOX) == [True, "instruction", ""]

    page.page.evaluate(NAMED, "a/b")
    page.run()
    notice = page.page.locator(".qet-notice")
    expect(notice.locator("p")).to_contain_text("can't be 'a/b'")
    notice.get_by_role("button", name="Go to node").click()
    page.page.wait_for_function(SELECTED, arg="Train Qwen Edit LoRA")
    assert page.page.evaluate(f"() => app.canvas.graph === {OUTER}.subgraph")
    expect(page.page.locator(".qet-before-head")).to_have_text("Not ready")

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
    assert page.page.evaluate(PROMPTS) == 0
    assert page.page.evaluate("() => window.ended") == 2
    page.run()
    read = (
        f"{OUTER}.subgraph.nodes.map(node => node.widgets?.find(each => each.name === 'report')?.element.textContent)"
    )
    page.page.wait_for_function(f"() => {read}.some(text => text?.includes('6 pairs'))")
    known = r"Prompt execution failed|/prompt .* 400 "  # of the run that is refused
    page.problems[:] = [each for each in page.problems if not re.search(known, each)]
