// @ts-check
/** What a training will do, on its node before it runs: time, memory, preset, and what Run would refuse. */
import { element, setText, withLinks } from "./dom.js";
import { roughly } from "./format.js";
import { hasId, isTrainNode, promptOf, titleOf, toast } from "./graph.js";
import { endGone, scrollInside, whenGone } from "./node_parts.js";
import { runOf } from "./node_view.js";
import { isUnderWay } from "./store.js";
import { labelled, sentences, t } from "./words.js";

/**
 * @typedef {{name: string, value: any}} Fact
 * @typedef {{setting: string, preset: any, value: any, by: string}} Override
 * @typedef {{node_id: string, text: string}} Problem
 * @typedef {{problems: Problem[], warnings: string[], notes: string[], facts: Fact[],
 *   preset: {name: string, why: string}, overridden: Override[]}} Answer
 */

const WAIT = 1000; // milliseconds without a change before the server is asked
const AGAIN = 3000; // milliseconds before the server is asked again after another page's request stopped this one
const MOST_TRIES = 3;
const GIB = 2 ** 30;
const LITTLE_DISK = 5e7; // bytes that aren't worth a word
const SHORT = 0.8; // share of the free RAM above which the box tells what is needed

/**
 * Boxes for all training nodes. They ask the server one after the other, because it answers the newest request only.
 * @param {any} app
 * @param {any} api
 * @param {import("./store.js").Store} store
 */
export function createBeforeStart(app, api, store) {
  /** @type {Set<ReturnType<typeof createBox>>} */
  const boxes = new Set();
  /** @type {ReturnType<typeof setTimeout>|undefined} */
  let timer;
  let asking = false;

  function soon(delay = WAIT) {
    clearTimeout(timer);
    timer = setTimeout(askAll, delay);
  }

  async function askAll() {
    if (asking) return soon(WAIT);
    if (document.hidden) return; // asked when the tab is shown again
    asking = true;
    let again = false;
    try {
      endGone(app);
      const prompt = boxes.size ? await promptOf(app) : undefined;
      for (const box of boxes) again = (await box.ask(prompt)) || again;
    } catch (error) {
      for (const box of boxes) box.rest(error);
    }
    asking = false;
    if (again) soon(AGAIN);
  }

  /** Ask again although the graph is the same: a job has ended, or files may have changed. */
  function forget() {
    for (const box of boxes) box.forget();
    soon();
  }

  api.addEventListener("graphChanged", () => soon());
  for (const end of ["execution_success", "execution_error", "execution_interrupted"]) {
    api.addEventListener(end, forget);
  }
  document.addEventListener("visibilitychange", () => document.hidden || forget());

  return {
    /** A box for a training node. @param {any} node @returns {Element} */
    attach(node) {
      const box = createBox(node, { app, api, store, soon });
      boxes.add(box);
      whenGone(node, () => boxes.delete(box));
      soon();
      return box.element;
    },
    forget,
  };
}

/**
 * @param {any} node
 * @param {{app: any, api: any, store: import("./store.js").Store, soon: (delay?: number) => void}} given
 */
function createBox(node, { app, api, store, soon }) {
  const head = element("span", { class: "qet-before-head", role: "status" });
  const button = element("button", {
    class: "qet-button",
    type: "button",
    text: t("Check everything"),
    title: t("Also measures the pictures of each pair. Nothing is trained."),
    on: { click: checkEverything },
  });
  const list = element("div", { class: "qet-before-list", tabindex: "0" });
  const box = element("div", { class: "qet-before" }, element("div", { class: "qet-row" }, head, button), list);
  scrollInside(app, box, list);

  let asked = "";
  let tries = 0;
  let measure = false;
  let isWaiting = false; // for an answer, as the head says
  /** @type {Answer|undefined} */
  let answer;

  function checkEverything() {
    measure = true; // from now on; what was measured is kept
    asked = "";
    button.disabled = true;
    wait();
    soon(0);
  }

  function wait() {
    isWaiting = true;
    setText(head, t("Checking…"));
  }

  function paint() {
    const run = runOf(node, store);
    const isOver = Boolean(answer && !answer.problems.length && factsOf(answer).finished);
    box.hidden = Boolean(run && (isUnderWay(run) || isOver));
    box.dataset.small = String(Boolean(run));
  }

  /**
   * @param {any} prompt
   * @returns {Promise<boolean>} Whether to ask again soon.
   */
  async function ask(prompt) {
    try {
      if (await request(prompt)) return true;
      rest();
    } catch (error) {
      rest(error);
    }
    return false;
  }

  /** @param {any} prompt @returns {Promise<boolean>} Whether another page's request stopped this one. */
  async function request(prompt = {}) {
    const run = runOf(node, store);
    if (run && isUnderWay(run)) return false;
    const id = Object.keys(prompt).find((each) => hasId(node, each) && isTrainNode({ type: prompt[each].class_type }));
    const body = JSON.stringify({ prompt, node_id: id ?? "", measure_pairs: measure });
    if (!id) show(undefined);
    if (!id || body === asked) return false;
    if (!answer) wait();
    asked = body; // before the answer, so that `forget` has an effect in the meantime
    const response = await api.fetchApi("/qwen_edit_trainer/before_start", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body,
    });
    if (response.status === 204) {
      asked = "";
      tries += 1;
      if (tries < MOST_TRIES) return true;
      throw new Error(t("Another page checks its graph at the same time. Try again later."));
    }
    const said = await response.json();
    if (!response.ok) throw new Error(said.error ?? response.statusText);
    show(said);
    return false;
  }

  /** If no answer came, end the waiting. @param {any} [error] Why none came. */
  function rest(error) {
    tries = 0;
    if (error) {
      asked = "";
      console.debug("Qwen Edit Trainer could not look at the graph.", error);
    }
    if (!isWaiting) return;
    const byUser = button.disabled;
    show(answer);
    if (byUser && error) toast(app, "error", t("Not checked"), String(error.message ?? error));
  }

  /** @param {Answer|undefined} next */
  function show(next) {
    answer = next;
    isWaiting = false;
    button.disabled = false;
    setText(head, next ? headline(next) : t("Before the start"));
    box.dataset.refused = String(Boolean(next?.problems.length));
    list.replaceChildren(...(next ? linesOf(next, app) : []));
    paint();
  }

  whenGone(node, store.subscribe(paint));
  show(undefined);
  wait(); // for the first answer
  return {
    element: box,
    ask,
    rest,
    forget() {
      asked = "";
    },
  };
}

