// @ts-check
/** Where pictures are dropped: one zone for each side, and one for a ZIP file or a folder with both. */
import { element, setText } from "../trainer/dom.js";
import { labelled, t } from "../trainer/words.js";
import { filesIn, filesOf, hasFiles, inSeveralFolders } from "./dropped.js";

/**
 * @typedef {import("./dropped.js").Dropped} Dropped
 * @typedef {(side: string, files: Dropped[]) => void} OnFiles
 */

const KINDS = ".png,.jpg,.jpeg,.webp,.bmp,.tif,.tiff,.avif,.txt,.zip";

/** @param {OnFiles} onFiles */
export function createZones(onFiles) {
  const before = createZone("reference", t("Before"), t("Drop the pictures before the edit"), onFiles);
  const after = createZone("target", t("After"), t("Drop the pictures after the edit"), onFiles);
  const zip = chooser(t("Choose a ZIP file…"), { accept: ".zip" }, (files) => give("auto", files, onFiles));
  const folder = chooser(t("Choose a folder…"), { webkitdirectory: true }, (files) => give("auto", files, onFiles));
  const both = element(
    "div", { class: "qet-both", role: "group", "aria-label": t("Both sides at once") },
    element("span", { class: "qet-quiet", text: t("Both sides in one folder or ZIP file? Drop it anywhere here.") }),
    element("span", { class: "qet-row" }, zip, folder),
  ); // prettier-ignore
  const box = element("div", { class: "qet-zones" }, before.element, after.element, both);
  return {
    element: box,
    /** @param {import("./server.js").DataSet|undefined} set @param {string} next The step that is next. */
    show(set, next) {
      const pictures = set ? set.pairs.length + set.unmatched.length : 0;
      box.dataset.size = pictures ? "small" : "large";
      before.show(count(set, "reference"), next === "drop" || next === "before");
      after.show(count(set, "target"), next === "drop" || next === "after");
    },
  };
}

/** @param {string} side @param {string} title @param {string} invitation @param {OnFiles} onFiles */
function createZone(side, title, invitation, onFiles) {
  const number = element("span", { class: "qet-quiet" });
  const name = labelled(title, t("Choose…"));
  const onChosen = (/** @type {Dropped[]} */ files) => give(side, files, onFiles);
  const choose = chooser(t("Choose…"), { accept: KINDS, multiple: true, name }, onChosen);
  const hint = element("span", { class: "qet-quiet qet-hint", text: invitation });
  const head = element("span", { class: "qet-zone-head" }, element("b", { text: title }), number);
  const box = element(
    "div",
    { class: "qet-zone", role: "group", "aria-label": title, "data-side": side },
    head,
    hint,
    choose,
  );
  return {
    element: box,
    /** @param {number} count @param {boolean} isNext */
    show(count, isNext) {
      setText(number, count ? String(count) : "");
      box.dataset.next = String(isNext);
    },
  };
}

/**
 * A button that opens the browser's file chooser.
 * @param {string} text
 * @param {{accept?: string, multiple?: boolean, webkitdirectory?: boolean, name?: string}} options
 * @param {(files: Dropped[]) => void} onFiles
 */
function chooser(text, { name, ...options }, onFiles) {
  const input = element("input", { type: "file", hidden: true, tabindex: "-1", ...options });
  input.addEventListener("change", () => {
    onFiles(filesIn(input.files));
    input.value = ""; // so that choosing the same file again is a change
  });
  const on = { click: () => input.click() };
  return element(
    "span",
    {},
    element("button", { type: "button", class: "qet-button", "aria-label": name, on }, text),
    input,
  );
}

/** @param {string} side @param {Dropped[]} files @param {OnFiles} onFiles */
function give(side, files, onFiles) {
  if (files.length) onFiles(side !== "auto" && inSeveralFolders(files) ? "auto" : side, files);
}

/**
 * Accept drops anywhere in the panel. Outside the zones, and for folders with both sides, the server finds the sides.
 * ComfyUI would open a dropped picture as a graph, so it never sees these events.
 * @param {HTMLElement} root
 * @param {OnFiles} onFiles
 * @param {(text: string) => void} onUseless Called if nothing that was dropped is a file.
 */
export function acceptDrops(root, onFiles, onUseless) {
  let depth = 0; // `dragenter` and `dragleave` come for every child
  /** @param {DragEvent} event */
  const zoneOf = (event) =>
    /** @type {HTMLElement|null} */ (/** @type {Element} */ (event.target).closest?.(".qet-zone"));
  const mark = (/** @type {Element|null} */ zone) =>
    root.querySelectorAll(".qet-zone").forEach((each) => each.toggleAttribute("data-over", each === zone));

  const on = {
    dragenter: () => (depth += 1),
    dragover(/** @type {DragEvent} */ event) {
      if (event.dataTransfer) event.dataTransfer.dropEffect = hasFiles(event) ? "copy" : "none";
      root.toggleAttribute("data-dragging", hasFiles(event));
      mark(zoneOf(event));
    },
    dragleave() {
      depth = Math.max(0, depth - 1);
      if (!depth) rest();
    },
    async drop(/** @type {DragEvent} */ event) {
      rest();
      const side = zoneOf(event)?.dataset.side ?? "auto";
      const files = event.dataTransfer ? await filesOf(event.dataTransfer).catch(() => undefined) : [];
      if (!files) onUseless(t("A dropped file or folder can't be read, so nothing was uploaded. Drop them again."));
      else if (files.length) give(side, files, onFiles);
      else onUseless(t("Nothing in there is a file. Save the pictures first, and drop the files."));
    },
  };
  function rest() {
    depth = 0;
    root.removeAttribute("data-dragging");
    mark(null);
  }
  for (const [name, act] of Object.entries(on)) {
    root.addEventListener(name, (event) => {
      event.preventDefault();
      event.stopPropagation();
      act(/** @type {DragEvent} */ (event));
    });
  }
}

/** Pictures of a side. @param {import("./server.js").DataSet|undefined} set @param {"reference"|"target"} side */
function count(set, side) {
  const inPairs = (set?.pairs ?? []).filter((pair) => (side === "target" ? pair.target : pair.reference[0]));
  return inPairs.length + (set?.unmatched ?? []).filter((picture) => picture.side === side).length;
}
