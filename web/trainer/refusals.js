// @ts-check
/**
 * A notice that says why one of our nodes can't run or failed, and goes to the node. It stays until it is closed or the
 * graph is queued again. ComfyUI's own page does not always say it: if other nodes of the graph can run, it only draws
 * red frames, and from frontend 1.49 on an error of a running node is hidden behind "View details".
 *
 * @typedef {{type: string, message: string, details: string, extra_info?: Record<string, any>}} Fault
 * @typedef {{errors: Fault[], dependent_outputs?: string[], class_type: string}} NodeErrors
 * @typedef {{id: string, kind: string, texts: string[]}} Problem
 */
import { element, withLinks } from "./dom.js";
import { goToNode, isOurs, kindOf, nameOfKind, nodeWithId } from "./graph.js";
import { labelled, t } from "./words.js";

/** @type {WeakSet<any>} Errors of `api.queuePrompt` that the notice shows. */
const shownErrors = new WeakSet();

/** Whether the notice shows this error, so that nothing else needs to tell it. @param {any} error */
export function isInNotice(error) {
  return shownErrors.has(error);
}

/**
 * @param {any} app
 * @param {any} api
 * @param {(prompt: any) => Promise<void>} ready What a prompt has to wait for before it is queued. Throws if it must
 *   not be queued.
 */
export function watchRefusals(app, api, ready) {
  const notice = createNotice(app);
  const queue = api.queuePrompt;
  api.queuePrompt = async function (/** @type {any[]} */ ...given) {
    notice.hide();
    await ready(given[1]?.output);
    let answer;
    try {
      answer = await queue.apply(this, given);
    } catch (error) {
      const { response } = /** @type {any} */ (error ?? {});
      if (show(response?.node_errors, given[1]?.output)) shownErrors.add(/** @type {any} */ (error));
      throw error;
    }
    show(answer?.node_errors, given[1]?.output);
    return answer;
  };

  /** @param {any} errors From the server's answer. @param {any} prompt @returns {boolean} Whether the notice shows. */
  function show(errors, prompt) {
    const problems = refused(errors, prompt);
    if (problems.length) notice.show(t("Not started, because:"), problems);
    return problems.length > 0;
  }

  api.addEventListener("execution_error", (/** @type {CustomEvent} */ { detail }) => {
    if (!isOurs(detail.node_type)) return;
    const texts = [String(detail.exception_message).trim()];
    const isOurOwn = String(detail.exception_type).includes(".trainer_core.errors."); // says what to do
    const title = isOurOwn ? t("Stopped, because:") : t("Stopped by an error:");
    notice.show(title, [{ id: String(detail.node_id), kind: detail.node_type, texts }]);
  });
}

/**
 * The nodes with errors because of which one of our nodes will not run.
 * @param {Record<string, NodeErrors>|undefined} errors By node id.
 * @param {Record<string, {class_type: string}>} [prompt]
 * @returns {Problem[]}
 */
export function refused(errors, prompt = {}) {
  const concerns = (/** @type {NodeErrors} */ { class_type, dependent_outputs = [] }) =>
    isOurs(class_type) || dependent_outputs.some((id) => isOurs(prompt[id]?.class_type));
  return Object.entries(errors ?? {})
    .filter(([, each]) => concerns(each))
    .map(([id, { class_type, errors }]) => ({ id, kind: class_type, texts: [...new Set(errors.map(inWords))] }));
}

/** @param {Fault} fault */
function inWords({ type, message, details, extra_info }) {
  const name = extra_info?.input_name;
  if (type === "custom_validation_failed") {
    return details.startsWith(`${name} - `) ? details.slice(`${name} - `.length) : details;
  }
  if (type === "required_input_missing") {
    return t("The input {input} has no link. Draw one to it.", { input: name ?? details });
  }
  if (type === "value_not_in_list") {
    const value = JSON.stringify(extra_info?.received_value);
    return t("{input} is {value}, which is not one of its choices. It may be missing on this machine.", {
      input: name ?? "",
      value,
    });
  }
  return details ? labelled(message, details) : message;
}

/** @param {any} app */
function createNotice(app) {
  const heading = element("h3", { class: "qet-heading" });
  const list = element("ul", { class: "qet-notice-list" });
  /** @type {HTMLElement|null} What had the focus before the notice. */
  let before = null;
  const label = t("Close");
  const close = element("button", { type: "button", class: "qet-button", "aria-label": label, title: label }, "✕");
  close.addEventListener("click", hide);
  const head = element("div", { class: "qet-row" }, heading, close);
  const box = element("section", { class: "qet-notice", role: "alert" }, head, list);
  box.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
    if (event.key !== "Escape") return;
    event.stopPropagation(); // ComfyUI would leave the subgraph
    hide();
  });

  /** The focus goes back, if it is in the notice. */
  function hide() {
    const had = box.contains(document.activeElement);
    box.remove();
    if (had && before?.isConnected) before.focus();
  }

  return {
    hide,
    /** @param {string} title @param {Problem[]} problems */
    show(title, problems) {
      heading.textContent = title;
      const go = (/** @type {string} */ id) => goToNode(app, id, window.innerHeight - box.getBoundingClientRect().top);
      list.replaceChildren(...problems.map((problem) => item(app, problem, go)));
      document.body.append(box);
      const active = /** @type {HTMLElement|null} */ (document.activeElement);
      if (!box.contains(active)) before = active;
      if (active?.matches("input, textarea, select, [contenteditable]")) return; // nobody is interrupted in typing
      (list.querySelector("button:not([hidden])") ?? close).focus({ focusVisible: true });
    },
  };
}

/** @param {any} app @param {Problem} problem @param {(id: string) => void} go */
function item(app, { id, kind, texts }, go) {
  const node = nodeWithId(app, id);
  const isHere = node && kindOf(node) === kind; // the panel also queues graphs that are not open
  const on = { click: () => go(id) };
  const button = element("button", { type: "button", class: "qet-button", hidden: !isHere, on }, t("Go to node"));
  const title = isHere ? node.title : nameOfKind(kind);
  const head = element("div", { class: "qet-row" }, element("b", { text: title }), button);
  return element("li", {}, head, ...texts.map((text) => element("p", {}, ...withLinks(text))));
}
