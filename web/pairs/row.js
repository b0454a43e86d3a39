// @ts-check
/** The rows of the list: a pair, a suggested pair, and a picture without a partner. */
import { element, setText } from "../trainer/dom.js";
import { labelled, listed, t } from "../trainer/words.js";
import { createSavedField } from "./saved_field.js";

/**
 * @typedef {import("./server.js").Picture} Picture
 * @typedef {import("./server.js").Pair} Pair
 * @typedef {import("./server.js").Suggestion} Suggestion
 * @typedef {import("./store.js").Store} Store
 * @typedef {{element: any, flush?: () => Promise<boolean>, focusText?: () => void}} Row
 * @typedef {{store: Store, look: (key: string) => void,
 *   pick: (from: Picture, row: any, partner?: Picture|null) => void, next: (row: any) => void}} Given
 *   `look` shows a pair large, `pick` opens the choice of another partner, `next` moves the focus to the next caption.
 */

const LIKE = 60; // percent; less alike pairs are suggested for their names only
const EDGE = 320; // pixels of a thumbnail; shown at about 150, or 300 on screens with twice the pixels

/**
 * A button of a row.
 * @param {string} name Says what it does, for the focus and the keys of the list.
 * @param {string} text
 * @param {string} title
 * @param {() => void} click
 */
function button(name, text, title, click) {
  return element("button", { type: "button", class: "qet-button", "data-do": name, title, on: { click } }, text);
}

/** A picture, or the place of a missing one. @param {Store} store @param {string} label */
function createFrame(store, label) {
  const picture = element("img", { alt: "", loading: "lazy", decoding: "async", draggable: "false" });
  const missing = element("span", { class: "qet-missing" });
  const frame = element(
    "span",
    { class: "qet-frame" },
    picture,
    missing,
    element("span", { class: "qet-corner", text: label }),
  );
  return {
    element: frame,
    /** @param {Picture|null|undefined} shown @param {string} [instead] */
    show(shown, instead = "") {
      picture.hidden = !shown;
      setText(missing, shown ? "" : instead);
      if (!shown) return;
      const address = store.picture(shown, EDGE);
      if (picture.getAttribute("src") === address) return;
      picture.setAttribute("src", address);
      picture.alt = named(label, shown);
    },
  };
}

/** What a picture is called. @param {string} label @param {Picture} picture */
export function named(label, { file, width, height }) {
  return width && height
    ? t("{label}: {file}, {width} × {height}", { label, file, width, height })
    : labelled(label, file);
}

/**
 * Both frames get the shape of the wider picture, so that the pair is easy to compare.
 * @param {any} box
 * @param {(Picture|null|undefined)[]} pictures
 */
function shape(box, pictures) {
  const ratios = pictures.flatMap((picture) =>
    picture?.width && picture.height ? [picture.width / picture.height] : [],
  );
  const ratio = Math.min(2, Math.max(0.75, ...ratios));
  box.style.setProperty("--qet-ratio", String(Number.isFinite(ratio) ? ratio : 1));
}

/** @param {Given} given @param {string} key */
export function createPairRow({ store, look, pick, next }, key) {
  const before = createFrame(store, t("before"));
  const after = createFrame(store, t("after"));
  const more = element("span", { class: "qet-more" });
  const largeOn = { click: () => look(key) };
  const pictures = element(
    "button", { type: "button", class: "qet-pictures", "data-do": "look", title: t("Look at it large"), on: largeOn },
    before.element, after.element,
  ); // prettier-ignore
  const held = element("span", { class: "qet-badge", text: t("held out") });
  const caption = createSavedField({
    label: t("Instruction of {name}", { name: key }),
    placeholder: t("What changes in this pair?"),
    save: (text) => store.writeOne(key, text),
    onEnter: () => next(row),
  });
  const text = element("div", { class: "qet-own" }, caption.field, caption.mark);
  const findings = element("ul", { class: "qet-findings", "aria-label": t("Findings of the check") });
  const swap = button("swap", t("Swap"), t("Swap before and after of this pair"), () => store.swap([key]));
  const hold = button("hold", t("Hold out"), t("Do not train on this pair; preview the training with it"), () =>
    store.holdOut(key, !pair?.held_out),
  );
  const remove = button("delete", t("Delete"), t("Move this pair to the trash"), () => {
    if (pair)
      store.remove(
        [...pair.reference, pair.target].flatMap((each) => each ?? []),
        key,
      );
  });
  const other = button("pick", t("Choose another…"), t("Choose another picture before the edit"), () => {
    if (pair?.target) pick(pair.target, row, pair.reference[0]);
  });
  const name = element("span", { class: "qet-name", text: key });
  const row = element(
    "li", { class: "qet-pair", "aria-label": key },
    element("div", { class: "qet-sides" }, pictures, more),
    element("div", { class: "qet-about" }, element("div", { class: "qet-row" }, name, held), text, findings,
      element("div", { class: "qet-actions" }, swap, hold, other, remove)),
  ); // prettier-ignore
  /** @type {Pair|undefined} */
  let pair;
  let shown = "";

  return {
    element: row,
    flush: caption.flush,
    focusText: () => caption.field.focus(),
    /** @param {Pair} fresh @param {"all"|"each"} mode */
    show(fresh, mode) {
      const found = store.findings(fresh);
      const { set, uploads } = store.state;
      const hasOthers = Boolean(
        set && (set.pairs.length > 1 || set.unmatched.some(({ side }) => side === "reference")),
      );
      const now = [mode, hasOthers, uploads, ...found].join("\n");
      if (fresh === pair && now === shown) return;
      pair = fresh;
      shown = now;
      before.show(fresh.reference[0], t("missing"));
      after.show(fresh.target, t("missing"));
      shape(pictures, [fresh.reference[0], fresh.target]);
      const others = fresh.reference.slice(1).flatMap((each) => each ?? []);
      more.replaceChildren(
        ...others.map((each) => {
          const src = store.picture(each, EDGE);
          return element("img", { src, alt: each.file, title: each.file, loading: "lazy", draggable: "false" });
        }),
      );
      held.hidden = !fresh.held_out;
      hold.setAttribute("aria-pressed", String(fresh.held_out));
      other.hidden = !hasOthers;
      text.hidden = mode === "all";
      caption.field.readOnly = !uploads;
      caption.show(fresh.caption);
      findings.hidden = !found.length;
      findings.replaceChildren(
        ...found.map((sentence) => element("li", { text: sentence[0].toUpperCase() + sentence.slice(1) })),
      );
    },
  };
}

