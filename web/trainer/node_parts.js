// @ts-check
/** What our scripts add to a node: views, buttons, and what ends with the node. */
import { chain, ourNodes } from "./graph.js";

/**
 * Add an element to a node. It is neither in the prompt nor in the saved graph.
 * @param {any} node
 * @param {string} name
 * @param {HTMLElement} view
 * @param {number} height Pixels that it needs, also while it is empty, so that the node never grows over others.
 * @param {() => number} [more] Further ones that it needs now.
 */
export function addView(node, name, view, height, more = () => 0) {
  view.style.minHeight = `${height}px`;
  const options = { serialize: false, hideOnZoom: false, getMinHeight: () => height + more() };
  node.addDOMWidget(name, `qwen_edit_${name}`, view, options).serialize = false;
}

/** Add a button, which isn't in the saved graph. @param {any} node @param {string} text @param {() => void} press */
export function addButton(node, text, press) {
  node.addWidget("button", text, null, press, { serialize: false }).serialize = false;
}

/**
 * Let the wheel over a view scroll what has more than it shows, and otherwise zoom as elsewhere on the canvas.
 * @param {any} app
 * @param {Element} view
 * @param {Element} [list] What scrolls.
 */
export function scrollInside(app, view, list) {
  view.addEventListener("wheel", (event) => {
    if (list && list.scrollHeight > list.clientHeight) event.stopPropagation();
    else if (!(/** @type {any} */ (window).LiteGraph?.vueNodesMode)) app.canvas?.processMouseWheel?.(event);
  });
}

/** @type {Map<any, (() => void)[]>} What is to be called when a node is gone. */
const ends = new Map();

/** Call `end` when a node is removed, or with `endGone`. @param {any} node @param {() => void} end */
export function whenGone(node, end) {
  if (!ends.has(node)) chain(node, "onRemoved", () => endAll(node));
  ends.set(node, [...(ends.get(node) ?? []), end]);
}

/** @param {any} node */
function endAll(node) {
  for (const end of ends.get(node) ?? []) end();
  ends.delete(node);
}

/**
 * End what belongs to nodes that are gone. Older frontends close a graph without telling the nodes in its subgraphs.
 * @param {any} app
 */
export function endGone(app) {
  const there = new Set(ourNodes(app));
  for (const node of ends.keys()) if (node.graph && !there.has(node)) endAll(node); // a new node has no graph yet
}
