"""The side panel Edit pairs: from dropped pictures to pairs on the disk, with the mouse and with the keyboard."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import CDPSession, FileChooser, Locator, Request, Route, expect

from tests.support.browser_page import ComfyPage
from tests.support.comfyui_server import PackServer
from tests.support.pairs_panel import Panel, open_short_path

from .conftest import OpenPage

pytestmark = pytest.mark.server

HOSTILE = "<img src=x onerror=window.hacked=true>"


@pytest.mark.parametrize(("renderer", "palette"), [("classic", "dark"), ("nodes 2.0", "light")])
def test_from_dropped_pictures_to_pairs(
    renderer: str, palette: str, open_page: OpenPage, demo_server: PackServer, sources: Path
):
    shutil.rmtree(demo_server.input / "my edit", ignore_errors=True)
    page = open_page(renderer, palette)
    panel = Panel(page, demo_server.input / "my edit")
    open_short_path(page)
    page.press_node_button("EditPairs", "Edit pairs…")
    expect(panel.state).to_contain_text("Choose one, or drop pictures to make a new one.")
    page.drop(panel.zone("reference"), *sorted((sources / "reference").iterdir()))
    expect(panel.state).to_have_text("6 before, none after. Next: Drop their partners into After.")
    page.drop(panel.zone("target"), *sorted((sources / "target").iterdir()))
    expect(panel.state).to_have_text("6 pairs, ready. Next: Press Run.")
    assert page.widgets("EditPairs")["data_set"] == "my edit"
    expect(page.page.locator("[data-node-id] .p-invalid")).to_have_count(0)
    assert len(page.page.evaluate("() => app.graph.nodes")) == 3  # ComfyUI has not opened a picture as a graph
    first, second, third, *_ = sorted(path.stem for path in (sources / "target").glob("*.png"))
    expect(panel.row(second).get_by_role("textbox")).to_have_value("edit 1")  # captions came with the pictures
    given = {path.relative_to(sources).as_posix(): path.read_bytes() for path in sources.glob("*/*")}
    assert panel.files() == given

    shown = panel.row(first).locator("img").first.get_attribute("src")
    panel.row(first).get_by_role("button", name="Swap").click()
    expect(panel.row(first).locator("img").first).not_to_have_attribute("src", str(shown))
    swapped = panel.files()
    assert swapped[f"reference/{first}.png"] == given[f"target/{first}.png"]
    assert swapped[f"target/{first}.png"] == given[f"reference/{first}.png"]
    panel.row(first).get_by_role("button", name="Swap").click()
    expect(panel.row(first).locator("img").first).to_have_attribute("src", str(shown))
    panel.row(third).get_by_role("button", name="Hold out").click()
    expect(panel.row(third).get_by_text("held out", exact=True)).to_be_visible()
    assert panel.files() == {**given, "held_out.txt": f"{third}\n".encode()}
    expect(page.page.locator(".qet-before")).to_contain_text("5 pairs to train on, 1 held out.")

    for reference in (second, first):  # a wrong partner, and the right one again
        shown = panel.row(first).locator("img").first.get_attribute("src")
        panel.row(first).get_by_role("button", name="Choose another…").click()
        panel.row(first).get_by_title(f"{second}.png, which is in a pair").click()
        expect(panel.row(first).locator("img").first).not_to_have_attribute("src", str(shown))
        crossed = panel.files()
        assert crossed[f"reference/{first}.png"] == given[f"reference/{reference}.png"]
    assert crossed == {**given, "held_out.txt": f"{third}\n".encode()}

    panel.row(second).get_by_role("button", name="Delete").click()
    expect(panel.row(second)).to_have_count(0)
    assert not any(second in name for name in panel.files())
    panel.button("Undo").click()
    expect(panel.row(second)).to_be_visible()
    assert panel.files() == {**given, "held_out.txt": f"{third}\n".encode()}

    panel.root.get_by_label("One instruction for all pairs").check()
    panel.instruction.fill("make it a drawing")
    page.page.keyboard.press("Tab")
    expect(panel.root.get_by_text("✓ Saved")).to_be_visible()
    assert {panel.files()[name] for name in given if name.endswith(".txt")} == {b"make it a drawing\n"}
    panel.button("Undo").click()  # it replaced six captions
    expect(panel.root.get_by_text("The pairs have 6 different instructions")).to_be_visible()
    assert panel.files() == {**given, "held_out.txt": f"{third}\n".encode()}
    page.picture(f"edit pairs {renderer}")


def press(page: ComfyPage, *keys: str) -> None:
    for key in keys:
        page.page.keyboard.press(key)


def tab_to(page: ComfyPage, wanted: Locator, key: str = "Tab") -> None:
    """Press a key until an element has the focus."""
    for _ in range(60):
        if wanted.evaluate("element => element === document.activeElement"):
            return
        page.page.keyboard.press(key)
    raise AssertionError(f"{key} does not lead to {wanted}")


def lay_out_alike(folder: Path, sources: Path) -> None:
    """Four photos, and their grey copies under other names and in another order, with one picture more."""
    names = sorted(path.stem for path in (sources / "target").glob("*.png"))[:4]
    for side in ("reference", "target"):
        (folder / side).mkdir(parents=True)
    for number, name in enumerate(names):
        with Image.open(sources / "reference" / f"{name}.png") as picture:
            picture.save(folder / "reference" / f"photo {number}.png")
            picture.convert("L").save(folder / "target" / f"drawing {9 - number}.png")
    Image.linear_gradient("L").save(folder / "target" / "drawing x.png")


def listen_to_choosers(page: ComfyPage) -> list[FileChooser]:
    """The file choosers that open from now on. Chromium needs a while until it tells of them, so call this early."""
    choosers: list[FileChooser] = []

    def note(chooser: FileChooser) -> None:
        choosers.append(chooser)

    page.page.on("filechooser", note)
    return choosers


def grey(path: Path) -> bytes:
    with Image.open(path) as picture:
        return picture.convert("L").tobytes()


def accept_suggestions(page: ComfyPage, panel: Panel) -> None:
    """By keyboard: accept the first, look at the choice of another partner, and accept the rest at once."""
    accept = panel.button("Accept")
    expect(accept).to_have_count(4)
    tab_to(page, accept.first)
    press(page, "Enter")
    expect(accept).to_have_count(3)
    expect(accept.first).to_be_focused()  # the next row's
    press(page, "ArrowDown", "Tab", "Enter")  # "Choose another" of the next but one
    expect(panel.root.get_by_role("group", name="Which picture is it after the edit?")).to_be_visible()
    choices = panel.root.locator(".qet-choice")
    expect(choices.first).to_be_focused()
    expect(choices).to_have_count(5)  # of the pair too
    press(page, "Escape")
    expect(choices).to_have_count(0)
    tab_to(page, panel.button("Accept all"), "Shift+Tab")
    press(page, "Enter")
    expect(panel.state).to_contain_text("4 pairs, 1 picture without a partner.")


def test_pairs_that_look_alike_by_keyboard(open_page: OpenPage, demo_server: PackServer, sources: Path):
    folder = demo_server.input / "alike"
    lay_out_alike(folder, sources)
    page = open_page()
    panel = Panel(page, folder)
    choosers = listen_to_choosers(page)
    page.tab_button("qwen-edit-pairs").focus()
    press(page, "Enter")
    choice = panel.root.get_by_role("combobox", name="Data set")
    expect(choice).to_be_visible()
    tab_to(page, choice)
    page.page.keyboard.type("alike")
    expect(panel.state).to_have_text(
        "0 pairs, 4 more look alike. Next: Accept the suggestions, or choose other partners."
    )
    accept_suggestions(page, panel)
    delete = panel.root.locator("[data-do=delete]:visible").first
    tab_to(page, delete)
    with page.page.expect_response("**/restore"):
        press(page, "Delete", "Delete", "Control+z")  # a second press before the first is done has no effect
    expect(panel.state).to_contain_text("4 pairs, 1 picture without a partner.")
    expect(panel.button("Undo")).to_be_hidden()
    tab_to(page, delete, "Shift+Tab")
    press(page, "Delete")
    expect(panel.state).to_have_text("4 pairs. Next: Write the instruction.")
    tab_to(page, panel.instruction, "Shift+Tab")
    page.page.keyboard.type("draw it")
    press(page, "Enter")
    expect(panel.root.get_by_text("✓ Saved")).to_be_visible()
    expect(panel.state).to_have_text("4 pairs, ready. Next: Use them in a graph.")
    page.page.evaluate("() => app.graph.clear()")
    tab_to(page, panel.button("Add a node with these pairs"), "Shift+Tab")
    press(page, "Enter")
    expect(panel.state).to_have_text("4 pairs, ready. Next: Press Run.")
    assert page.widgets("EditPairs")["data_set"] == "alike"
    noted = "app.extensionManager.workflow.activeWorkflow.changeTracker.activeState.nodes.map(node => node.type)"
    assert page.page.evaluate(noted) == ["QwenEdit_EditPairs"]
    assert panel.files()["target/drawing 9.txt"] == b"draw it\n"
    pairs = sorted(name for name in panel.files() if name.endswith(".png"))
    assert pairs == sorted(f"{side}/drawing {9 - n}.png" for side in ("reference", "target") for n in range(4))
    for number in range(4):  # each photo has the name of its own drawing
        name = f"drawing {9 - number}.png"
        assert grey(folder / "reference" / name) == grey(folder / "target" / name)
    tab_to(page, panel.button("Before: Choose…"), "Shift+Tab")
    press(page, "Enter")
    while not choosers:
        page.page.wait_for_timeout(20)
    choosers[0].set_files(next((sources / "reference").iterdir()))
    expect(panel.state).to_contain_text("4 pairs, 1 picture without a partner.")


def test_swap_all_mends_folders_with_the_captions_on_the_wrong_side(
    open_page: OpenPage, demo_server: PackServer, sources: Path
):
    folder = demo_server.input / "turned"
    for side, other in (("reference", "target"), ("target", "reference")):
        shutil.copytree(sources / side, folder / other)
    page = open_page()
    panel = Panel(page, folder)
    page.tab_button("qwen-edit-pairs").click()
    panel.root.get_by_role("combobox", name="Data set").select_option("turned")
    expect(panel.state).to_have_text(
        "6 pairs. Next: If before and after are swapped, press Swap all. If not, write the instruction."
    )
    panel.button("Swap all").click()
    expect(panel.state).to_have_text("6 pairs, ready. Next: Use them in a graph.")
    assert panel.files() == {path.relative_to(sources).as_posix(): path.read_bytes() for path in sources.glob("*/*")}


def busy_seconds(session: CDPSession) -> float:
    """How long the page's main thread has computed."""
    metrics = session.send("Performance.getMetrics")["metrics"]
    return next(each["value"] for each in metrics if each["name"] == "TaskDuration")


