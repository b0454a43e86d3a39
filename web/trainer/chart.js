// @ts-check
/** SVG chart of the loss (raw and smoothed), the validation results and the learning rate. */
import { isHeldOut, nearest, range, smoothed, smoothingWindow, ticks } from "./chart_data.js";
import { element, onceAFrame, svg } from "./dom.js";
import * as format from "./format.js";
import { labelled, listed, t } from "./words.js";

/** @typedef {import("./store.js").Curve} Curve */

const LEFT = 46;
const RIGHT = 10;
const TOP = 6;
const BOTTOM = 18;
const RATE_BAND = 22; // height in pixels of the learning rate band below the losses
const SLIDER = ["tabindex", "aria-valuemin", "aria-valuemax", "aria-valuenow", "aria-valuetext"];
const KEYS = /** @type {Record<string, number>} How many points each key moves. */ ({
  ArrowLeft: -1,
  ArrowDown: -1,
  ArrowRight: 1,
  ArrowUp: 1,
  PageDown: -10,
  PageUp: 10,
  Home: -Infinity,
  End: Infinity,
});

/** The label of a line. @param {string} name */
function label(name) {
  const labels = /** @type {Record<string, string>} */ ({
    loss: t("loss"),
    smooth: t("smoothed"),
    validation_loss: t("validation"),
    ema_validation_loss: t("validation, EMA"),
    rate: t("learning rate"),
    drift_shift: t("drift, pixels"),
    drift_zoom: t("drift, % zoom"),
    drift_colour: t("drift, colour"),
  });
  return labels[name] ?? name.replaceAll("_", " ");
}

export function createChart() {
  const legend = element("div", { class: "qet-legend", "aria-hidden": "true" });
  const plot = svg("svg", { class: "qet-plot" });
  const box = element("div", { class: "qet-chart" }, legend, plot);
  /** @type {Curve|undefined} */
  let curve;
  /** @type {number|undefined} The step selected by pointer or keyboard. */
  let pointed;
  let withDrift = false;

  const paint = onceAFrame(() => {
    const [width, height] = [plot.clientWidth, plot.clientHeight];
    const view = curve?.steps.length ? prepare(curve, width, height, withDrift) : undefined;
    plot.replaceChildren(...(view ? [...axes(view), ...lines(view), ...pointer(view, pointed)] : [note()]));
    legend.replaceChildren(...(view ? entries(view, pointed) : []));
    describe(plot, view, pointed);
  });

  /** @param {number|undefined} step */
  function point(step) {
    pointed = step;
    paint();
  }

  plot.addEventListener("pointermove", (/** @type {PointerEvent} */ event) => {
    if (!curve?.steps.length) return;
    const place = plot.getBoundingClientRect(); // includes the canvas zoom, unlike clientWidth
    const inside = ((event.clientX - place.left) / place.width) * plot.clientWidth;
    const share = (inside - LEFT) / Math.max(1, plot.clientWidth - LEFT - RIGHT);
    const [first, last] = [curve.steps[0], curve.steps[curve.steps.length - 1]];
    point(curve.steps[nearest(curve.steps, first + share * (last - first))]);
  });
  const byKeys = () => plot.matches(":focus-visible"); // a click also focuses, but must not keep a step selected
  plot.addEventListener("pointerleave", () => byKeys() || point(undefined));
  plot.addEventListener("focus", () => byKeys() && point(pointed ?? curve?.steps[curve.steps.length - 1]));
  plot.addEventListener("blur", () => point(undefined));
  plot.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
    const move = KEYS[event.key];
    if (!move || !curve?.steps.length) return;
    event.preventDefault();
    event.stopPropagation(); // ComfyUI's canvas also handles these keys
    const last = curve.steps.length - 1;
    const index = pointed === undefined ? last : nearest(curve.steps, pointed);
    point(curve.steps[Math.min(last, Math.max(0, index + move))]);
  });
  new ResizeObserver(paint).observe(plot);

  return {
    element: box,
    /** @param {Curve|undefined} next */
    show(next) {
      if (next === curve) return;
      curve = next;
      paint();
    },
    /** @param {boolean} wanted */
    showDrift(wanted) {
      withDrift = wanted;
      paint();
    },
  };
}

function note() {
  const middle = { x: "50%", y: "50%", "text-anchor": "middle" };
  return svg("text", { ...middle, text: t("No finished steps yet") });
}

/**
 * Scales and series for one rendering.
 * @param {Curve} curve
 * @param {number} width
 * @param {number} height
 * @param {boolean} withDrift
 */
function prepare(curve, width, height, withDrift) {
  const { steps, loss } = curve;
  const means = smoothed(loss, smoothingWindow(loss.length));
  const held = Object.entries(curve.measured).filter(([name]) => isHeldOut(name));
  const others = withDrift ? Object.entries(curve.measured).filter(([name]) => !isHeldOut(name)) : [];
  const [low, high] = range(loss, [...means, ...held.flatMap(([, points]) => points.map((point) => point[1]))]);
  const [first, last] = [steps[0], Math.max(steps[steps.length - 1], steps[0] + 1)];
  const foot = height - BOTTOM - RATE_BAND - 4;
  return {
    curve, means, held, others, low, high, first, last, width, height, foot,
    x: (/** @type {number} */ step) => LEFT + ((step - first) / (last - first)) * (width - LEFT - RIGHT),
    y: (/** @type {number} */ value) => Math.max(TOP, foot - ((value - low) / (high - low)) * (foot - TOP)),
  }; // prettier-ignore
}

/** @typedef {ReturnType<typeof prepare>} View */