/**
 * @param {Given} given
 * @param {Suggestion} suggestion
 * @param {Picture|undefined} reference
 * @param {Picture|undefined} target
 */
export function createSuggestedRow({ store, pick }, suggestion, reference, target) {
  const before = createFrame(store, t("before"));
  const after = createFrame(store, t("after"));
  before.show(reference, t("missing"));
  after.show(target, t("missing"));
  const likeness = Math.round(suggestion.likeness * 100);
  const why = likeness < LIKE ? t("named alike") : t("{likeness} % alike", { likeness });
  const pictures = element("div", { class: "qet-pictures" }, before.element, after.element);
  shape(pictures, [reference, target]);
  const row = element("li", {
    class: "qet-pair qet-suggested",
    "aria-label": listed([suggestion.reference, suggestion.target]),
  });
  const accept = button("accept", t("Accept"), t("Make these two a pair"), () => store.match([suggestion]));
  const other = button("pick", t("Choose another…"), t("Choose another picture after the edit"), () => {
    if (reference) pick(reference, row);
  });
  row.append(
    element("div", { class: "qet-sides" }, pictures),
    element("div", { class: "qet-about" },
      element("span", { class: "qet-name", text: [suggestion.reference, suggestion.target].join(" → ") }),
      element("span", { class: "qet-quiet", text: why }),
      element("div", { class: "qet-actions" }, accept, other)),
  ); // prettier-ignore
  return { element: row };
}

/**
 * @param {Given} given
 * @param {Picture} picture
 * @param {boolean} hasOthers Whether there are pictures of the other side that could be its partner.
 */
export function createLonelyRow({ store, pick }, picture, hasOthers) {
  const isAfter = picture.side === "target";
  const here = createFrame(store, isAfter ? t("after") : t("before"));
  const hole = createFrame(store, isAfter ? t("before") : t("after"));
  here.show(picture);
  hole.show(null, t("missing"));
  const pictures = element(
    "div",
    { class: "qet-pictures" },
    ...(isAfter ? [hole, here] : [here, hole]).map((each) => each.element),
  );
  shape(pictures, [picture]);
  const row = element("li", { class: `qet-pair ${hasOthers ? "qet-lonely" : ""}`, "aria-label": picture.file });
  const choose = button("pick", t("Choose its partner…"), t("Choose the picture of the other side"), () =>
    pick(picture, row),
  );
  choose.hidden = !hasOthers;
  const remove = button("delete", t("Delete"), t("Move this picture to the trash"), () =>
    store.remove([picture], picture.file),
  );
  row.append(
    element("div", { class: "qet-sides" }, pictures),
    element("div", { class: "qet-about" },
      element("span", { class: "qet-name", text: picture.file }),
      element("div", { class: "qet-actions" }, choose, remove)),
  ); // prettier-ignore
  return { element: row };
}

/**
 * The pictures of the other side, as buttons: first those without a partner. If one of a pair is chosen instead of a
 * partner, the two pairs exchange these pictures, so that none is left alone.
 * @param {Store} store
 * @param {Picture} from
 * @param {Picture|null|undefined} partner Of `from`, which is not offered.
 * @param {() => void} close
 */
export function createPicker(store, from, partner, close) {
  const isAfter = from.side === "target";
  const { unmatched = [], pairs = [] } = store.state.set ?? {};
  const alone = unmatched.filter(({ side }) => side === (isAfter ? "reference" : "target"));
  const offered = [
    ...alone.map((picture) => ({ picture, its: null })),
    ...pairs.map(({ reference: [first], target }) =>
      isAfter ? { picture: first, its: target } : { picture: target, its: first },
    ),
  ];
  const match = (/** @type {Picture} */ one, /** @type {Picture} */ other) =>
    isAfter ? { reference: one.file, target: other.file } : { reference: other.file, target: one.file };
  const choices = offered.flatMap(({ picture, its }) => {
    if (!picture || picture === partner) return [];
    const click = () => {
      close();
      store.match([match(picture, from), ...(partner && its ? [match(partner, its)] : [])]);
    };
    const title = its ? t("{file}, which is in a pair", { file: picture.file }) : picture.file;
    const image = element("img", { src: store.picture(picture, EDGE), alt: "", loading: "lazy", draggable: "false" });
    return element(
      "button",
      { type: "button", class: "qet-choice", title, on: { click } },
      image,
      element("span", { text: picture.file }),
    );
  });
  const label = isAfter ? t("Which picture was it before the edit?") : t("Which picture is it after the edit?");
  const head = element(
    "div",
    { class: "qet-row" },
    element("span", { text: label }),
    button("close", t("Cancel"), t("Cancel"), close),
  );
  const keydown = (/** @type {KeyboardEvent} */ event) => event.key === "Escape" && close();
  return element(
    "div",
    { class: "qet-picker", role: "group", "aria-label": label, on: { keydown } },
    head,
    element("div", { class: "qet-choices" }, ...choices),
  );
}
