"""Why a node of ours can't run is said on the page, and stays there, though ComfyUI runs the rest of the graph."""

from __future__ import annotations

import shutil

import pytest
from playwright.sync_api import expect

from tests.support.browser_page import ComfyPage
from tests.support.comfyui_server import PackServer
from tests.support.pairs_panel import open_short_path

from .conftest import OpenPage

pytestmark = pytest.mark.server

DOWNLOAD = "https://huggingface.co/Qwen/gone"
IN_VIEW = """title => {
    const { ds, canvas } = app.canvas, node = app.graph.nodes.find(each => each.title === title);
    const top = (node.pos[1] + ds.offset[1]) * ds.scale;
    return Object.values(app.canvas.selected_nodes).includes(node) && top > 0 && top < canvas.clientHeight / 2;
}"""


@pytest.mark.parametrize("renderer", ["classic", "nodes 2.0"])
def test_what_keeps_a_node_from_running_is_said_and_found(renderer: str, open_page: OpenPage):
    page = open_page(renderer)
    notice = page.page.locator(".qet-notice")
    page.open_every_setting()
    page.set_widgets("OptimizerSettings", lr_scheduler="cosine", lr_warmup_steps=800)
    page.run()
    said = "lr_warmup_steps must be less than max_train_steps (800) with lr_scheduler cosine"
    expect(notice).to_contain_text(said)
    assert notice.inner_text().count(said) == 1
    assert page.page.locator(".p-toast-message", has_text="lr_warmup_steps").count() == 0
    page.page.evaluate("() => { app.canvas.ds.offset[0] = 90000; }")
    notice.get_by_role("button", name="Go to node").click()
    assert page.page.evaluate(IN_VIEW, "Train Qwen Edit LoRA (advanced)")

    page.set_widgets("OptimizerSettings", lr_warmup_steps=10)
    page.set_widgets("LoadModel", base_model=f"{DOWNLOAD} https://elsewhere.example/")
    page.set_widgets("TrainLora", run_name="a/path")
    page.run()
    expect(notice.locator("b")).to_have_text(["Load Qwen Edit Model", "Train Qwen Edit LoRA (advanced)"])
    expect(notice.locator("p")).to_contain_text(
        [f"no base model '{DOWNLOAD} https://elsewhere.example/' in", "run_name can't be"]
    )
    links = notice.get_by_role("link")
    assert [link.get_attribute("href") for link in links.all()] == [DOWNLOAD]
    expect(notice.get_by_role("button", name="Go to node").first).to_be_focused()
    page.page.keyboard.press("Escape")
    expect(notice).to_have_count(0)

    queue = "app.graphToPrompt().then(prompt => app.api.queuePrompt(0, prompt)).catch(error => error)"
    page.page.evaluate("() => document.body.append(document.createElement('input'))")
    field = page.page.locator("body > input").last
    field.focus()
    page.page.evaluate(f"async () => String(await {queue})")
    expect(notice).to_be_visible()
    expect(field).to_be_focused()  # nobody is interrupted in typing
    notice.get_by_role("button", name="Close").press("Escape")
    expect(field).to_be_focused()

    alone = "() => { app.graph.clear(); app.graph.add(LiteGraph.createNode('QwenEdit_PlotLoss')); }"
    page.page.evaluate(alone)
    page.run()
    expect(notice.get_by_role("heading")).to_have_text("Stopped, because:")
    expect(notice.locator("p")).to_have_text("Plot Loss has no run and no loss_map. Connect one of them.")
    page.page.evaluate(alone.replace("PlotLoss", "TrainLora"))
    module = "import('/extensions/qwen-edit-trainer/trainer/refusals.js')"
    assert page.page.evaluate(f"async () => (await {module}).isInNotice(await {queue})")
    expect(notice.locator("b")).to_have_text("Train Qwen Edit LoRA (advanced)")
    expect(notice.locator("p")).to_contain_text(["The input encoded has no link. Draw one to it."])
    assert [each for each in page.problems if "/prompt" not in each or "400" not in each] == []
    page.problems.clear()  # browsers log the refusal

    detail = {"node_id": "qwen-edit-trial", "node_type": "QwenEdit_TryLora", "exception_message": "No such step."}
    page.page.evaluate(
        "detail => app.api.dispatchEvent(new CustomEvent('execution_error', { detail }))", {**detail, "traceback": []}
    )
    expect(notice.locator("b")).to_have_text("Try Qwen Edit LoRA")
    expect(notice.get_by_role("button", name="Go to node")).to_have_count(0)  # the panel has queued it
    if renderer == "classic":
        says_once_each_what_concerns_our_nodes(page)


def fault(kind: str, details: str, **extra: str) -> dict[str, object]:
    return {"type": kind, "message": "A message", "details": details, "extra_info": extra}


def says_once_each_what_concerns_our_nodes(page: ComfyPage):
    both = [fault("custom_validation_failed", f"{name} - Not there.", input_name=name) for name in ("target", "mask")]
    more = [fault("required_input_missing", "model", input_name="model"), fault("new_kind", "model")]
    listed = fault("value_not_in_list", "image: 'a.png' not in [...]", input_name="image", received_value="a.png")
    errors = {
        "1": {"class_type": "QwenEdit_PairFolders", "errors": [*both, *more], "dependent_outputs": []},
        "2:3": {"class_type": "LoadImage", "errors": [listed], "dependent_outputs": ["8", "9"]},
        "4": {"class_type": "LoadImage", "errors": [listed], "dependent_outputs": ["8"]},
    }
    prompt = {"8": {"class_type": "PreviewImage"}, "9": {"class_type": "QwenEdit_TrainLora"}}
    module = "import('/extensions/qwen-edit-trainer/trainer/refusals.js')"
    found = page.page.evaluate(f"async given => (await {module}).refused(...given)", [errors, prompt])
    assert [(each["id"], each["texts"]) for each in found] == [
        ("1", ["Not there.", "The input model has no link. Draw one to it.", "A message: model"]),
        ("2:3", ['image is "a.png", which is not one of its choices. It may be missing on this machine.']),
    ]
    assert page.page.evaluate(f"async () => (await {module}).refused(undefined)") == []


def test_a_run_that_fails_before_it_has_a_folder_leaves_no_trace(open_page: OpenPage, demo_server: PackServer):
    """The page shows it while it is queued. Asking for it later would be an error on the console."""
    for side in ("reference", "target"):
        (demo_server.input / "silent" / side).mkdir(parents=True)
        shutil.copy(demo_server.input / "demo" / side / "00_chelsea.png", demo_server.input / "silent" / side)
    page = open_page()
    open_short_path(page)
    page.set_widgets("EditPairs", data_set="silent")
    page.set_widgets("Train", run_name="never")
    page.open_panel()
    page.run()
    expect(page.page.locator(".qet-notice")).to_contain_text("1 pair without an instruction (00_chelsea).")
    expect(
        page.panel.get_by_role("heading", name="Runs", exact=True)
    ).to_be_visible()  # the list, and no longer the run
    page.page.wait_for_timeout(500)
