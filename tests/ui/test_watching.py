"""A demo training must be shown on the node, in the side panel, after a reload and in a second browser."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Locator, expect

from tests.support.browser_page import ComfyPage
from tests.support.comfyui_server import PackServer
from tests.support.pairs_panel import open_short_path

from .conftest import OpenPage

pytestmark = pytest.mark.server


def small_demo(page: ComfyPage, run_name: str) -> None:
    """Open a graph on the demo model and set its training to run until it is stopped."""
    page.open_every_setting()
    assert page.missing() == []
    page.set_widgets("EncodePairs", num_eval_images=2)
    page.set_widgets("TrainingSettings", train_batch_size=1)
    page.set_widgets("OptimizerSettings", lr_scheduler="constant_with_warmup")
    page.set_widgets(
        "ValidationSettings", validation_step_interval=8, validation_num_inference_steps=4, num_validation_images=2
    )
    page.set_widgets("TrainLora", run_name=run_name, max_train_steps=100_000)
    page.set_widgets("SampleEdit", num_inference_steps=1)


@pytest.mark.parametrize(("renderer", "palette"), [("classic", "dark"), ("nodes 2.0", "light")])
def test_a_training(renderer: str, palette: str, open_page: OpenPage, demo_server: PackServer):
    name = f"watched in {renderer}"
    page = open_page(renderer, palette)
    small_demo(page, name)
    expect(page.node_view).to_contain_text("curve and pictures appear here")
    height = view_height(page)
    page.open_panel()
    page.run()
    expect(page.panel.get_by_role("heading", name=name)).to_be_visible()  # a new run is selected
    expect(page.panel.get_by_role("button", name="Open graph")).to_be_visible()

    page.wait_for_points(page.node_view, 10)
    expect(page.node_view.get_by_role("status")).to_have_text("training")  # the only text that screen readers announce
    expect(page.node_view.locator(".qet-quiet")).to_contain_text("of 100000")
    expect(page.node_view.locator(".qet-quiet")).to_contain_text("left")
    expect(page.node_view.locator(".qet-thumb").nth(2)).to_be_visible()  # base, step 8, target and any later steps
    assert 200 < view_height(page) <= height  # it has its room from the start, and keeps off the node below

    comparison = page.panel.locator(".qet-compare")
    expect(comparison.get_by_text("LoRA, step")).to_be_visible()
    page.wait_for_points(page.panel, 10)
    assert page.points(page.panel, "qet-line-held") >= 1
    page.picture(f"panel {renderer}")

    pages = [page]
    if renderer == "classic":  # the panel is the same in both renderers
        pages.append(open_page(renderer, palette))  # a new browser that has received no live messages
        pages[-1].open_panel(name)
        pages[-1].wait_for_points(pages[-1].panel, page.points(page.panel))

    seen = page.points(page.panel)
    page.load()  # reload while the training runs
    page.open_panel(name)
    page.wait_for_points(page.panel, seen)
    small_demo(page, name)
    page.wait_for_points(page.node_view, seen)
    page.wait_for_points(page.node_view, page.points(page.node_view) + 3)  # new points still arrive
    page.picture(f"node {renderer}")

    assert name not in loras(page)
    page.panel.get_by_role("button", name="Stop and keep").click()
    for each in pages:
        expect(each.panel.locator(".qet-badge:visible")).to_have_text("ended early")
    page.page.wait_for_function(
        "name => app.graph.nodes.some(n => n.widgets?.some(w => w.name === 'lora_name' && "
        "(w.options.values ?? []).some(value => String(value).startsWith(name))))",
        arg=name,
    )
    assert name in loras(page)
    if renderer == "classic":
        ends_and_is_tried(page, name)
        goes_on(page)
    assert [run["state"] for run in demo_server.get("/qwen_edit_trainer/runs")["runs"] if run["run_name"] == name] == [
        "kept"
    ]


def test_a_new_name_is_shown(open_page: OpenPage):
    """A second run with other settings gets a number: the panel and the node show it, also when it has ended."""
    page = open_page()
    open_short_path(page)
    page.set_widgets("EditPairs", data_set="demo")
    page.set_widgets("Train", run_name="again", max_train_steps=2)
    page.open_panel()
    page.run()
    expect(page.node_view.locator(".qet-badge")).to_have_text("finished")
    expect(page.panel.get_by_role("heading", name="again", exact=True)).to_be_visible()
    page.set_widgets("Train", max_train_steps=3)
    page.run()
    expect(page.panel.get_by_role("heading", name="again-2", exact=True)).to_be_visible()
    expect(page.panel.locator(".qet-badge:visible")).to_have_text("finished")
    expect(page.node_view).to_contain_text("step 3 of 3")
    page.set_widgets("Train", max_train_steps=2)
    page.run()
    expect(page.node_view).to_contain_text("step 2 of 2")  # the first run again, which has nothing left to do
    page.panel.locator(".qet-back").click()
    expect(page.panel.locator(".qet-run", has_text="again")).to_have_text(
        [re.compile("again-2.*finished"), re.compile("again.*finished")]
    )


def view_height(page: ComfyPage) -> float:
    """Height of the view on the training node in pixels of the graph."""
    return page.node_view.evaluate("view => view.offsetHeight")


def ends_and_is_tried(page: ComfyPage, name: str):
    """At the end of a run: the panel names the LoRA, draws with it at two strengths, and saves that of a step."""
    ending = page.panel.locator(".qet-ending")
    expect(ending).to_contain_text("Ended early at step")
    expect(ending).to_contain_text(f"{name}.safetensors")
    expect(ending).to_contain_text("Total time: ")
    ending.get_by_role("button", name="Try it").click()
    tried = page.panel.get_by_role("region", name="Try the LoRA")
    expect(tried.get_by_text("LoRA at strength 1.00")).to_be_visible()
    page.picture(f"tried {name}")
    tried.get_by_role("slider").press("Home")  # strength 0 is the base model
    expect(tried.get_by_text("LoRA at strength 0.00")).to_be_visible()
    base, lora = (tried.locator("figure", has=page.page.get_by_text(text)) for text in ("base model", "LoRA at"))
    assert pixels(base) == pixels(lora)
    page.panel.get_by_role("button", name="Save this step's LoRA").click()
    page.page.wait_for_function(
        "name => app.graph.nodes.some(n => n.widgets?.some(w => w.name === 'lora_name' && "
        "(w.options.values ?? []).some(value => String(value).includes(`${name}-step-`))))",
        arg=name,
    )


def pixels(figure: Locator) -> str:
    """The pixels of the picture in a figure."""
    return figure.locator("img").evaluate(
        "async image => { await image.decode(); const canvas = document.createElement('canvas');"
        "[canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];"
        "canvas.getContext('2d').drawImage(image, 0, 0); return canvas.toDataURL(); }"
    )


def goes_on(page: ComfyPage):
    """From the panel: open a stopped run's graph, continue the run and stop it again."""
    page.page.evaluate("() => app.graph.clear()")
    page.panel.get_by_role("button", name="Open graph").click()
    page.page.wait_for_function("() => app.graph.nodes.some(node => node.comfyClass === 'QwenEdit_TrainLora')")
    badge, steps = page.panel.locator(".qet-badge:visible"), page.points(page.panel)
    page.panel.get_by_role("button", name="Continue").click()
    expect(badge).to_have_text("training")
    page.wait_for_points(page.panel, steps + 1)
    page.panel.get_by_role("button", name="Stop and keep").click()
    expect(badge).to_have_text("ended early")


def loras(page: ComfyPage) -> str:
    """JSON of the options that the graph's `lora_name` widget offers."""
    return page.page.evaluate(
        "() => JSON.stringify("
        "app.graph.nodes.flatMap(n => n.widgets ?? []).find(w => w.name === 'lora_name').options.values)"
    )
