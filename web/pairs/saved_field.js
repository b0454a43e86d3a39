// @ts-check
/** A text field that saves itself: when it is left, on Enter, and after a pause. A mark says whether it is saved. */
import { element, setText } from "../trainer/dom.js";
import { t } from "../trainer/words.js";

const PAUSE_MS = 1200;

/**
 * @param {{label: string, placeholder: string, save: (text: string) => Promise<void>, onEnter?: () => void}} given
 *   `save` throws if the text could not be saved. `onEnter` is called after Enter; Shift+Enter makes a new line.
 */
export function createSavedField({ label, placeholder, save, onEnter }) {
  const mark = element("span", { class: "qet-mark" });
  const field = element("textarea", {
    class: "qet-text",
    rows: 2,
    placeholder,
    "aria-label": label,
    spellcheck: "true",
  });
  let saved = "";
  let waiting = 0;
  /** @type {Promise<void>|undefined} */
  let running;

  /** @param {""|"typing"|"saving"|"saved"|"failed"} state @param {string} [text] */
  function show(state, text = "") {
    mark.dataset.state = state;
    setText(mark, text);
  }

  /** Save what is typed. @returns {Promise<boolean>} Whether all of it is saved. */
  async function flush() {
    window.clearTimeout(waiting);
    while (field.value !== saved) {
      running ??= attempt().finally(() => (running = undefined));
      await running;
      if (mark.dataset.state === "failed") return false;
    }
    return true;
  }

  async function attempt() {
    const text = field.value;
    show("saving", t("Saving…"));
    try {
      await save(text);
      saved = text;
      if (field.value === text) show("saved", t("✓ Saved"));
      else show("typing", t("Not saved yet"));
    } catch (error) {
      show("failed", t("Not saved: {reason}", { reason: /** @type {any} */ (error).message }));
    }
  }

  field.addEventListener("input", () => {
    show("typing", t("Not saved yet"));
    window.clearTimeout(waiting);
    waiting = window.setTimeout(flush, PAUSE_MS); // as well as on leaving, because the page may be closed
  });
  field.addEventListener("blur", flush);
  field.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    flush(); // also before Ctrl+Enter, which runs the graph
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    onEnter?.();
  });

  return {
    field,
    mark,
    flush,
    /** Show a text from the server, unless the user has typed another. @param {string} text */
    show(text) {
      if (text === saved || field.value !== saved) return;
      saved = field.value = text;
      show("");
    },
    /** Start anew with another data set. */
    reset() {
      window.clearTimeout(waiting);
      saved = field.value = "";
      show("");
    },
  };
}
