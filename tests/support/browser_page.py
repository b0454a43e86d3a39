"""ComfyUI's page in headless Chromium: user actions, and the errors on its console."""

from __future__ import annotations

import json
import mimetypes
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import Browser, ConsoleMessage, Error, Locator, Page, Route, expect

from tests.support.comfyui_server import PackServer

ARGUMENTS = [
    "--headless",
    "--no-sandbox",  # needed in containers, where the tests may run as root
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-features=LocalNetworkAccessChecks",  # a page that a test answers itself may open the server's websocket
]
PATIENCE = 300_000.0  # milliseconds after which something hangs; a busy machine takes long for the rest
expect.set_options(timeout=PATIENCE)
# Console errors of ComfyUI's own page on a new base folder, also without this pack. Each line is "address text".
HARMLESS = (
    r"/user\.css .*404",
    r"/userdata/user\.css .*404",
    r"/userdata\?dir=(workflows|subgraphs).* .*404",
    r"/userdata/comfy\.templates\.json .*404",
    r"/favicon\.ico .*404",
    r"Cannot read properties of undefined \(reading 'id'\)\s+at onChange ",  # in its settings, frontend 1.32.9
    r"api\.comfy\.org.*Content Security Policy",  # looks up node packs; --disable-api-nodes blocks it
    r"ComfyApp graph accessed before initialization",  # in its own store, frontend 1.49.6
    r"huggingface\.co.*Content Security Policy",  # looks up its default graph's models; blocked likewise
    r"Attempted to cleanup event listeners for graph that was never set up",  # its minimap of a new subgraph, 1.32.9
    # Of UI_FRONTENDS: a newer frontend asks for routes that this server lacks, and no header blocks other hosts.
    r"/api/jobs\?.*404",
    r"/templates/index_logo\.json .*404",
    r"Jobs ?Api|Jobs API",
    r"ERR_NAME_NOT_RESOLVED",
    # A node's progress text that arrives while the page is still loading, frontend 1.32.9.
    r"getCanvas: canvas is null[\s\S]* at ComfyApi\.handleProgressText ",
)


FORGET = """async () => {
    localStorage.clear();
    sessionStorage.clear();
    for (const { name } of await indexedDB.databases()) indexedDB.deleteDatabase(name);
}"""


def new_tab(browser: Browser) -> Page:
    """An empty tab with a storage of its own, as in another browser."""
    tab = browser.new_context(viewport={"width": 1600, "height": 1000}).new_page()
    tab.set_default_timeout(PATIENCE)
    return tab


def other_frontends() -> list[Path]:
    """Folders of further frontends to test: those in the environment variable UI_FRONTENDS."""
    return [Path(folder) for folder in os.environ.get("UI_FRONTENDS", "").split(os.pathsep) if folder]


def show_frontend(tab: Page, server: PackServer, frontend: Path) -> None:
    """Let a tab get ComfyUI's page from this folder, the `static` of a comfyui_frontend_package."""
    tab.route("**/*", lambda route: _answer_from(frontend, server.url, route))


def _answer_from(frontend: Path, server: str, route: Route) -> None:
    """Answer a request for a file of the frontend; all others reach the server."""
    address = urlsplit(route.request.url)
    file = frontend / (address.path.lstrip("/") or "index.html")
    if route.request.url.startswith(server) and not address.path.startswith("/extensions/") and file.is_file():
        kind = mimetypes.guess_type(file.name)[0] or "application/octet-stream"
        route.fulfill(path=file, content_type=kind)
    else:
        route.continue_()