/** @param {View} view */
function axes(view) {
  const { width, height, foot } = view;
  const before = { x: LEFT - 5, "text-anchor": "end" };
  const rows = ticks(view.low, view.high, Math.max(2, Math.floor((foot - TOP) / 34))).flatMap((value) => [
    svg("line", { x1: LEFT, x2: width - RIGHT, y1: view.y(value), y2: view.y(value), class: "qet-grid" }),
    svg("text", { ...before, y: view.y(value) + 3.5, text: String(Number(value.toPrecision(6))) }),
  ]);
  const whole = ticks(view.first, view.last, Math.max(2, Math.floor((width - LEFT) / 48))).filter(Number.isInteger);
  const columns = whole.map((step) =>
    svg("text", { x: view.x(step), y: height - 4, "text-anchor": "middle", text: String(step) }),
  );
  return [...rows, ...columns, svg("text", { ...before, y: height - BOTTOM - 6, text: t("rate") })];
}

/** @param {View} view */
function lines(view) {
  const { curve } = view;
  const highest = Math.max(...curve.learning_rate.map((value) => value ?? 0)) || 1;
  const base = view.height - BOTTOM;
  const rates = curve.steps.map((step, index) => [
    view.x(step),
    base - ((curve.learning_rate[index] ?? 0) / highest) * (RATE_BAND - 4),
  ]);
  const at = (/** @type {number[]} */ values) =>
    curve.steps.map((step, index) => [view.x(step), view.y(values[index])]);
  return [
    path(rates, "qet-line-rate"),
    path(at(curve.loss), "qet-line-loss"),
    path(at(view.means), "qet-line-smooth"),
    ...view.others.map(([, points], index) => scaled(view, points, `qet-line-other qet-other-${index}`)),
    ...view.held.flatMap(([, points], index) => marked(view, points, `qet-line-held qet-held-${index}`)),
  ];
}

/**
 * A line with its own scale: zero at the bottom, its largest value near the top.
 * @param {View} view
 * @param {number[][]} points
 * @param {string} name
 */
function scaled(view, points, name) {
  const top = Math.max(...points.map((point) => point[1])) || 1;
  const own = points.map(([step, value]) => [view.x(step), view.foot - (value / top) * (view.foot - TOP) * 0.9]);
  return path(own, name);
}

/** @param {View} view @param {number[][]} points @param {string} name */
function marked(view, points, name) {
  const places = points.map(([step, value]) => [view.x(step), view.y(value)]);
  const marks = places.map(([x, y]) => svg("circle", { cx: x.toFixed(1), cy: y.toFixed(1), r: 3, class: name }));
  return [path(places, name), ...marks];
}

/** @param {number[][]} places @param {string} name */
function path(places, name) {
  const drawn = places.filter((place) => place.every(Number.isFinite));
  const points = drawn.map(([x, y]) => `${x.toFixed(1)},${y.toFixed(1)}`).join(" ");
  return svg("polyline", { points, class: `qet-line ${name}` });
}

/** @param {View} view @param {number|undefined} step */
function pointer(view, step) {
  if (step === undefined) return [];
  return [svg("line", { x1: view.x(step), x2: view.x(step), y1: TOP, y2: view.height - BOTTOM, class: "qet-pointer" })];
}

/** The last value at or before `step`. @param {number[][]} points @param {number} step */
function latest(points, step) {
  return points.filter((point) => point[0] <= step).pop()?.[1];
}

/** @param {View} view @param {number|undefined} pointed @returns {[string, string, string][]} Style, label, value. */
function values(view, pointed) {
  const { curve } = view;
  const index = pointed === undefined ? curve.steps.length - 1 : nearest(curve.steps, pointed);
  const step = curve.steps[index];
  return [
    ["loss", label("loss"), format.loss(curve.loss[index])],
    ["smooth", label("smooth"), format.loss(view.means[index])],
    ...view.held.map(([name, points], number) =>
      /** @type {[string, string, string]} */ ([
        `held-${number}`,
        label(name),
        format.loss(latest(points, step)),
      ]),
    ),
    ...view.others.map(([name, points], number) =>
      /** @type {[string, string, string]} */ ([
        `other-${number}`,
        label(name),
        format.loss(latest(points, step)),
      ]),
    ),
    ["rate", label("rate"), format.rate(curve.learning_rate[index])],
  ];
}

/** @param {View} view @param {number|undefined} pointed */
function entries(view, pointed) {
  const found = values(view, pointed).map(([style, label, value]) =>
    element("span", { class: `qet-entry qet-entry-${style}` }, `${label} `, element("b", { text: value })),
  );
  if (pointed === undefined) return found;
  return [element("span", { class: "qet-entry", text: t("step {step}", { step: pointed }) }), ...found];
}

/**
 * For screen readers: expose the chart as a slider over the steps that announces the values at the selected step.
 * @param {any} plot
 * @param {View|undefined} view
 * @param {number|undefined} pointed
 */
function describe(plot, view, pointed) {
  if (!view) {
    for (const name of SLIDER) plot.removeAttribute(name);
    plot.setAttribute("role", "img");
    plot.setAttribute("aria-label", t("Loss: no finished steps yet"));
    return;
  }
  const { steps } = view.curve;
  const step = pointed ?? steps[steps.length - 1];
  const said = values(view, pointed).map(([, label, value]) => `${label} ${value}`);
  const now = [0, steps[0], steps[steps.length - 1], step, labelled(t("step {step}", { step }), listed(said))];
  plot.setAttribute("role", "slider");
  plot.setAttribute("aria-label", t("Loss curve"));
  SLIDER.forEach((name, index) => plot.setAttribute(name, String(now[index])));
}
