// @ts-check
/** Parts of the panel that come and go: upload, problems of files, undo, and what the graph uses. */
import { element, setText } from "../trainer/dom.js";
import { listed, t } from "../trainer/words.js";

/** @param {import("./uploads.js").Uploads} uploads */
export function createProgress(uploads) {
  const bar = element("progress", { class: "qet-progress", max: 1, "aria-label": t("Upload") });
  const text = element("span", { class: "qet-quiet qet-name" });
  const cancel = element("button", { type: "button", class: "qet-button", on: { click: uploads.cancel } }, t("Cancel"));
  const box = element(
    "div",
    { class: "qet-upload", hidden: true },
    bar,
    element("div", { class: "qet-row" }, text, cancel),
  );
  return {
    element: box,
    show() {
      const progress = uploads.progress();
      box.hidden = !progress;
      if (!progress) return;
      bar.value = progress.share;
      setText(text, progress.name);
    },
  };
}

/** The problems of files, until they are cleared. @param {import("./uploads.js").Uploads} uploads */
export function createProblems(uploads) {
  const title = element("b");
  const list = element("ul");
  const clear = element("button", { type: "button", class: "qet-button", on: { click: uploads.clear } }, t("Clear"));
  const box = element(
    "section", { class: "qet-problems", "aria-label": t("Problems of files"), role: "alert", hidden: true },
    element("div", { class: "qet-row" }, title, clear), list,
  ); // prettier-ignore
  return {
    element: box,
    show() {
      const problems = uploads.problems();
      box.hidden = !problems.length;
      const count = problems.length;
      setText(title, count === 1 ? t("One file could not be used") : t("{count} files could not be used", { count }));
      while (list.children.length > count) list.lastElementChild.remove();
      problems.forEach((text, index) => {
        if (list.children[index]) setText(list.children[index], text);
        else list.append(element("li", { text }));
      });
    },
  };
}

/** What can be undone. @param {import("./store.js").Store} store */
export function createUndo(store) {
  const text = element("span", { class: "qet-name" });
  const act = element("button", { type: "button", class: "qet-button qet-main", on: { click: store.undo } }, t("Undo"));
  const close = element(
    "button",
    { type: "button", class: "qet-button", "aria-label": t("Dismiss"), on: { click: store.forgetUndo } },
    "✕",
  );
  const box = element(
    "div",
    { class: "qet-undo qet-row", role: "status" },
    text,
    element("span", { class: "qet-row" }, act, close),
  );
  return {
    element: box,
    show() {
      const { undo } = store.state;
      box.dataset.shown = String(Boolean(undo)); // not `hidden`: screen readers announce only changes inside
      setText(text, undo?.text ?? "");
      act.hidden = close.hidden = !undo;
    },
  };
}

/**
 * What is in the trash, to put back or to delete for good.
 * @param {import("./store.js").Store} store
 * @param {() => void} leave Moves the focus, because the buttons may disappear.
 */
export function createTrash(store, leave) {
  let asks = false;
  const trash = () => store.state.set?.trash;
  const ask = (/** @type {boolean} */ now) => {
    asks = now;
    show();
    (now ? keep : empty).focus();
  };
  const act = (/** @type {(trash: any) => any} */ change) => () => {
    asks = false;
    change(trash());
    leave();
  };
  const text = element("span", { class: "qet-name" });
  const made = (/** @type {string} */ label, /** @type {() => void} */ click) =>
    element("button", { type: "button", class: "qet-button", on: { click } }, label);
  const back = made(t("Put back"), act(({ newest }) => store.putBack(newest)));
  const empty = made(t("Empty…"), () => ask(true));
  const sure = made(t("Delete for good"), act((shown) => store.emptyTrash(shown)));
  const keep = made(t("Keep"), () => ask(false));
  const buttons = element("span", { class: "qet-row" }, back, empty, sure, keep);
  const box = element("section", { class: "qet-trash qet-row qet-changing", "aria-label": t("Trash") }, text, buttons);

  function show() {
    const { files = 0, size = "", newest = "", newest_files = [], state = "" } = trash() ?? {};
    box.hidden = !files;
    if (box.dataset.shown !== state) asks = false; // it was about something else
    box.dataset.shown = state;
    const asked = t("Files to delete for good: {count} ({size}). This can't be undone.", { count: files, size });
    setText(text, asks ? asked : t("Files in the trash: {count} ({size})", { count: files, size }));
    back.title = t("Put back what was removed last: {files}", { files: listed(newest_files) });
    back.hidden = asks || !newest;
    empty.hidden = asks;
    sure.hidden = keep.hidden = !asks;
  }

  return { element: box, show };
}

/** Says whether the graph uses the data set. @param {() => void} use @param {() => void} clear */
export function createUse(use, clear) {
  const offer = element("button", { type: "button", class: "qet-button qet-main", on: { click: use } });
  const text = element("p", { class: "qet-quiet" });
  const remove = element(
    "button",
    { type: "button", class: "qet-button", on: { click: clear } },
    t("Remove it from the node"),
  );
  const other = element("div", { class: "qet-other" }, text, remove);
  const box = element("div", {}, offer, other);
  return {
    element: box,
    /**
     * @param {boolean} offered
     * @param {string} instruction Of the node.
     * @param {string} way How the graph gets the data set.
     */
    show(offered, instruction, way) {
      offer.hidden = !offered;
      setText(offer, way);
      other.hidden = !instruction.trim();
      box.hidden = !offered && other.hidden;
      setText(
        text,
        t("The node has an instruction of its own, which is used for all pairs: “{instruction}”", { instruction }),
      );
    },
  };
}
