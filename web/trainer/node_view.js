// @ts-check
/** The view on the training node: state, loss curve and sample pictures of the run. */
import { createChart } from "./chart.js";
import { element, setText } from "./dom.js";
import * as format from "./format.js";
import { chain, hasId, widget } from "./graph.js";
import { addView, scrollInside, whenGone } from "./node_parts.js";
import { createStrip } from "./samples.js";
import { isUnderWay } from "./store.js";
import { t } from "./words.js";

/**
 * @typedef {import("./store.js").Run} Run
 * @typedef {import("./store.js").Store} Store
 */

const HEIGHT = 294; // pixels, also before there is a curve or a picture, so that the node never grows over others
const NUMBER = /^(-([2-9]|[1-9]\d{1,3}))?$/; // that a name may have got
const REPORT = 80; // pixels more for the report of a run that has ended, which would squeeze the chart

/**
 * @param {any} node
 * @param {{app: any, store: Store, onPick: (run: string, step: number) => void, first: Element,
 *   last: HTMLElement}} given
 *   `first`, `last`: shown above and below the run.
 */
export function attachView(node, { app, store, onPick, first, last }) {
  const badge = element("span", { class: "qet-badge", role: "status" }); // screen readers announce only this
  const line = element("span", { class: "qet-quiet" });
  const chart = createChart();
  /** @type {Run|undefined} */
  let run;
  const strip = createStrip(store, (step) => run && onPick(run.run_name, step));
  const head = element("div", { class: "qet-row" }, line, badge);
  const box = element("div", { class: "qet-node" }, first, head, chart.element, strip.element, last);
  addView(node, "training", box, HEIGHT, () => (last.hidden ? 0 : REPORT));
  scrollInside(app, chart.element);

  function paint() {
    const next = runOf(node, store);
    chart.element.hidden = !next;
    badge.hidden = !next;
    if (next) store.want(next.run_name);
    setText(line, next ? format.progress(next) : t("The run's curve and pictures appear here."));
    if (next && next !== run) {
      setText(badge, format.state(next));
      badge.dataset.state = next.state;
      chart.show(next.curve);
    }
    if (next) strip.show(next, 0);
    else strip.element.hidden = true;
    run = next;
  }

  for (const name of ["run_name", "if_run_exists"]) {
    const found = widget(node, name);
    if (found) chain(found, "callback", paint);
  }
  chain(node, "onConfigure", paint);
  chain(node, "onExecuted", (/** @type {any} */ output) => {
    const name = output?.qwen_edit_run?.[0]?.run_name;
    if (name) outputs.set(node, name);
    paint();
  });
  whenGone(node, store.subscribe(paint));
  paint();
}

/** @type {WeakMap<any, string>} The run that a node has output last. */
const outputs = new WeakMap();

/**
 * The queued or active run of this node, or else the one that it has output last, or else the newest one with the name
 * in its widget. The name may have a number appended if the node chooses a new one.
 * @param {any} node
 * @param {Store} store
 * @returns {Run|undefined}
 */
export function runOf(node, store) {
  const name = String(widget(node, "run_name")?.value ?? "");
  const runs = store.list();
  const mine = runs.find((run) => isUnderWay(run) && hasId(node, run.node_id) && run.run_name.startsWith(name));
  if (mine || !String(widget(node, "if_run_exists")?.value).includes("new")) return mine ?? store.find(name);
  const fitting = runs.filter((run) => run.run_name.startsWith(name) && NUMBER.test(run.run_name.slice(name.length)));
  return (
    fitting.find((run) => run.run_name === outputs.get(node)) ??
    fitting.find((run) => run.run_name === name || !isUnderWay(run)) // else it is another node's
  );
}
