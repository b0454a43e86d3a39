// @ts-check
/** Elements made in one call. Texts are only ever set as text: names and captions come from strangers. */

const SVG = "http://www.w3.org/2000/svg";

/**
 * @param {string} tag
 * @param {Record<string, any>} [options] Attributes; `text` for the content, `on` for listeners by event.
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
 * Set a text only where it changes, so that a screen reader is not told the same again.
 * @param {Element} target
 * @param {string} text
 */
export function setText(target, text) {
  if (target.textContent !== text) target.textContent = text;
}

/**
 * `call`, but once per picture of the screen however often it is asked for.
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
 * Into the clipboard. Pages without https have none to write to, except on the machine itself; an old command can.
 * @param {string} text
 */
export async function copyText(text) {
  const written = await navigator.clipboard?.writeText(text).then(() => true, () => false);
  if (written || copySelected(text)) return;
  throw new Error("The browser lets this page copy nothing. Copy it from Settings.");
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

/** The style sheet, once per page. The pack's folder may have any name. */
export function loadStyle() {
  if (document.querySelector("link[data-qet]")) return;
  const href = new URL("./trainer.css", import.meta.url).href;
  document.head.append(element("link", { rel: "stylesheet", href, "data-qet": "" }));
}
