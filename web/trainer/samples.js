// @ts-check
/** Validation pictures: a strip of thumbnails by step, and a comparison of two pictures with a divider. */
import { element, setText } from "./dom.js";
import { t } from "./words.js";

/**
 * @typedef {import("./store.js").Run} Run
 * @typedef {import("./store.js").Sample} Sample
 * @typedef {import("./store.js").Store} Store
 */

const THUMB_EDGE = 192; // pixels; size of the requested thumbnails
const TALLEST = 1200; // pixels; height of the compared pictures

/**
 * The column with the trained result: the LoRA, or its EMA if there is no LoRA picture.
 * @param {string[]} columns
 */
function drawn(columns) {
  return columns.includes("lora") ? "lora" : "ema";
}

/**
 * Thumbnails of one pair: base, the LoRA's picture at every step, target.
 * @param {Store} store
 * @param {(step: number) => void} onPick
 */
export function createStrip(store, onPick) {
  const list = element("div", { class: "qet-strip", role: "group", "aria-label": t("Validation pictures by step") });
  /** @type {Map<string, any>} */
  let shown = new Map();

  /**
   * @param {Run} run
   * @param {Sample} sample
   * @param {number} pair
   * @param {string} column
   * @param {string} label
   * @returns {[string, any]} Address of the picture, and its button, reused if it exists.
   */
  function thumb(run, sample, pair, column, label) {
    const address = store.pictureAddress(run.run_name, sample, pair, column, THUMB_EDGE);
    const known = shown.get(address);
    if (known) return [address, known];
    const picture = element("img", { src: address, alt: "", loading: "lazy", draggable: "false" });
    const on = { click: () => onPick(sample.step) };
    const name = column === drawn(sample.pairs[pair].columns) ? t("Step {step}", { step: sample.step }) : label;
    const attributes = { type: "button", class: "qet-thumb", "aria-label": name, title: name, on };
    return [address, element("button", attributes, picture, element("span", { text: label }))];
  }

  return {
    element: list,
    /** @param {Run} run @param {number} pair @param {number} [chosen] The step to mark as selected. */
    show(run, pair, chosen) {
      const samples = (run.samples ?? []).filter((sample) => sample.pairs[pair]);
      const newest = samples[samples.length - 1];
      const columns = newest?.pairs[pair].columns ?? [];
      const wanted = samples.map((sample) => {
        return thumb(run, sample, pair, drawn(sample.pairs[pair].columns), String(sample.step));
      });
      if (columns.includes("base")) wanted.unshift(thumb(run, newest, pair, "base", t("base")));
      if (columns.includes("target")) wanted.push(thumb(run, newest, pair, "target", t("target")));
      const atEnd = list.scrollLeft + list.clientWidth >= list.scrollWidth - 8;
      const next = new Map(wanted);
      if ([...next.keys()].join() !== [...shown.keys()].join()) {
        list.replaceChildren(...next.values());
        if (atEnd) list.scrollLeft = list.scrollWidth;
      }
      shown = next;
      samples.forEach((sample, index) => {
        const button = wanted[index + (columns.includes("base") ? 1 : 0)][1];
        if (chosen !== undefined) button.setAttribute("aria-pressed", String(sample.step === chosen));
      });
      list.hidden = !samples.length;
    },
  };
}

/**
 * Compares the LoRA's picture at a step with the base, target or reference picture of the same pair.
 * @param {Store} store
 * @param {(step: number, pair: number) => void} onShown Called with what is compared.
 * @param {any[]} actions Buttons for the step that is compared.
 */