/** @param {Answer} answer @returns {Record<string, any>} */
function factsOf(answer) {
  return Object.fromEntries(answer.facts.map(({ name, value }) => [name, value]));
}

/** @param {Answer} answer */
function headline(answer) {
  if (answer.problems.length) return t("Not ready");
  const facts = factsOf(answer);
  if (facts.finished) return t("Already trained. Run shows the result again.");
  if (facts.time) {
    const time = roughly(facts.time);
    if (!facts.first_pictures) return t("About {time}.", { time });
    return t("About {time}, first pictures after {first}.", { time, first: roughly(facts.first_pictures) });
  }
  const warnings = answer.warnings.length;
  if (warnings === 1) return t("Ready to run, with 1 warning");
  return warnings ? t("Ready to run, with {warnings} warnings", { warnings }) : t("Ready to run");
}

/** @param {Answer} answer @param {any} app */
function linesOf(answer, app) {
  const facts = factsOf(answer);
  const line = (/** @type {string} */ kind, /** @type {string} */ text) =>
    element("p", { class: `qet-before-${kind}` }, text);
  const named = (/** @type {Problem} */ problem) => {
    const title = problem.node_id && titleOf(app, problem.node_id);
    const node = title ? [element("b", {}, labelled(title, ""))] : [];
    return element("p", { class: "qet-before-problem" }, ...node, ...withLinks(problem.text));
  };
  return [
    ...answer.problems.map(named),
    ...answer.warnings.map((text) => line("warning", text)),
    ...[memory(facts), answer.preset.why, ...answer.notes].filter(Boolean).map((text) => line("fact", text)),
    ...answer.overridden.map((each) => line("overridden", overriding(each))),
    ...details(facts).map((text) => line("detail", text)),
  ];
}

/** @param {Override} each */
function overriding({ setting, value, by, preset }) {
  const text = { value: String(value), preset: String(preset) };
  return t("{setting} is {value}, set by {by}. The preset has {preset}.", {
    setting,
    value: text.value,
    by,
    preset: text.preset,
  });
}

/** @param {Record<string, any>} facts */
function memory(facts) {
  if (facts.ram_needed === undefined) return "";
  const [ram, freeRam] = [gibibytes(facts.ram_needed), gibibytes(facts.ram_free)];
  if (facts.memory_is_shared) return t("Needs {needed} of {free} GiB free memory.", { needed: ram, free: freeRam });
  const [card, freeCard] = [gibibytes(facts.vram_needed), gibibytes(facts.vram_free)];
  const told = [t("Needs {needed} of {free} GiB free VRAM.", { needed: card, free: freeCard })];
  const isShort = facts.ram_needed > SHORT * facts.ram_free;
  if (isShort) told.push(t("Needs {needed} of {free} GiB free RAM.", { needed: ram, free: freeRam }));
  return sentences(told);
}

/** @param {number} bytes */
function gibibytes(bytes) {
  return (bytes / GIB).toFixed(1);
}

/** @param {Record<string, any>} facts */
function details(facts) {
  const told = [];
  if (facts.pairs !== undefined) {
    told.push(t("{pairs} pairs to train on, {held} held out.", { pairs: facts.pairs, held: facts.held_out }));
    if (facts.to_encode === 0) told.push(t("All are encoded already."));
    else if (facts.to_encode) told.push(t("{count} are still to be encoded.", { count: facts.to_encode }));
  }
  if (facts.steps) told.push(t("{steps} steps, rank {rank}.", { steps: facts.steps, rank: facts.rank }));
  if (facts.done) told.push(t("{done} of them are done.", { done: facts.done }));
  if (facts.resolution) {
    const precision = String(facts.precision);
    told.push(t("Resolution {resolution}, precision {precision}.", { resolution: facts.resolution, precision }));
  }
  if (facts.is_measurable === false) told.push(t("The time is only known in advance on a CUDA card."));
  if (facts.disk_needed > LITTLE_DISK) {
    const [needed, free] = [(facts.disk_needed / 1e9).toFixed(1), (facts.disk_free / 1e9).toFixed(0)];
    told.push(t("Needs {needed} of {free} GB free disk space.", { needed, free }));
  }
  return told.length ? [sentences(told)] : [];
}