def test_500_pairs_stay_fluid(open_page: OpenPage, demo_server: PackServer, sources: Path):
    folder, count = demo_server.input / "many", 500
    picture = next((sources / "target").glob("*.png")).read_bytes()
    for side in ("reference", "target"):
        (folder / side).mkdir(parents=True)
        for number in range(count):
            (folder / side / f"{number:03}.png").write_bytes(picture)
    page = open_page()
    panel = Panel(page, folder)
    asked: list[str] = []

    def note(request: Request) -> None:
        if "/pictures/" in request.url:
            asked.append(request.url)

    page.page.on("request", note)
    page.tab_button("qwen-edit-pairs").click()
    panel.root.get_by_role("combobox", name="Data set").select_option("many")
    expect(panel.state).to_have_text(f"{count} pairs. Next: Write the instruction.")
    expect(panel.row("000").locator("img").last).to_have_js_property("naturalWidth", 128)
    assert 0 < len(asked) < 100  # thumbnails are read when they come near

    page.page.evaluate(
        """() => {
            window.changes = 0;
            const count = records => { window.changes += records.length; };
            const list = document.querySelector(".qet-pairs .qet-pairs-list:has(> [aria-label='499'])");
            new MutationObserver(count).observe(list, { childList: true, subtree: true, attributes: true });
        }"""
    )
    panel.row("001").get_by_role("button", name="Hold out").click()
    expect(panel.row("001").get_by_text("held out", exact=True)).to_be_visible()
    assert page.page.evaluate("() => window.changes") < 10  # one row has changed, not 500

    panel.row("000").hover()
    session = page.page.context.new_cdp_session(page.page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})  # the page's own time, on a busy machine too
    before = busy_seconds(session)
    frames = page.page.evaluate_handle(
        """() => {
            const times = [];
            const note = time => { times.push(time); requestAnimationFrame(note); };
            requestAnimationFrame(note);
            return times;
        }"""
    )
    for _ in range(20):
        page.page.mouse.wheel(0, 1500)
        page.page.wait_for_timeout(30)
    assert (busy_seconds(session) - before) / page.page.evaluate("times => times.length", frames) < 0.05  # of a frame
    session.detach()
    panel.row("499").scroll_into_view_if_needed()
    expect(panel.row("499").locator("img").last).to_have_js_property("naturalWidth", 128)
    assert len(asked) < 2 * count
    page.page.remove_listener("request", note)