class ComfyPage:
    """ComfyUI's page in a tab. `problems` lists the errors on its console that are not HARMLESS."""

    def __init__(self, tab: Page, server: PackServer) -> None:
        self.server, self.problems, self.page = server, list[str](), tab
        self.page.on("console", self._hear)
        self.page.on("pageerror", self._catch)
        self.load()

    def leave(self) -> Page:
        """Make the tab as good as new, and return it. ComfyUI's scripts stay compiled: the next page loads faster."""
        self.page.remove_listener("console", self._hear)
        self.page.remove_listener("pageerror", self._catch)
        self.page.unroute_all(behavior="ignoreErrors")
        self.page.mouse.move(0, 0)
        self.page.goto(f"{self.server.url}/system_stats")  # of the same origin, and without scripts
        self.page.evaluate(FORGET)
        self.page.context.clear_cookies()
        return self.page

    def load(self) -> None:
        """Open or reload the page and wait until this pack's extension is loaded."""
        self.page.goto(self.server.url, wait_until="domcontentloaded")
        self.tab_button("qwen-edit-trainer").wait_for()
        self.page.wait_for_function("() => window.graph && window.app.extensionManager")  # `graph` is set last

    def _hear(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self._note(f"{message.location.get('url', '')} {message.text}")

    def _catch(self, error: Error) -> None:
        self._note(f"uncaught: {error.stack or error}")

    def _note(self, line: str) -> None:
        if not any(re.search(known, line) for known in HARMLESS):
            self.problems.append(line)

    # The graph

    def open_template(self, name: str) -> None:
        """Open one of this pack's templates, as a click in ComfyUI's list of templates does."""
        address = f"/api/workflow_templates/{self.server.pack.name}/{name}.json"
        self.page.evaluate(
            "async ([address, name]) => app.loadGraphData(await (await fetch(address)).json(), true, true, name)",
            [address, name],
        )

    def open_every_setting(self) -> None:
        """Open a graph of the demo that has every settings node, as people built it before the short path."""
        graph = json.loads((Path(__file__).parent / "graphs" / "every_setting.json").read_text(encoding="utf-8"))
        self.page.evaluate("graph => app.loadGraphData(graph, true, true, 'every setting')", graph)

    def missing(self) -> list[str]:
        """Node types of the graph that are unknown or have errors, and the texts of open dialogs."""
        unknown = self.page.evaluate(
            "() => app.graph.nodes.filter(n => n.has_errors || !LiteGraph.registered_node_types[n.type])"
            ".map(n => n.type).filter(t => t !== 'MarkdownNote')"
        )
        return [*unknown, *self.page.locator(".p-dialog:visible").all_inner_texts()]

    def overlaps(self) -> list[str]:
        """Titles of nodes that lie on each other, two a text. Nodes 2.0 draws elements, whose heights differ."""
        return self.page.evaluate(
            """() => {
                const boxes = app.graph.nodes.map(node => {
                    const box = document.querySelector(`[data-node-id="${node.id}"]`)?.getBoundingClientRect();
                    const [x, y] = node.pos, [width, height] = node.size, title = LiteGraph.NODE_TITLE_HEIGHT;
                    return box ? [node.title, box.left, box.right, box.top, box.bottom]
                        : [node.title, x, x + width, y - title, y + height];
                });
                const lieOnEachOther = (one, other) =>
                    one[1] < other[2] && other[1] < one[2] && one[3] < other[4] && other[3] < one[4];
                return boxes.flatMap((one, number) => boxes.slice(number + 1)
                    .filter(other => lieOnEachOther(one, other)).map(other => `${one[0]} / ${other[0]}`));
            }"""
        )

    def without_label(self) -> list[str]:
        """Labels of our widgets that Nodes 2.0 cut, and boxes for several lines that show no name."""
        return self.page.evaluate(
            """() => {
                const ours = "[data-node-id]:has([node-type^=QwenEdit_])";
                const labels = `${ours} p.truncate, ${ours} [data-testid=widget-layout-field-label]`;
                const cut = [...document.querySelectorAll(labels)].filter(each => each.scrollWidth > each.clientWidth);
                const boxes = [...document.querySelectorAll("[node-type^=QwenEdit_] textarea")].filter(box =>
                    getComputedStyle(box.parentElement, "::before").content === "none" && !box.labels.length);
                return [...cut.map(each => each.textContent), ...boxes.map(each => each.ariaLabel)];
            }"""
        )

    def show_outputs(self, picture: str) -> None:
        """Show a report on each output node, and a picture of ComfyUI's input folder if it has any, as a run does."""
        self.page.evaluate(
            """async picture => {
                const ends = app.graph.nodes.filter(node => node.constructor.nodeData?.output_node);
                for (const node of ends) {
                    const id = String(node.id), drawn = node.outputs.some(({ type }) => type === "IMAGE");
                    const images = drawn ? [{ filename: picture, subfolder: "", type: "input" }] : undefined;
                    const output = { text: ["a line of a report\\n".repeat(12)], ...(images && { images }) };
                    const detail = { node: id, display_node: id, prompt_id: "none", output };
                    app.api.dispatchEvent(new CustomEvent("executed", { detail }));
                }
                await new Promise(resolve => setTimeout(resolve, 300)); // until pictures are loaded and laid out
            }""",
            picture,
        )

    def set_widgets(self, class_type: str, **values: Any) -> None:
        """Set widgets of this pack's first node of a class, as if the user had typed the values."""
        self.page.evaluate(
            """([type, values]) => {
                const node = app.graph.nodes.find(each => each.comfyClass === type);
                for (const [name, value] of Object.entries(values)) {
                    const widget = node.widgets.find(each => each.name === name);
                    widget.value = value;
                    widget.callback?.(value);
                }
            }""",
            [f"QwenEdit_{class_type}", values],
        )

    def widgets(self, class_type: str) -> dict[str, Any]:
        """Widget values by name, of this pack's first node of a class."""
        return self.page.evaluate(
            "type => Object.fromEntries("
            "app.graph.nodes.find(n => n.comfyClass === type).widgets.map(w => [w.name, w.value]))",
            f"QwenEdit_{class_type}",
        )

    def press_node_button(self, class_type: str, name: str) -> None:
        """Click the button of this pack's first node of a class, wherever the renderer has drawn it."""
        if self.page.evaluate("() => Boolean(LiteGraph.vueNodesMode)"):
            self.page.locator("[data-node-id]").get_by_role("button", name=name).click()
            return
        find = """
            const node = app.graph.nodes.find(each => each.comfyClass === type);
            const button = node.widgets.find(each => each.type === "button");
        """
        kind = f"QwenEdit_{class_type}"
        self.page.wait_for_function(f"type => {{ {find} return button.last_y > 0; }}", arg=kind)
        x, y = self.page.evaluate(
            f"""type => {{
                {find}
                const [x, y] = app.canvas.ds.convertOffsetToCanvas(
                    [node.pos[0] + node.size[0] / 2, node.pos[1] + button.last_y + 10]);
                const place = app.canvas.canvas.getBoundingClientRect();
                return [place.left + x, place.top + y];
            }}""",
            kind,
        )
        self.page.mouse.click(x, y)

    def run(self) -> None:
        """Press Run."""
        self.page.evaluate("() => app.queuePrompt(0)")

    # This pack's part of the page

    @property
    def node_view(self) -> Locator:
        """The view inside the training node."""
        return self.page.locator(".qet-node", has=self.page.locator(".qet-chart"))

    @property
    def panel(self) -> Locator:
        """The side panel."""
        return self.page.locator(".qet-panel")

    def tab_button(self, panel: str) -> Locator:
        """The button of a side panel. It has a class, or from frontend 1.5x on an id for tests."""
        return self.page.locator(f'.{panel}-tab-button, [data-testid="{panel}-tab-button"]')

    def reopen_pairs(self) -> None:
        """Close the side panel of pairs and open it again, so that it reads the data set anew."""
        for is_open in (False, True):
            self.tab_button("qwen-edit-pairs").click()
            expect(self.page.locator(".qet-pairs")).to_have_count(int(is_open))

    def open_panel(self, run_name: str = "") -> None:
        """Show the list of runs, or one run, in the side panel."""
        if not self.panel.is_visible():
            self.tab_button("qwen-edit-trainer").click()
        if run_name and not self.panel.get_by_role("heading", name=run_name, exact=True).is_visible():
            if self.panel.locator(".qet-back").is_visible():  # a run that has just begun is shown
                self.panel.locator(".qet-back").click()
            self.panel.locator(".qet-run", has=self.page.get_by_text(run_name, exact=True)).click()

    def points(self, place: Locator, line: str = "qet-line-smooth") -> int:
        """Number of points of a line in the chart inside `place`."""
        text = place.locator(f"polyline.{line}").first.get_attribute("points")
        return len((text or "").split())

    def wait_for_points(self, place: Locator, count: int) -> None:
        """Wait until the loss line of the chart inside `place` has at least `count` points."""
        self.page.wait_for_function(
            "([place, count]) => (place.querySelector('polyline.qet-line-smooth')?.getAttribute('points') ?? '')"
            ".split(' ').length >= count",
            arg=[place.element_handle(), count],
            polling=200,
        )

    def drop(self, place: Locator, *paths: Path) -> None:
        """Drag files or folders from outside the browser, and drop them in the middle of an element."""
        place.scroll_into_view_if_needed()
        box = place.bounding_box()
        assert box is not None
        middle = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
        data = {"items": [], "files": [str(path.resolve()) for path in paths], "dragOperationsMask": 1}
        session = self.page.context.new_cdp_session(self.page)
        for kind in ("dragEnter", "dragOver", "drop"):
            session.send("Input.dispatchDragEvent", {"type": kind, "data": data, **middle})
        session.detach()

    def picture(self, name: str) -> None:
        """Save a screenshot for the documentation in the folder named by UI_PICTURES, if that is set."""
        folder = os.environ.get("UI_PICTURES")
        if folder:
            self.page.screenshot(path=Path(folder) / f"{name}.png")
