// @ts-check
/** The list of pairs. Rows are kept and only changed ones are drawn again, so 500 pairs stay fluid. */
import { element, setText } from "../trainer/dom.js";
import { t } from "../trainer/words.js";
import { createLonelyRow, createPairRow, createPicker, createSuggestedRow } from "./row.js";

/**
 * @typedef {import("./server.js").Picture} Picture
 * @typedef {import("./row.js").Row} Row
 */

/**
 * @typedef {import("./store.js").Store} Store
 * @typedef {import("./server.js").Pair} Pair
 * @type {Record<string, {passes: (store: Store, pair: Pair) => boolean, named: (count: number) => string}>}
 */
const FILTERS = {
  findings: {
    passes: (store, pair) => store.findings(pair).length > 0,
    named: (count) => t("With findings ({count})", { count }),
  },
  blank: { passes: (_store, pair) => !pair.caption, named: (count) => t("Without instruction ({count})", { count }) },
  held: { passes: (_store, pair) => pair.held_out, named: (count) => t("Held out ({count})", { count }) },
};

/**
 * @param {Store} store
 * @param {(key: string) => void} look Shows a pair large.
 */
export function createList(store, look) {
  const acceptAll = element("button", { type: "button", class: "qet-button qet-main qet-changing" }, t("Accept all"));
  const suggested = createSection(t("Suggested pairs"), acceptAll);
  const lonely = createSection(t("Without a partner"));
  const check = element("button", { type: "button", class: "qet-button" });
  const swapAll = element(
    "button",
    { type: "button", class: "qet-button qet-changing", title: t("Swap before and after in all pairs") },
    t("Swap all"),
  );
  const filter = element("select", { class: "qet-select", "aria-label": t("Which pairs to show") });
  const pairs = createSection(t("Pairs"), filter, check, swapAll);
  const box = element("div", {}, suggested.element, lonely.element, pairs.element);
  /** @type {Map<string, any>} Rows by kind and name. */
  let rows = new Map();
  let set = "";
  const given = { store, look, pick, next };

  acceptAll.addEventListener("click", () => store.match(store.state.set?.suggestions ?? []));
  check.addEventListener("click", () => store.state.checking || store.check());
  swapAll.addEventListener("click", () => store.swap(null));
  filter.addEventListener("change", show);
  box.addEventListener("keydown", byArrows);

  /**
   * Open the choice of another partner below a row.
   * @param {Picture} from
   * @param {any} row
   * @param {Picture|null} [partner] The one that it has.
   */
  function pick(from, row, partner) {
    row.querySelector(".qet-picker")?.remove();
    const picker = createPicker(store, from, partner, () => {
      picker.remove();
      row.querySelector('[data-do="pick"]')?.focus();
    });
    row.append(picker);
    picker.querySelector(".qet-choice")?.focus();
  }

  /** @param {any} row */
  function next(row) {
    rows.get(`p ${row.nextElementSibling?.getAttribute("aria-label")}`)?.focusText();
  }

  /** Up and down move between the same buttons of neighbouring rows, Delete deletes. @param {KeyboardEvent} event */
  function byArrows(event) {
    const control = /** @type {HTMLElement} */ (event.target);
    if (event.key === "Delete" && control.dataset.do) {
      /** @type {any} */ (control.closest("li"))?.querySelector('[data-do="delete"]')?.click();
    }
    const step = { ArrowDown: "nextElementSibling", ArrowUp: "previousElementSibling" }[event.key];
    if (!step || !control.dataset.do) return;
    const row = /** @type {any} */ (control.closest("li"))?.[step];
    const same = row?.querySelector(`[data-do="${control.dataset.do}"]`);
    if (!same) return;
    event.preventDefault();
    same.focus();
  }

  /** @template {Row} R @param {Map<string, any>} kept @param {string} id @param {() => R} make @returns {R} */
  function row(kept, id, make) {
    const found = rows.get(id) ?? make();
    kept.set(id, found);
    return found;
  }

  function show() {
    const { state } = store;
    if (state.name !== set) {
      rows = new Map();
      set = state.name;
      filter.value = "all";
    }
    const found = state.set;
    box.hidden = !found;
    if (!found) return;
    const focus = rememberFocus(box);
    const kept = new Map();
    const at = new Map(found.unmatched.map((picture) => [`${picture.side} ${picture.file}`, picture]));
    const suggestions = found.suggestions.map((each) => {
      const [reference, target] = [at.get(`reference ${each.reference}`), at.get(`target ${each.target}`)];
      const id = `s ${JSON.stringify([each, reference?.version, target?.version])}`;
      return row(kept, id, () => createSuggestedRow(given, each, reference, target));
    });
    const busy = new Set(
      found.suggestions.flatMap(({ reference, target }) => [`reference ${reference}`, `target ${target}`]),
    );
    const alone = found.unmatched.filter(({ side, file }) => !busy.has(`${side} ${file}`));
    const sides = new Set(found.unmatched.map(({ side }) => side));
    suggested.show(suggestions);
    lonely.show(
      alone.map((picture) => {
        const other = { target: "reference", reference: "target" }[String(picture.side)]; // none for further references
        const hasOthers = other !== undefined && (sides.has(/** @type {any} */ (other)) || found.pairs.length > 0);
        const id = `u ${JSON.stringify([picture, hasOthers])}`;
        return row(kept, id, () => createLonelyRow(given, picture, hasOthers));
      }),
    );
    offerFilters(found.pairs);
    const passes = FILTERS[filter.value]?.passes ?? (() => true);
    for (const pair of found.pairs) {
      row(kept, `p ${pair.key}`, () => createPairRow(given, pair.key)).show(pair, state.mode);
    }
    pairs.show(found.pairs.filter((pair) => passes(store, pair)).map(({ key }) => kept.get(`p ${key}`)));
    pairs.element.hidden = !found.pairs.length;
    rows = kept;
    setText(check, state.checking ? t("Checking…") : t("Check"));
    check.setAttribute("aria-busy", String(state.checking));
    focus(box);
  }

  /** Offer the filters that some pair passes, and the chosen one. @param {import("./server.js").Pair[]} all */
  function offerFilters(all) {
    const chosen = filter.value || "all";
    const choices = [
      { value: "all", count: all.length, text: t("All ({count})", { count: all.length }) },
      ...Object.entries(FILTERS).map(([value, { passes, named }]) => {
        const count = all.filter((pair) => passes(store, pair)).length;
        return { value, count, text: named(count) };
      }),
    ].filter(({ value, count }) => count || value === "all" || value === chosen);
    filter.hidden = choices.length < 2 && document.activeElement !== filter; // the focus would be lost
    const shown = JSON.stringify(choices);
    if (filter.dataset.shown === shown) return;
    filter.dataset.shown = shown;
    filter.replaceChildren(...choices.map(({ value, text }) => element("option", { value, text })));
    filter.value = chosen;
  }

  return {
    element: box,
    show,
    focusHeading() {
      const heading = /** @type {HTMLElement|null} */ (box.querySelector("section:not([hidden]) .qet-heading"));
      heading?.focus();
    },
    /** Save what is typed in the rows. @returns {Promise<boolean>} Whether all of it is saved. */
    async flush() {
      const done = await Promise.all([...rows.values()].map((each) => each.flush?.() ?? true));
      return done.every(Boolean);
    },
  };
}

