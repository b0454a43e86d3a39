"""Templates and the side panel without a training: complete, usable by keyboard, safe with untrusted texts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Route, expect

from tests.support.browser_page import ComfyPage
from tests.support.comfyui_server import PackServer
from tests.support.template_files import place_template_files
from tools.comfyui import REPO
from trainer_core.pictures.grid import GridRow
from trainer_core.pictures.sample_pictures import save_sample_pictures

from .conftest import OpenPage

pytestmark = pytest.mark.server

TEMPLATES = sorted(path.stem for path in (REPO / "workflows").glob("*.json"))
HOSTILE = "<img src=x onerror='window.hacked = true'><script>window.hacked = true</script>"


@pytest.mark.parametrize("renderer", ["classic", "nodes 2.0"])
def test_every_template_opens_with_nothing_missing(renderer: str, open_page: OpenPage, demo_server: PackServer):
    place_template_files(demo_server.base / "models")
    page = open_page(renderer)
    assert TEMPLATES
    for name in TEMPLATES:
        page.open_template(name)
        assert page.missing() == [], name
        if renderer != "classic":
            expect(page.page.locator("[data-node-id]").last).to_be_visible()
            assert page.without_label() == [], name
        assert page.overlaps() == [], name
        page.show_outputs("example.png")
        assert page.overlaps() == [], f"{name}, after a run"
        kinds = {node["type"] for node in json.loads((REPO / "workflows" / f"{name}.json").read_text())["nodes"]}
        assert set(page.page.evaluate("() => app.graph.nodes.map(n => n.type)")) == kinds


def test_before_the_start_the_node_says_what_run_will_do(open_page: OpenPage):
    page = open_page()
    page.open_every_setting()
    box = page.page.locator(".qet-before")
    page.set_widgets("EncodePairs", num_eval_images=1)
    page.set_widgets("TrainLora", run_name="not yet")
    page.page.evaluate("() => app.extensionManager.workflow.activeWorkflow.changeTracker.checkState()")
    expect(box).to_contain_text("5 pairs to train on, 1 held out.")
    expect(box.locator(".qet-before-head")).to_contain_text("Ready to run")
    page.set_widgets("TrainLora", run_name="a/b")
    page.set_widgets("PairFolders", target_folder="demo/reference", reference_folder_1="demo/target")
    page.page.evaluate("() => app.extensionManager.workflow.activeWorkflow.changeTracker.checkState()")
    expect(box.locator(".qet-before-head")).to_have_text("Not ready")
    problems = box.locator(".qet-before-problem")
    expect(problems.nth(0)).to_contain_text("Pair Edit Folders: The dataset has 1 problem")
    expect(problems.nth(0)).to_contain_text("Are the two folders swapped?")
    expect(problems.nth(1)).to_contain_text("run_name can't be 'a/b'")
    page.set_widgets("TrainLora", run_name="not yet")
    page.set_widgets("PairFolders", target_folder="demo/target", reference_folder_1="demo/reference")
    box.get_by_role("button", name="Check everything").click()
    note = "In 6 of 6 pairs, reference and target have too little in common to be aligned."
    expect(box.locator(".qet-before-fact").filter(has_text=note)).to_be_visible()
    expect(box.locator(".qet-before-head")).to_contain_text("Ready to run")

    first = page.page.evaluate("() => app.graph.nodes.find(node => node.comfyClass === 'QwenEdit_TrainLora').id")

    def fail_for_first(route: Route) -> None:
        fails = route.request.post_data_json["node_id"] == str(first)
        _ = route.fulfill(status=500, json={"error": "Broken."}) if fails else route.continue_()

    page.page.route("**/before_start", fail_for_first)
    page.page.evaluate("() => app.graph.add(LiteGraph.createNode('QwenEdit_Train'))")
    page.page.evaluate("() => app.extensionManager.workflow.activeWorkflow.changeTracker.checkState()")
    expect(box.locator(".qet-before-head").last).to_contain_text("Not ready")  # though asking about the first one fails
    assert all("before_start" in each for each in page.problems)
    page.problems.clear()


def test_a_picture_is_uploaded_for_a_trial(open_page: OpenPage, demo_server: PackServer, tmp_path: Path):
    picture = tmp_path / "of mine.png"
    Image.new("RGB", (64, 48), "teal").save(picture)
    page = open_page("nodes 2.0")
    page.page.evaluate("() => { app.graph.clear(); app.graph.add(LiteGraph.createNode('QwenEdit_TryLora')); }")
    assert page.widgets("TryLora")["picture"] == "held-out pair"
    with page.page.expect_file_chooser() as chooser:
        page.page.get_by_role("button", name="Upload a picture…").click()
    chooser.value.set_files(picture)
    page.page.wait_for_function(
        "name => app.graph.nodes[0].widgets.find(each => each.name === 'picture').value === name", arg=picture.name
    )
    assert (demo_server.input / picture.name).read_bytes() == picture.read_bytes()


@pytest.fixture(scope="module")
def told(runs_dir: Path) -> str:
    """Name of a paused run (40 of 60 steps, samples at 10, 20 and 30) whose texts contain hostile HTML."""
    folder = runs_dir / "from a stranger"
    rows = [{"step": step, "num_steps": 60, "loss": 1 / step, "learning_rate": 1e-4} for step in range(1, 41)]
    for row in rows[9::10]:
        row |= {"validation_loss": row["loss"] + 0.02, "drift_shift": 0.25}
    (folder / "samples").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"key": {}, "state": "paused", "steps": 40}))
    settings = {"max_train_steps": 60, "seed": 77, "lora": {"lora_rank": 48}, "optimizer": {"optimizer": HOSTILE}}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step in (10, 20, 30):
        pictures = [Image.new("RGB", (64, 48), (step * 8, shade, 90)) for shade in (0, 80, 160, 240)]
        row = GridRow((pictures[0],), pictures[1], pictures[2], pictures[3], HOSTILE)
        save_sample_pictures([row], folder / "samples" / f"step-{step:06d}")
    return folder.name


def test_by_keyboard_and_with_hostile_texts(told: str, open_page: OpenPage):
    page = open_page()
    page.open_panel()
    run = page.panel.locator(".qet-run", has=page.page.get_by_text(told, exact=True))
    run.focus()
    page.page.keyboard.press("Enter")
    expect(page.panel.get_by_role("heading", name=told)).to_be_focused()
    expect(page.panel.locator(".qet-caption")).to_have_text(HOSTILE)
    expect(page.panel.locator(".qet-legend")).to_contain_text("validation 0.04500")
    expect(page.panel.locator(".qet-legend")).not_to_contain_text("drift")
    page.panel.get_by_label("Show drift in the chart").focus()
    page.page.keyboard.press("Space")
    expect(page.panel.locator(".qet-legend")).to_contain_text("drift, pixels 0.2500")
    page.panel.locator("summary").focus()
    page.page.keyboard.press("Enter")
    expect(page.panel.locator(".qet-settings")).to_contain_text(HOSTILE)
    assert page.page.evaluate("() => window.hacked") is None

    page.panel.get_by_role("slider", name="Step").focus()
    page.page.keyboard.press("ArrowLeft")
    expect(page.panel.get_by_text("LoRA, step 20")).to_be_visible()
    divider = page.panel.get_by_role("slider", name="shows base")
    divider.focus()
    page.page.keyboard.press("Home")
    assert (
        page.page.evaluate("() => document.querySelector('.qet-stack').style.getPropertyValue('--qet-divide')") == "0%"
    )
    page.panel.get_by_role("combobox", name="Compare with").select_option("target")
    expect(page.panel.locator(".qet-stack .qet-left")).to_have_text("target")
    widths = "() => [...document.querySelectorAll('.qet-stack img')].map(picture => picture.naturalWidth)"
    page.page.wait_for_function(f"() => ({widths})().every(width => width === 64)")
    tall = "canvas => { [canvas.width, canvas.height] = [2, 64]; return canvas.toDataURL(); }"
    page.page.evaluate(f"document.querySelector('.qet-stack img').src = ({tall})(document.createElement('canvas'))")
    picture = "const picture = document.querySelector('.qet-stack img')"
    page.page.wait_for_function(
        f"() => {{ {picture}; return picture.naturalHeight === 64 && picture.offsetHeight <= 1200; }}"
    )

    page.panel.get_by_role("button", name="All runs").focus()
    page.page.keyboard.press("Enter")
    expect(run).to_be_focused()


@pytest.mark.parametrize("renderer", ["classic", "nodes 2.0"])
def test_values_at_a_step_by_keyboard(renderer: str, told: str, open_page: OpenPage):
    page = open_page(renderer)
    page.open_every_setting()
    page.set_widgets("TrainLora", run_name=told)
    page.open_panel(told)
    page.wait_for_points(page.panel, 40)
    page.wait_for_points(page.node_view, 40)
    for place in (page.panel, page.node_view):
        plot = place.get_by_role("slider", name="Loss curve")
        plot.focus()
        expect(plot).to_have_attribute("aria-valuenow", "40")
        for key, step in (("ArrowLeft", 39), ("PageDown", 29), ("Home", 1), ("ArrowDown", 1), ("ArrowRight", 2)):
            page.page.keyboard.press(key)
            expect(plot).to_have_attribute("aria-valuenow", str(step))
        expect(plot).to_have_attribute("aria-valuetext", re.compile("step 2: loss 0.5000"))
        expect(place.locator(".qet-legend")).to_contain_text("step 2loss 0.5000")
        plot.blur()
        expect(place.locator(".qet-legend")).to_contain_text("loss 0.02500")


def test_one_panel_at_a_time(open_page: OpenPage):
    page = open_page()
    for tab, of_pairs in (("pairs", 1), ("trainer", 0), ("pairs", 1)):
        page.tab_button(f"qwen-edit-{tab}").click()
        expect(page.page.locator(".qet-pairs")).to_have_count(of_pairs)
        expect(page.panel).to_have_count(1)


def test_a_click_on_the_chart_holds_no_step(told: str, open_page: OpenPage):
    page = open_page()
    page.open_panel(told)
    page.wait_for_points(page.panel, 40)
    page.panel.locator(".qet-plot").click()
    expect(page.panel.locator(".qet-legend")).to_contain_text("step")
    page.page.mouse.move(1200, 500)
    expect(page.panel.locator(".qet-legend")).not_to_contain_text("step")


def test_pictures_on_the_node_are_no_switches(told: str, open_page: OpenPage):
    page = open_page()
    page.open_every_setting()
    page.set_widgets("TrainLora", run_name=told)
    page.open_panel(told)
    expect(page.panel.locator(".qet-thumb[aria-pressed='true']")).to_have_count(1)
    expect(page.node_view.get_by_role("button", name="Step 20")).to_be_visible()
    expect(page.node_view.locator(".qet-thumb[aria-pressed]")).to_have_count(0)


def test_settings_go_into_an_empty_graph(told: str, open_page: OpenPage):
    page = open_page()
    page.page.evaluate("() => app.graph.clear()")
    page.open_panel(told)
    page.panel.get_by_role("button", name="Settings into graph").click()
    page.page.wait_for_function("() => app.graph.nodes.length >= 2")
    train, lora = page.widgets("TrainLora"), page.widgets("LoraSettings")
    assert (train["seed"], train["max_train_steps"], lora["lora_rank"]) == (77, 60, 48)
    trains = "app.graph.nodes.filter(node => node.comfyClass === 'QwenEdit_TrainLora')"
    link = f"() => {trains}[0].inputs.find(input => input.name === 'lora_settings').link"
    assert page.page.evaluate(link) is not None


def test_settings_are_copied_on_a_page_without_https(told: str, open_page: OpenPage):
    page = open_page()
    page.open_panel(told)
    page.page.evaluate("() => Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    page.page.evaluate("() => { document.execCommand = () => false; }")
    button = page.panel.get_by_role("button", name="Copy as JSON")
    button.click()
    page.page.get_by_text("The browser blocked access to the clipboard").wait_for()
    page.page.evaluate(
        "() => document.addEventListener('copy', () => { window.copied = document.activeElement.value; })"
    )
    page.page.evaluate("() => { delete document.execCommand; }")
    button.click()
    page.page.get_by_text("copied to the clipboard").wait_for()
    assert json.loads(page.page.evaluate("() => window.copied"))["lora"] == {"lora_rank": 48}
    expect(button).to_be_focused()


def test_of_a_run_that_validates_its_average_alone_there_is_a_curve(runs_dir: Path, open_page: OpenPage):
    folder = runs_dir / "average alone"
    folder.mkdir(parents=True)
    rows = [{"step": step, "num_steps": 60, "loss": 1 / step, "learning_rate": 1e-4} for step in range(1, 41)]
    for row in rows[9::10]:
        row["ema_validation_loss"] = 0.125
    (folder / "run.json").write_text(json.dumps({"key": {}, "state": "paused", "steps": 40}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = open_page()
    page.open_panel(folder.name)
    page.wait_for_points(page.panel, 40)
    assert page.points(page.panel, "qet-line-held") == 4
    expect(page.panel.locator(".qet-legend")).to_contain_text("validation, EMA 0.1250")
    live = "import('/extensions/qwen-edit-trainer/trainer/store.js').then(store => store.extended(empty, points))"
    empty, points = {"steps": [], "loss": [], "learning_rate": [], "measured": {}}, [{**rows[9], "psnr": 3}]
    found = page.page.evaluate(f"([empty, points]) => {live}", [empty, points])
    assert found["measured"] == {"ema_validation_loss": [[10, 0.125]]}


NO_ANSWER = {"status": 200, "content_type": "application/json", "body": "no JSON"}  # the console logs error statuses


@contextmanager
def without_answers(page: ComfyPage, address: str) -> Iterator[None]:
    """The page gets no usable answer from this address until the block ends."""
    page.page.route(address, lambda route: route.fulfill(**NO_ANSWER))
    yield
    page.page.unroute(address)


def test_a_run_that_could_not_be_loaded_is_asked_for_again(told: str, open_page: OpenPage):
    page = open_page()
    with without_answers(page, "**/qwen_edit_trainer/runs/*/curve*"):
        page.open_panel(told)
        expect(page.panel.get_by_role("alert")).to_contain_text("Retrying")
    page.wait_for_points(page.panel, 40)
    expect(page.panel.get_by_role("alert")).to_be_hidden()
    expect(page.panel.locator(".qet-stack")).to_be_visible()


def test_a_run_on_the_node_is_asked_for_again(told: str, open_page: OpenPage):
    page = open_page()
    page.page.route("**/qwen_edit_trainer/runs/*/curve*", lambda route: route.fulfill(**NO_ANSWER), times=1)
    page.open_every_setting()
    page.set_widgets("TrainLora", run_name=told)
    page.wait_for_points(page.node_view, 40)


def test_a_list_of_runs_that_did_not_come(told: str, open_page: OpenPage):
    page = open_page()
    with without_answers(page, "**/qwen_edit_trainer/runs"):
        page.open_panel()
        expect(page.panel.get_by_role("alert")).to_contain_text("Retrying")
    expect(page.panel.get_by_role("alert")).to_be_hidden()
    expect(page.panel.get_by_text(told, exact=True)).to_be_visible()


def test_settings_that_did_not_come_are_asked_for_again(told: str, open_page: OpenPage):
    page = open_page()
    page.page.route("**/qwen_edit_trainer/runs/*/settings", lambda route: route.fulfill(**NO_ANSWER), times=1)
    page.open_panel(told)
    page.panel.locator("summary").click()
    page.page.get_by_text("not valid JSON").wait_for()
    expect(page.panel.locator("details")).not_to_have_attribute("open", "")
    page.panel.locator("summary").click()
    expect(page.panel.locator(".qet-settings")).to_contain_text("lora_rank")


def test_a_chart_of_one_value_and_its_mean_ends(open_page: OpenPage):
    """Computing range and ticks must end even if a value and its mean differ only by a rounding error."""
    found = open_page().page.evaluate(
        """async () => {
            const data = await import("/extensions/qwen-edit-trainer/trainer/chart_data.js");
            const spans = [[0.21, 0.21 + 2 ** -55], [0.1 + 0.2, 0.3], [0, 0], [5, 5], [1e-9, 3e-9], [0.2, 0.9]];
            return spans.map(([value, mean]) => {
                const [low, high] = data.range([value], [mean]);
                return { low, high, value, ticks: data.ticks(low, high, 4), near: data.ticks(value, mean, 4) };
            });
        }"""
    )
    for each in found:
        assert each["low"] < each["high"]
        assert each["low"] <= each["value"] <= each["high"]
        assert 1 <= len(each["ticks"]) <= 12
        assert 1 <= len(each["near"]) <= 12
