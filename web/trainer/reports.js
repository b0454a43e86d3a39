// @ts-check
/** The text that a node of ours outputs, such as a plan or the findings on pairs, shown on the node. */
import { copyText, element, setText } from "./dom.js";
import { chain, kindOf, ourNodes, withOutputs } from "./graph.js";
import { addView, scrollInside } from "./node_parts.js";
import { t } from "./words.js";

const PROGRESS_TEXT = "$$node-text-preview"; // ComfyUI's name of the widget
const HEIGHT = 120; // pixels of a node that is not listed
/** Nodes with a report, and the pixels that they keep free for it, so that a node never grows over others. */
const HEIGHTS = /** @type {Record<string, number>} */ ({
  QwenEdit_CheckPairs: 150,
  QwenEdit_DraftCaptions: 150,
  QwenEdit_PlanMemory: 240,
  QwenEdit_PreviewPairs: 90,
  QwenEdit_TryLora: 60,
});
/** @type {WeakMap<any, (text: string) => void>} */
const shown = new WeakMap();

/**
 * A place for a node's report.
 * @param {any} app
 * @param {any} node
 * @returns {HTMLElement}
 */
export function createReport(app, node) {
  const text = element("pre", { class: "qet-report-text", tabindex: "0", "aria-label": t("Report") });
  const copy = element("button", { class: "qet-button", type: "button", text: t("Copy"), on: { click: copied } });
  const box = element("div", { class: "qet-report" }, copy, text);
  scrollInside(app, text, text);
  text.addEventListener("pointerdown", (/** @type {Event} */ event) => event.stopPropagation()); // select, not drag

  async function copied() {
    try {
      await copyText(text.textContent);
      setText(copy, t("Copied"));
    } catch {
      setText(copy, t("Select the text to copy it"));
    }
    setTimeout(() => setText(copy, t("Copy")), 2000);
  }

  shown.set(node, (said) => {
    setText(text, said);
    box.hidden = !said;
  });
  box.hidden = true;
  return box;
}

/**
 * Show what a node outputs from now on. A training node shows it in its view.
 * @param {any} app
 * @param {any} node A new node.
 */
export function attachReport(app, node) {
  const kind = kindOf(node);
  if (kind in HEIGHTS) addReport(app, node, HEIGHTS[kind]);
  chain(node, "onExecuted", (output) => show(app, node, output));
}

/**
 * When a prompt has ended, take ComfyUI's progress texts off our nodes. Before frontend 1.58 they stay there, in the
 * room of the report.
 * @param {any} app
 * @param {any} api
 */
export function clearProgressTexts(app, api) {
  const clear = () => {
    for (const { widgets } of ourNodes(app)) {
      const place = widgets?.findIndex((/** @type {any} */ { name }) => name === PROGRESS_TEXT) ?? -1;
      if (place < 0) continue;
      widgets[place].onRemove?.();
      widgets.splice(place, 1);
    }
    app.canvas?.setDirty(true, true);
  };
  for (const end of ["success", "error", "interrupted"]) api.addEventListener(`execution_${end}`, clear);
}

/** Show the reports among the outputs that ComfyUI restores. @param {any} app @param {Record<string, any>} outputs */
export function restoreReports(app, outputs) {
  if (!Object.keys(outputs ?? {}).length) return; // also set while the page starts, before there is a graph
  for (const [node, output] of withOutputs(app, outputs)) show(app, node, output);
}

/** @param {any} app @param {any} node @param {any} output */
function show(app, node, output) {
  const text = [output?.text ?? []].flat().join("\n\n");
  if (text && !shown.has(node)) addReport(app, node, HEIGHT);
  shown.get(node)?.(text);
}

/** @param {any} app @param {any} node @param {number} height */
function addReport(app, node, height) {
  addView(node, "report", element("div", { class: "qet-node" }, createReport(app, node)), height);
}
