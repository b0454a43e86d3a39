// @ts-check
/** The side panel: a list of runs, and the details and actions of one run. */
import { createChart } from "./chart.js";
import { copyText, element, setText } from "./dom.js";
import * as format from "./format.js";
import { applySettings, leaves, openGraph, openWithLora, queueGraph, toast } from "./graph.js";
import { isInNotice } from "./refusals.js";
import { createComparison } from "./samples.js";
import { isUnderWay } from "./store.js";
import { createTrial, endOf } from "./trial.js";
import { listed, sentences, t } from "./words.js";

/**
 * @typedef {import("./store.js").Run} Run
 * @typedef {import("./store.js").Store} Store
 */

// ComfyUI's canvas also handles these keys, so the panel stops them from reaching it.
const OWN_KEYS = ["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "Enter", " ", "Delete", "Backspace"];

/**
 * @param {any} app
 * @param {any} api
 * @param {Store} store
 */
export function createPanel(app, api, store) {
  const problem = element("p", { class: "qet-problem", role: "alert", hidden: true });
  const list = createList((name) => select(name, true));
  const detail = createDetail({ app, api, store, back: () => select(undefined, true) });
  const keydown = (/** @type {KeyboardEvent} */ event) => OWN_KEYS.includes(event.key) && event.stopPropagation();
  const root = element("div", { class: "qet-panel", on: { keydown } }, problem, list.element, detail.element);
  /** @type {string|undefined} */
  let selected;

  /** @param {string|undefined} name @param {boolean} [focus] */
  function select(name, focus = false) {
    const before = selected;
    selected = name;
    if (name !== undefined) store.want(name);
    paint();
    if (focus) (name === undefined ? list.focus(before) : detail.focus());
  }

  function paint() {
    const run = selected === undefined ? undefined : store.find(selected);
    if (run) store.want(run.run_name);
    const wrong = store.problem(selected);
    problem.hidden = !wrong;
    setText(problem, wrong ? t("Retrying a failed request to the server: {problem}", { problem: wrong }) : "");
    list.element.hidden = Boolean(run);
    detail.element.hidden = !run;
    if (run) detail.show(run);
    else list.show(store.list());
  }

  store.onBeginOrEnd((run, begins) => {
    const current = selected === undefined ? undefined : store.find(selected);
    // A run that begins without having been queued has another name than the queue knew, such as one with a number.
    if (begins && (run.active || !(current && isUnderWay(current)))) select(run.run_name);
    if (!begins && document.hidden && mayNotify()) {
      new Notification(t("{name}: {state}", { name: run.run_name, state: format.state(run) }));
    }
  });

  return {
    /** @param {HTMLElement} place */
    mount(place) {
      place.append(root);
      const end = store.subscribe(paint);
      store.refresh();
      paint();
      return () => {
        end();
        root.remove();
      };
    },
    /** @param {string} name @param {number} [step] */
    open(name, step) {
      select(name);
      if (step !== undefined) detail.chooseStep(step);
    },
  };
}

/** @param {(name: string) => void} onPick */
function createList(onPick) {
  const heading = element("h3", { class: "qet-heading", text: t("Runs") });
  const invitation = t("No runs yet. Press Run in a graph with the node Train Qwen Edit LoRA.");
  const empty = element("p", { class: "qet-quiet", text: invitation });
  const rows = element("ul", { class: "qet-runs" });
  const box = element("section", { "aria-label": t("Runs") }, heading, empty, rows);
  /** @type {Map<string, ReturnType<typeof createRow>>} */
  const known = new Map();

  return {
    element: box,
    /** @param {Run[]} runs */
    show(runs) {
      empty.hidden = runs.length > 0;
      const order = runs.map((run) => {
        const row = known.get(run.run_name) ?? createRow(run.run_name, onPick);
        known.set(run.run_name, row);
        row.show(run);
        return row.element;
      });
      const same = order.length === rows.children.length && order.every((row, index) => row === rows.children[index]);
      if (!same) rows.replaceChildren(...order);
    },
    /** @param {string|undefined} name */
    focus(name) {
      (name === undefined ? undefined : known.get(name))?.element.firstElementChild?.focus();
    },
  };
}

/** @param {string} name @param {(name: string) => void} onPick */
function createRow(name, onPick) {
  const badge = element("span", { class: "qet-badge" });
  const line = element("span", { class: "qet-quiet" });
  const bar = element("progress", { class: "qet-progress", max: 1, "aria-hidden": "true" });
  const title = element("span", { class: "qet-name", text: name });
  const button = element(
    "button", { type: "button", class: "qet-run", on: { click: () => onPick(name) } },
    element("span", { class: "qet-row" }, title, badge), bar, line,
  ); // prettier-ignore
  return {
    element: element("li", {}, button),
    /** @param {Run} run */
    show(run) {
      setText(badge, format.state(run));
      badge.dataset.state = run.state;
      bar.value = format.share(run);
      bar.hidden = !run.active;
      const loss = run.step ? [t("loss {loss}", { loss: format.loss(run.loss) })] : [];
      setText(line, run.problem || [format.progress(run), ...loss].join(" · "));
    },
  };
}

/** @param {{app: any, api: any, store: Store, back: () => void}} given */
function createDetail({ app, api, store, back }) {
  const title = element("h3", { class: "qet-heading qet-name", tabindex: "-1" });
  const badge = element("span", { class: "qet-badge", role: "status" }); // screen readers announce only this
  const line = element("p", { class: "qet-quiet" });
  const bar = element("progress", { class: "qet-progress", max: 1, "aria-label": t("Steps done") });
  const chart = createChart();
  const drift = createDrift(chart);
  const trial = createTrial({ api, onError: (what, error) => tell(app, what, error) });
  const save = action(app, t("Save this step's LoRA"), t("Copy it to where LoRA loaders list it"), async () => {
    toast(app, "success", t("LoRA saved"), await store.saveStep(name(), shown.step));
  });
  const shown = { step: 0, pair: 0 }; // in the comparison
  const comparison = createComparison(store, (step, pair) => Object.assign(shown, { step, pair }), [save]);
  const ending = createEnding({
    tryIt: () => trial.beginAtEnd(),
    use: action(app, t("Use in a graph"), t("Open an edit graph in which this LoRA is chosen"), async () => {
      await openWithLora(app, api, String(run?.lora_name), (await load()).model.flavour);
    }),
  });
  const table = element("dl", { class: "qet-settings" });
  const settings = element("details", {}, element("summary", { text: t("Settings") }), table);
  /** @type {Run|undefined} */
  let run;

  const name = () => /** @type {Run} */ (run).run_name;
  const load = async () => (await store.get(`${store.runPath(name())}/settings`)).settings;
  const graph = () => store.get(`${store.runPath(name())}/graph`);
  const actions = {
    stop: action(app, t("Stop and keep"), t("Stop this training now and keep its LoRA"), () =>
      store.stopAndKeep(name()),
    ),
    go: action(app, t("Continue"), t("Queue this run's graph again; it resumes where it stopped"), async () => {
      await queueGraph(api, await graph());
      toast(app, "success", t("Queued"), t("{name} will resume", { name: name() }));
    }),
    open: action(app, t("Open graph"), t("Open the graph that started this run"), async () => {
      const { workflow } = await graph();
      if (!workflow) throw new Error(t("This run was not queued from the page, so it has no graph layout to open."));
      await openGraph(app, workflow, name());
    }),
    apply: action(app, t("Settings into graph"), t("Copy this run's settings into the graph's nodes"), async () => {
      const fresh = freeName(name(), store.list());
      const { changed, made, left } = applySettings(app, await load(), fresh);
      const done = t("Widgets changed: {changed}, nodes added: {made}, run name: {fresh}", { changed, made, fresh });
      toast(app, "success", t("Settings copied"), done);
      if (left.length) toast(app, "warn", t("No matching choice; set these widgets yourself"), listed(left));
    }),
    notify: action(app, t("Notify me"), t("Show a notification of the browser when a run ends"), async () => {
      await Notification.requestPermission();
      if (run) show(run);
    }),
    copy: action(app, t("Copy as JSON"), t("Copy this run's settings to the clipboard"), async () => {
      await copyText(JSON.stringify(await load(), null, 1));
      toast(app, "success", t("Settings copied to the clipboard"));
    }),
  };
  const box = element(
    "section", { "aria-label": t("Run") },
    element("button", { type: "button", class: "qet-button qet-back", on: { click: back } }, t("‹ All runs")),
    element("div", { class: "qet-row" }, title, badge), bar, line, ending.element,
    element("div", { class: "qet-actions" }, ...Object.values(actions)),
    chart.element, drift.element, comparison.element, trial.element, settings,
  ); // prettier-ignore

  async function fill() {
    const requested = name();
    const values = await load();
    if (requested !== name()) return; // the user has selected another run
    const rows = Object.entries(leaves(values)).map(([key, value]) => [
      element("dt", { text: key }),
      element("dd", { text: typeof value === "string" ? value || t("(empty)") : JSON.stringify(value) }),
    ]);
    table.replaceChildren(...rows.flat());
  }

  settings.addEventListener("toggle", () => {
    if (!settings.open) return;
    fill().catch((error) => {
      settings.open = false; // opening it again repeats the request
      tell(app, t("Read the settings"), error);
    });
  });

  /** @param {Run} next */
  function show(next) {
    if (next.run_name !== run?.run_name) {
      settings.open = false;
      table.replaceChildren();
    }
    run = next;
    setText(title, run.run_name);
    setText(badge, format.state(run));
    badge.dataset.state = run.state;
    bar.value = format.share(run);
    setText(line, run.problem || [format.progress(run), ...ratios(run)].join(" · "));
    actions.stop.hidden = run.state !== "training";
    actions.stop.disabled = Boolean(run.stopping);
    actions.go.hidden = isUnderWay(run) || ["finished", "elsewhere", "damaged"].includes(run.state) || !run.has_graph;
    actions.open.hidden = !run.has_graph;
    actions.notify.hidden = !isUnderWay(run) || !("Notification" in window) || Notification.permission !== "default";
    ending.show(run);
    chart.show(run.curve);
    drift.show(run);
    comparison.show(run);
    trial.show(run, shown.step, shown.pair);
    save.disabled = !run.loras?.some((lora) => lora.step === shown.step);
  }

  return { element: box, focus: () => title.focus(), chooseStep: comparison.choose, show };
}

/**
 * How a run ended: the name of its LoRA, its time, and what can be done with it now.
 * @param {{tryIt: () => void, use: any}} given
 */
function createEnding({ tryIt, use }) {
  const line = element("p", { class: "qet-name" });
  const title = t("Draw a held-out pair with this LoRA");
  const button = element("button", { type: "button", class: "qet-button", title, on: { click: tryIt } }, t("Try it"));
  const box = element("div", { class: "qet-ending" }, line, element("div", { class: "qet-actions" }, button, use));
  return {
    element: box,
    /** @param {Run} run */
    show(run) {
      box.hidden = !run.lora_name || isUnderWay(run);
      if (box.hidden) return;
      const early = run.kept_step ? [t("Ended early at step {step}.", { step: run.kept_step })] : [];
      const saved = t("LoRA saved: {name}", { name: String(run.lora_name) });
      const { best_step: step, strength } = run;
      const best = step ? [t("It was best at step {step}: use the file …-best.", { step })] : [];
      const advice = typeof strength === "number" ? [t("Best strength: {strength}.", { strength })] : [];
      const took = run.seconds ? [t("Total time: {time}", { time: format.duration(run.seconds) })] : [];
      setText(line, [sentences([...early, saved, ...best, ...advice]), ...took].join(" · "));
      button.hidden = endOf(run) === undefined || !run.samples?.length;
    },
  };
}

/**
 * What drift is, its newest values, and a box that shows it in the chart.
 * @param {ReturnType<typeof createChart>} chart
 */
function createDrift(chart) {
  const change = () => chart.showDrift(check.checked);
  const check = element("input", { type: "checkbox", on: { change } });
  const line = element("p", { class: "qet-quiet" });
  const box = element("div", {}, element("label", {}, check, ` ${t("Show drift in the chart")}`), line);
  return {
    element: box,
    /** @param {Run} run */
    show({ curve }) {
      const newest = (/** @type {string} */ name) => curve?.measured[`drift_${name}`]?.at(-1)?.[1];
      const [shift, zoom, colour] = [newest("shift"), newest("zoom"), newest("colour")];
      box.hidden = shift === undefined;
      if (shift === undefined || zoom === undefined || colour === undefined) return;
      const text = t("Difference from the target outside the edit: {shift} px, {zoom} % zoom, {colour} of 255", {
        shift: shift.toFixed(2),
        zoom: zoom.toFixed(2),
        colour: colour.toFixed(1),
      });
      setText(line, text);
    },
  };
}

/** The name with the first number for which there is no run. @param {string} name @param {Run[]} runs */
function freeName(name, runs) {
  const [, stem, digits] = /** @type {RegExpMatchArray} */ (name.match(/^(.*?)(?:-([0-9]{1,6}))?$/));
  const taken = new Set(runs.map((run) => run.run_name));
  for (let number = Number(digits ?? 1) + 1; ; number += 1) {
    if (!taken.has(`${stem}-${number}`)) return `${stem}-${number}`;
  }
}

function mayNotify() {
  return "Notification" in window && Notification.permission === "granted";
}

/** PSNR of the samples of validated pairs against their targets, or why there is none. @param {Run} run */
function ratios({ psnr, unmeasured }) {
  const named = [
    ["LoRA", psnr?.lora],
    ["EMA", psnr?.ema],
    ["base", psnr?.base],
  ];
  const known = named.flatMap(([name, value]) => (typeof value === "number" ? `${name} ${value.toFixed(1)} dB` : []));
  return known.length > 1 ? [listed(known)] : unmeasured ? [unmeasured] : [];
}

/** Report a failed action. @param {any} app @param {string} what The action. @param {any} error */
function tell(app, what, error) {
  if (isInNotice(error)) return;
  toast(app, "error", t("{action} failed", { action: what }), String(error?.message ?? error));
}

/**
 * A button that shows a toast if its action fails.
 * @param {any} app
 * @param {string} text
 * @param {string} title
 * @param {() => Promise<void>} call
 */
function action(app, text, title, call) {
  const click = () => call().catch((error) => tell(app, text, error));
  return element("button", { type: "button", class: "qet-button", title, on: { click } }, text);
}
