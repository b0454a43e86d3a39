// @ts-check
/** The instruction: one for all pairs, or one for each. */
import { element, setText } from "../trainer/dom.js";
import { t } from "../trainer/words.js";
import { createSavedField } from "./saved_field.js";
import { captionsOf } from "./store.js";

/** @param {import("./store.js").Store} store */
export function createInstruction(store) {
  const all = radio("all", t("One instruction for all pairs"));
  const each = radio("each", t("One for each pair"));
  const field = createSavedField({
    label: t("Instruction for all pairs"),
    placeholder: t("Say what changes, as you would ask for it: “Turn it into a pencil drawing”"),
    save: store.writeAll,
  });
  const note = element("span", { class: "qet-quiet" });
  const foot = element("div", { class: "qet-row" }, note, field.mark);
  const box = element(
    "section", { class: "qet-instruction", "aria-label": t("Instruction") },
    element("div", { class: "qet-modes", role: "radiogroup", "aria-label": t("Instruction") }, all, each),
    field.field, foot,
  ); // prettier-ignore

  /** @param {"all"|"each"} value @param {string} text */
  function radio(value, text) {
    const input = element("input", {
      type: "radio",
      name: "qet-mode",
      value,
      on: { change: () => store.setMode(value) },
    });
    return element("label", { class: "qet-mode" }, input, text);
  }

  /** @param {number} lines @param {number} different */
  function remark(lines, different) {
    if (lines > 1) return t("{count} lines: each is an instruction of its own.", { count: lines });
    if (different > 1)
      return t("The pairs have {count} different instructions. Writing one here replaces them.", { count: different });
    return "";
  }

  return {
    element: box,
    flush: field.flush,
    reset: field.reset,
    focus: () => field.field.focus(),
    /** @param {boolean} isNext */
    show(isNext) {
      const { set, mode, uploads } = store.state;
      box.hidden = !set?.pairs.length;
      if (!set) return;
      const written = captionsOf(set);
      const isAll = mode === "all";
      field.field.readOnly = !uploads;
      all.firstElementChild.checked = isAll;
      each.firstElementChild.checked = !isAll;
      field.field.hidden = foot.hidden = !isAll && field.mark.dataset.state !== "failed";
      field.show(written.length === 1 ? written[0] : "");
      setText(note, remark(written.length === 1 ? linesOf(written[0]) : 0, written.length));
      box.dataset.next = String(isNext && isAll);
    },
  };
}

/** @param {string} text */
export function linesOf(text) {
  return text.split("\n").filter((line) => line.trim()).length;
}
