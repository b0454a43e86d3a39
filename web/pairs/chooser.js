// @ts-check
/** Chooses a data set, or makes a new one. */
import { element, setText } from "../trainer/dom.js";
import { t } from "../trainer/words.js";

/**
 * @param {import("./store.js").Store} store
 * @param {(name: string) => void} onChoose Called when the user has chosen or made a data set.
 */
export function createChooser(store, onChoose) {
  const select = element("select", { class: "qet-select qet-grow", "aria-label": t("Data set") });
  const start = element("button", { type: "button", class: "qet-button" });
  const name = element("input", {
    class: "qet-text",
    type: "text",
    "aria-label": t("Name of the new data set"),
    maxlength: 80,
  });
  const make = element("button", { type: "submit", class: "qet-button" }, t("Make"));
  const cancel = element("button", { type: "button", class: "qet-button" }, t("Cancel"));
  const wrong = element("p", { class: "qet-problem", role: "alert", hidden: true });
  const row = element("div", { class: "qet-row qet-chooser" }, select, start);
  const form = element("form", { hidden: true }, element("div", { class: "qet-new" }, name, make, cancel), wrong);

  /** @param {boolean} open */
  function toggle(open) {
    form.hidden = !open;
    row.hidden = open;
    wrong.hidden = true;
    if (!open) return start.focus();
    name.value = store.freeName();
    name.focus();
    return name.select();
  }

  start.addEventListener("click", () => toggle(true));
  cancel.addEventListener("click", () => toggle(false));
  form.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => event.key === "Escape" && toggle(false));
  form.addEventListener("submit", async (/** @type {SubmitEvent} */ event) => {
    event.preventDefault();
    try {
      const made = await store.make(name.value.trim());
      toggle(false);
      onChoose(made);
    } catch (error) {
      wrong.hidden = false;
      setText(wrong, /** @type {any} */ (error).message);
      name.focus();
    }
  });
  select.addEventListener("change", () => select.value && onChoose(select.value));

  return {
    element: element("div", {}, row, form),
    show() {
      const { sets, name: chosen, uploads } = store.state;
      start.hidden = !uploads;
      select.hidden = !sets.length;
      const choices = sets.map((set) => [set.name, `${set.name} (${set.pairs})`]);
      if (!chosen) choices.unshift(["", t("Choose a data set…")]);
      const shown = JSON.stringify(choices);
      if (select.dataset.shown !== shown) {
        select.dataset.shown = shown;
        select.replaceChildren(...choices.map(([value, text]) => element("option", { value, text })));
      }
      select.value = chosen;
      setText(start, sets.length ? t("New…") : t("New data set…"));
    },
  };
}
