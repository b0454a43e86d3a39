// @ts-check
/** Shows one pair large, in a dialog. The arrow keys go to the pair before and the pair after. */
import { element, setText } from "../trainer/dom.js";
import { t } from "../trainer/words.js";
import { named } from "./row.js";

const EDGE = 1024; // pixels

/** @param {import("./store.js").Store} store */
export function createLook(store) {
  const before = element("img", { draggable: "false" });
  const after = element("img", { draggable: "false" });
  const title = element("h3", { class: "qet-heading qet-name" });
  const caption = element("p", { class: "qet-caption" });
  const back = step("‹", t("Previous pair"), -1);
  const on = step("›", t("Next pair"), 1);
  const close = element(
    "button",
    { type: "button", class: "qet-button", on: { click: () => box.close() } },
    t("Close"),
  );
  const box = element(
    "dialog", { class: "qet-look", "aria-label": t("Pair") },
    element("div", { class: "qet-row" }, title, element("span", { class: "qet-row" }, back, on, close)),
    element("div", { class: "qet-look-sides" }, side(before, t("before")), side(after, t("after"))), caption,
  ); // prettier-ignore
  let key = "";

  /** @param {string} text @param {string} label @param {number} by */
  function step(text, label, by) {
    return element(
      "button",
      { type: "button", class: "qet-button", "aria-label": label, title: label, on: { click: () => go(by) } },
      text,
    );
  }

  /** @param {any} picture @param {string} label */
  function side(picture, label) {
    return element("span", { class: "qet-frame" }, picture, element("span", { class: "qet-corner", text: label }));
  }

  /** @param {number} by */
  function go(by) {
    const pairs = store.state.set?.pairs ?? [];
    const next = pairs[pairs.findIndex((pair) => pair.key === key) + by];
    if (next) show(next.key);
  }

  /** @param {string} wanted */
  function show(wanted) {
    const pairs = store.state.set?.pairs ?? [];
    const index = pairs.findIndex((pair) => pair.key === wanted);
    const pair = pairs[index];
    if (!pair) return;
    key = wanted;
    setText(title, key);
    setText(caption, pair.caption);
    fill(before, pair.reference[0], t("before"));
    fill(after, pair.target, t("after"));
    back.disabled = index === 0;
    on.disabled = index === pairs.length - 1;
  }

  /** @param {any} picture @param {import("./server.js").Picture|null|undefined} shown @param {string} label */
  function fill(picture, shown, label) {
    picture.hidden = !shown;
    if (!shown) return;
    picture.src = store.picture(shown, EDGE);
    picture.alt = named(label, shown);
  }

  box.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (by) go(by);
  });
  box.addEventListener("click", (/** @type {MouseEvent} */ event) => event.target === box && box.close());

  return {
    element: box,
    /** @param {string} wanted */
    open(wanted) {
      show(wanted);
      box.showModal();
    },
  };
}