export function createComparison(store, onShown, actions) {
  const under = element("img", { alt: "", draggable: "false" });
  const over = element("img", { alt: "", draggable: "false", class: "qet-over" });
  const leftLabel = element("span", { class: "qet-corner qet-left" });
  const rightLabel = element("span", { class: "qet-corner qet-right" });
  const stack = element("div", { class: "qet-stack" }, under, over, leftLabel, rightLabel);
  under.addEventListener("load", () => {
    stack.style.maxWidth = `${(TALLEST * under.naturalWidth) / under.naturalHeight}px`;
  });
  const divider = slider("qet-divider", 0, 100, 50);
  const steps = slider("qet-steps", 0, 0, 0);
  const stepLabel = element("output", { class: "qet-step-label" });
  const against = element("select", { "aria-label": t("Compare with"), class: "qet-select" });
  const pairs = element("select", { "aria-label": t("Pair"), class: "qet-select" });
  const caption = element("p", { class: "qet-caption" });
  const strip = createStrip(store, choose);
  const box = element(
    "section", { class: "qet-compare", "aria-label": t("Validation pictures") },
    element("div", { class: "qet-row" }, pairs, element("label", {}, t("against"), " ", against)),
    stack, divider,
    element("label", { class: "qet-row qet-step-row" }, t("step"), " ", steps, stepLabel),
    strip.element, caption, element("div", { class: "qet-actions" }, ...actions),
  ); // prettier-ignore
  /** @type {Run|undefined} */
  let run;
  /** @type {number|undefined} The selected step; undefined follows the newest. */
  let chosen;

  /** @param {number} step */
  function choose(step) {
    const newest = run?.samples?.[run.samples.length - 1];
    chosen = newest && step >= newest.step ? undefined : step;
    paint();
  }

  function divide() {
    stack.style.setProperty("--qet-divide", `${divider.value}%`);
  }

  /** @param {PointerEvent} event */
  function drag(event) {
    if (event.type === "pointermove" && !event.buttons) return;
    const place = stack.getBoundingClientRect();
    divider.value = String(Math.round(((event.clientX - place.left) / place.width) * 100));
    divide();
  }

  function paint() {
    const samples = run?.samples ?? [];
    box.hidden = !run || !samples.length;
    if (!run || !samples.length) return;
    const wanted = chosen ?? Infinity;
    const found = samples.findIndex((sample) => sample.step >= wanted);
    const index = found < 0 ? samples.length - 1 : found;
    const sample = samples[index];
    offer(pairs, sample.pairs.map((_, number) => [String(number), t("pair {number}", { number: number + 1 })]));
    pairs.hidden = sample.pairs.length < 2;
    const number = Math.min(Number(pairs.value) || 0, sample.pairs.length - 1);
    const pair = sample.pairs[number];
    const trained = drawn(pair.columns);
    const others = ["base", "target", ...pair.columns].filter(known(pair.columns, trained));
    offer(against, others.map((name) => [name, named(name)]));
    steps.max = String(samples.length - 1);
    steps.value = String(index);
    steps.disabled = samples.length < 2;
    setText(stepLabel, String(sample.step));
    steps.setAttribute("aria-valuetext", t("step {step}", { step: sample.step }));
    const name = run.run_name;
    const shown = t("{picture} at step {step}", { picture: named(trained), step: sample.step });
    setSource(under, store.pictureAddress(name, sample, number, trained), shown);
    setSource(over, store.pictureAddress(name, sample, number, against.value), named(against.value));
    setText(leftLabel, named(against.value));
    setText(rightLabel, t("{picture}, step {step}", { picture: named(trained), step: sample.step }));
    divider.setAttribute("aria-label", t("Share of the width that shows {picture}", { picture: named(against.value) }));
    setText(caption, pair.label ? `${pair.caption} (${pair.label})` : pair.caption);
    strip.show(run, number, sample.step);
    onShown(sample.step, number);
  }

  divider.addEventListener("input", divide);
  steps.setAttribute("aria-label", t("Step"));
  steps.addEventListener("input", () => choose(run?.samples?.[Number(steps.value)]?.step ?? 0));
  against.addEventListener("change", paint);
  pairs.addEventListener("change", paint);
  stack.addEventListener("pointerdown", drag);
  stack.addEventListener("pointermove", drag);
  divide();

  return {
    element: box,
    choose,
    /** @param {Run} next */
    show(next) {
      if (next.run_name !== run?.run_name) chosen = undefined;
      run = next;
      paint();
    },
  };
}

/** @param {string} name @param {number} min @param {number} max @param {number} value */
function slider(name, min, max, value) {
  return element("input", { type: "range", class: `qet-slider ${name}`, min, max, value, step: 1 });
}

/**
 * Filter for the columns to compare with: those that the pair has, once each, without the trained one.
 * @param {string[]} columns
 * @param {string} trained
 */
function known(columns, trained) {
  return (/** @type {string} */ name, /** @type {number} */ index, /** @type {string[]} */ all) =>
    columns.includes(name) && name !== trained && all.indexOf(name) === index;
}

/** @param {string} column */
function named(column) {
  const names = { base: t("base"), target: t("target"), "reference-1": t("reference"), lora: "LoRA", ema: "EMA" };
  return names[/** @type {keyof typeof names} */ (column)] ?? column.replaceAll("-", " ");
}

/** Set the choices of a select; keep its value if possible. @param {any} select @param {string[][]} choices */
function offer(select, choices) {
  const before = select.value;
  const same = [...select.options].map((option) => option.value).join() === choices.map(([value]) => value).join();
  if (same) return;
  select.replaceChildren(...choices.map(([value, text]) => element("option", { value, text })));
  if (choices.some(([value]) => value === before)) select.value = before;
}

/** @param {any} picture @param {string} address @param {string} text */
function setSource(picture, address, text) {
  if (picture.getAttribute("src") !== address) picture.setAttribute("src", address);
  picture.alt = text;
}
