// @ts-check
/**
 * Keeps the digits of decimal widgets. ComfyUI rounds what is typed to the decimals of the step, so 0.9995 with a step
 * of 0.001 becomes 1. Nodes 2.0 also write the rounded text back when a field loses the focus. Up to frontend 1.3x they
 * show three decimals, so a learning rate of 0.0001 shows 0 and becomes the smallest one allowed.
 */
import { inputsOf, isOurs, shownNode } from "./graph.js";

const DIGITS = 12; // significant digits that are kept; fewer than a double has, so 0.1 + 0.2 stays 0.3
const MAX_DECIMALS = 20; // more are not allowed by Intl.NumberFormat in every browser

/** @param {any} node A new node. Its saved values come later. */
export function keepDigits(node) {
  const inputs = inputsOf(node);
  for (const each of node.widgets ?? []) if (inputs[each.name]?.[0] === "FLOAT") keepDigitsOf(each);
}

/** @param {any} widget */
function keepDigitsOf(widget) {
  const { options } = widget;
  const least = options.precision ?? 0;
  options.maxFractionDigits = MAX_DECIMALS;
  options.round = undefined;
  // What shows the value reads this: as many decimals as the value has, at least those of the step.
  Object.defineProperty(options, "precision", {
    configurable: true,
    enumerable: true,
    get: () => Math.max(least, decimals(widget.value)),
  });
  let last = widget.value;
  const before = widget.callback;
  widget.callback = function (/** @type {any} */ value, /** @type {any[]} */ ...rest) {
    widget.value = last = kept(value, options) ?? last;
    return before?.call(this, last, ...rest);
  };
}

/**
 * The value without the noise of floating point, inside the limits. Undefined if it is no number, as in an empty field.
 * @param {any} value
 * @param {{min?: number, max?: number}} limits
 */
export function kept(value, { min = -Infinity, max = Infinity }) {
  if (value === null || value === "" || !Number.isFinite(Number(value))) return undefined;
  return Math.min(max, Math.max(min, Number(Number(value).toPrecision(DIGITS))));
}

/** How many decimals a number has. @param {any} value */
export function decimals(value) {
  const [digits, exponent = "0"] = String(Number(value)).split("e");
  const after = (digits.split(".")[1] ?? "").length - Number(exponent);
  return Math.min(MAX_DECIMALS, Math.max(0, after || 0));
}

/**
 * Let people type 1e-4 into decimal fields of our nodes. PrimeVue's number fields, in Nodes 2.0 up to frontend 1.3x,
 * leave out the e and the minus, and take 14. From the e on, the browser alone edits the field; at the end the field
 * gets the number in decimals, which PrimeVue reads.
 * @param {any} app
 */
export function readExponents(app) {
  /** @type {HTMLInputElement|undefined} The field in which an exponent is being typed. */
  let field;

  /** @param {Event} event */
  function take(event) {
    const { target, type, key = "", clipboardData } = /** @type {any} */ (event);
    const begins = (type === "keydown" && /^e$/i.test(key)) || /\de/i.test(clipboardData?.getData("text") ?? "");
    if (begins && isField(target)) field = target;
    if (!field || target !== field) return;
    if (type === "blur" || key === "Enter" || key === "Tab") finish(field);
    else event.stopPropagation();
  }

  /** @param {any} target */
  function isField(target) {
    if (!target?.matches?.("[data-node-id] input.p-inputnumber-input")) return false;
    return isOurs(shownNode(app, target.closest("[data-node-id]").dataset.nodeId)?.comfyClass);
  }

  /** @param {HTMLInputElement} done */
  function finish(done) {
    field = undefined;
    const value = Number(done.value.replaceAll(",", ""));
    if (Number.isFinite(value)) done.value = value.toFixed(decimals(value));
  }

  for (const type of ["keydown", "keypress", "input", "paste", "blur"]) document.addEventListener(type, take, true);
}