def test_hostile_names_and_captions_are_text(open_page: OpenPage, demo_server: PackServer, sources: Path):
    folder = demo_server.input / HOSTILE
    key = f"{HOSTILE}&amp;"
    for side in ("reference", "target"):
        (folder / side).mkdir(parents=True)
        shutil.copy(next((sources / side).glob("*.png")), folder / side / f"{key}.png")
    shutil.copy(next((sources / "target").glob("*.png")), folder / "target" / f"{HOSTILE} alone.png")
    caption = f"{HOSTILE} “$&” </textarea><script>window.hacked = true</script>"
    (folder / "target" / f"{key}.txt").write_text(caption)
    page = open_page("nodes 2.0", "light")
    panel = Panel(page, folder)
    page.tab_button("qwen-edit-pairs").click()
    panel.root.get_by_role("combobox", name="Data set").select_option(HOSTILE)
    expect(panel.instruction).to_have_value(caption)
    expect(panel.row(key).locator("img").last).to_have_js_property("naturalWidth", 128)
    panel.root.get_by_label("One for each pair").check()
    own = panel.row(key).get_by_role("textbox")
    own.press_sequentially("!")
    own.blur()
    expect(panel.row(key).get_by_text("✓ Saved")).to_be_visible()
    assert panel.files()[f"target/{key}.txt"].decode() == f"{caption}!\n"
    panel.button("Check").click()
    expect(panel.button("Check")).to_have_attribute("aria-busy", "false")
    panel.row(key).get_by_title("Look at it large").click()
    large = page.page.get_by_role("dialog", name="Pair")
    expect(large.get_by_role("heading", name=key)).to_be_visible()
    expect(large.get_by_text(f"{caption}!")).to_be_visible()
    press(page, "Escape")
    expect(panel.row(key).get_by_title("Look at it large")).to_be_focused()
    panel.row(f"{HOSTILE} alone.png").get_by_role("button", name="Delete").click()
    expect(panel.root.get_by_text(f"“{HOSTILE} alone.png” is in the trash.")).to_be_visible()

    broken = sources.parent / f"{HOSTILE}.png"
    broken.write_bytes(b"no picture")
    other = sources.parent / "notes.md"
    other.write_text("no picture")
    page.drop(panel.zone("target"), broken, other)
    problems = panel.root.get_by_role("alert", name="Problems of files")
    expect(problems.get_by_role("listitem")).to_have_count(2)
    expect(problems).to_contain_text(HOSTILE.replace("<", "_").replace(">", "_"))
    panel.button("Clear").click()
    expect(problems).to_be_hidden()
    assert page.page.evaluate("() => window.hacked") is None

    def without_uploads(route: Route) -> None:
        answer = route.fetch()
        route.fulfill(response=answer, json={**answer.json(), "uploads": False})

    page.page.route("**/qwen_edit_trainer/data_sets", without_uploads)
    page.reopen_pairs()
    expect(panel.root.get_by_text("Changes to data sets are turned off on this server.")).to_be_visible()
    expect(own).not_to_be_editable()
    expect(panel.zone("target")).to_be_hidden()
    for name in ("Swap", "Hold out", "Delete", "New…"):
        expect(panel.button(name)).to_have_count(0)