/** A heading with buttons, and rows. @param {string} title @param {...any} tools */
function createSection(title, ...tools) {
  const count = element("span", { class: "qet-quiet" });
  const heading = element("h4", { class: "qet-heading", tabindex: "-1" }, `${title} `, count);
  const list = element("ul", { class: "qet-pairs-list", "aria-label": title });
  const head = element("div", { class: "qet-section-head" }, heading, element("div", { class: "qet-tools" }, ...tools));
  const box = element("section", { "aria-label": title, hidden: true }, head, list);
  return {
    element: box,
    /** @param {Row[]} rows */
    show(rows) {
      box.hidden = !rows.length;
      setText(count, String(rows.length));
      place(
        list,
        rows.map((row) => row.element),
      );
    },
  };
}

/** Make these the children, and move only those that are not in their place. @param {any} list @param {any[]} wanted */
function place(list, wanted) {
  const keep = new Set(wanted);
  for (const child of [...list.children]) if (!keep.has(child)) child.remove();
  let at = list.firstElementChild;
  for (const child of wanted) {
    if (child === at) at = at.nextElementSibling;
    else list.insertBefore(child, at);
  }
}

/**
 * If the focused row disappears, its successor gets the focus, or else the heading of the list.
 * @param {HTMLElement} box
 * @returns {(box: HTMLElement) => void} Call it when the rows have changed.
 */
function rememberFocus(box) {
  const focused = /** @type {HTMLElement|null} */ (document.activeElement);
  const row = focused && box.contains(focused) ? focused.closest("li") : null;
  if (!focused || !row) return () => {};
  const list = /** @type {HTMLElement} */ (row.parentElement);
  const index = [...list.children].indexOf(row);
  return () => {
    if (document.activeElement === focused) return;
    const heir = list.children[Math.min(index, list.children.length - 1)];
    const same = heir?.querySelector(`[data-do="${focused.dataset.do}"]`);
    const heading = box.querySelector("section:not([hidden]) .qet-heading");
    /** @type {HTMLElement|null|undefined} */ (same ?? heading)?.focus();
  };
}
