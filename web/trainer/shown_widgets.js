// @ts-check
/**
 * Hides widgets that change nothing under the node's other values, such as lion's settings with the optimizer adamw.
 * trainer_core declares the conditions; nodes/schema.py puts them into the options of the inputs. A hidden widget keeps
 * its value and is still sent.
 */
import { chain, inputsOf, ownWidget } from "./graph.js";

const SPACING = 4; // pixels that ComfyUI adds to the height of each widget

/**
 * @typedef {{setting: string, equals: any[], differs: any[]}} Condition
 * @typedef {{if: Condition[], unused: any, ignored_with?: string}} Declared `unused`: the only value that is accepted
 *   while the conditions do not hold; null if all are. `ignored_with`: an input that takes its place if connected.
 */

/** @param {any} node A new node. Its saved values come later. */
export function showUsed(node) {
  const declared = Object.entries(inputsOf(node)).flatMap(([name, spec]) => {
    const used = spec[1]?.qwen_edit_used;
    return used ? [/** @type {[string, Declared]} */ ([name, used])] : [];
  });
  if (!declared.length) return;
  if (copiesOptions()) for (const [name] of declared) keepHiddenLive(node, ownWidget(node, name));
  const unused = () => declared.filter(([name, used]) => !mustBeSeen(node, name, used)).map(([name]) => name);
  const own = declared.map(([name]) => ownWidget(node, name)).filter(Boolean);
  const apply = () => hideWidgets(node, own, unused(), false);
  const deciding = new Set(declared.flatMap(([name, used]) => [name, ...used.if.map(({ setting }) => setting)]));
  for (const name of deciding) chain(ownWidget(node, name) ?? {}, "callback", apply);
  chain(node, "onConfigure", () => hideWidgets(node, own, unused(), true));
  chain(node, "onConnectionsChange", () => queueMicrotask(apply)); // not while a graph is loading
  apply();
}

/**
 * Whether a widget must be seen. Also if it has a value that is refused here, and if a link gives a value.
 * @param {any} node
 * @param {string} name
 * @param {Declared} used
 */
function mustBeSeen(node, name, used) {
  if (used.ignored_with && isLinked(node, used.ignored_with)) return false;
  const own = ownWidget(node, name);
  if (isLinked(node, name) || (used.unused !== null && own?.value !== used.unused)) return true;
  return used.if.every(({ setting, equals, differs }) => {
    const other = ownWidget(node, setting);
    if (!other || isLinked(node, setting)) return true;
    return (!equals.length || equals.includes(other.value)) && !differs.includes(other.value);
  });
}

/** @param {any} node @param {string} name */
function isLinked(node, name) {
  return (node.inputs ?? []).some((/** @type {any} */ each) => each.name === name && each.link != null);
}

/**
 * Hide some of these widgets of a node and show the others. The node stays where it is; its lower edge moves.
 * @param {any} node
 * @param {any[]} declared Not all of the node's: newer frontends hide widgets whose value comes from a subgraph's node.
 * @param {string[]} names Those to hide.
 * @param {boolean} keepsHeight Only become higher if the widgets need it, as for a graph with saved sizes.
 */
function hideWidgets(node, declared, names, keepsHeight) {
  const before = node.computeSize()[1];
  const changed = declared.filter((each) => {
    const hide = names.includes(each.name);
    if (Boolean(each.hidden) === hide) return false;
    each.hidden = hide; // for the canvas
    if (hide) each.computeSize = () => [0, -SPACING];
    else delete each.computeSize; // up to frontend 1.3x hidden widgets take space without it
    if (!copiesOptions()) each.options.hidden = hide; // for Nodes 2.0
    return true;
  });
  if (!changed.length) return;
  const all = [...node.widgets]; // Nodes 2.0 look again if the list changes
  node.widgets = [];
  node.widgets = all;
  const needed = node.computeSize()[1];
  node.setSize([node.size[0], Math.max(needed, node.size[1] + (keepsHeight ? 0 : needed - before))]);
  node.setDirtyCanvas?.(true, true);
}

/** Whether Nodes 2.0 of this frontend copies a widget's options and then never looks at them again. */
function copiesOptions() {
  const [major, minor] = String(/** @type {any} */ (window).__COMFYUI_FRONTEND_VERSION__).split(".").map(Number);
  return major === 1 && minor < 40;
}

/**
 * Keep copies of a widget's options up to date: Vue takes the object for a ref and reads its value. Reading the node's
 * list of widgets tells Vue when to read it again.
 * @param {any} node
 * @param {any} each
 */
function keepHiddenLive(node, each) {
  if (!each) return;
  each.options.hidden = {
    __v_isRef: true,
    get value() {
      return node.widgets.length > 0 && Boolean(each.hidden);
    },
  };
}
