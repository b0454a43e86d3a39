// @ts-check
/** DOM helpers. Text is never parsed as HTML, because names and captions are untrusted. */
import { t } from "./words.js";

const SVG = "http://www.w3.org/2000/svg";

/**
 * @param {string} tag
 * @param {Record<string, any>} [options] Attributes. `text` sets the content, `on` adds listeners by event.
 * @param {...(Node|string)} children
 * @returns {any}
 */
export function element(tag, options = {}, ...children) {
  return furnish(document.createElement(tag), options, children);
}

/**
 * @param {string} tag
 * @param {Record<string, any>} [options]
 * @param {...(Node|string)} children
 * @returns {any}
 */
export function svg(tag, options = {}, ...children) {
  return furnish(document.createElementNS(SVG, tag), options, children);
}

/**
 * @param {Element} made
 * @param {Record<string, any>} options
 * @param {(Node|string)[]} children
 */
function furnish(made, options, children) {
  for (const [name, value] of Object.entries(options)) {
    if (name === "text") made.textContent = String(value);
    else if (name === "on") for (const [event, call] of Object.entries(value)) made.addEventListener(event, call);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== undefined && value !== null) made.setAttribute(name, String(value));
  }
  made.append(...children);
  return made;
}

/**
 * A message of the server, in which download addresses are links. Others stay text, because a graph may bring them.
 * @param {string} text
 * @returns {(Node|string)[]}
 */
export function withLinks(text) {
  const parts = text.split(/(https:\/\/huggingface\.co\/[\w./%-]*\w)/);
  const link = (/** @type {string} */ href) => element("a", { href, target: "_blank", rel: "noreferrer" }, href);
  return parts.map((part, index) => (index % 2 ? link(part) : part));
}

/**
 * Set the text only if it changes, so that screen readers do not announce it again.
 * @param {Element} target
 * @param {string} text
 */
export function setText(target, text) {
  if (target.textContent !== text) target.textContent = text;
}

/**
 * A function that runs `call` at most once per animation frame.
 * @param {() => void} call
 */
export function onceAFrame(call) {
  let waiting = false;
  return () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      call();
    });
  };
}

/**
 * Copy a text. Falls back to execCommand, because the clipboard API needs https or localhost.
 * @param {string} text
 */
export async function copyText(text) {
  const written = await navigator.clipboard?.writeText(text).then(() => true, () => false);
  if (written || copySelected(text)) return;
  throw new Error(t("The browser blocked access to the clipboard. Open Settings below and copy from there."));
}

/** @param {string} text */
function copySelected(text) {
  const before = /** @type {HTMLElement|null} */ (document.activeElement);
  const area = element("textarea", { class: "qet-unseen", readonly: true, "aria-hidden": "true" });
  area.value = text;
  document.body.append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  before?.focus();
  return copied;
}

/** Load the style sheets once. Their addresses are relative to this file, as the pack's folder may have any name. */
export function loadStyle() {
  if (document.querySelector("link[data-qet]")) return;
  for (const file of ["./trainer.css", "../pairs/pairs.css"]) {
    const href = new URL(file, import.meta.url).href;
    document.head.append(element("link", { rel: "stylesheet", href, "data-qet": "" }));
  }
}
