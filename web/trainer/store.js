// @ts-check
/**
 * State of the runs on this page. It is fetched from the server at the start, after a lost connection and when a run
 * starts or ends; in between, the server's messages update it.
 *
 * @typedef {{steps: number[], loss: number[], learning_rate: (number|null)[],
 *   measured: Record<string, number[][]>}} Curve
 * @typedef {{caption: string, label?: string, columns: string[]}} Pair
 * @typedef {{step: number, version: number, pairs: Pair[]}} Sample
 * @typedef {{run_name: string, state: string, active: boolean, step: number, num_steps: number, loss: number|null,
 *   learning_rate?: number|null, seconds_per_step?: number|null, seconds_left?: number|null, peak_bytes?: number,
 *   problem?: string, phase?: string, phase_done?: number, phase_total?: number, stopping?: boolean,
 *   node_id?: string|null, changed?: number, has_graph?: boolean, psnr?: Record<string, number|null>,
 *   unmeasured?: string, curve?: Curve, samples?: Sample[], loras?: StepLora[], lora_name?: string,
 *   seconds?: number|null, kept_step?: number|null, best_step?: number|null, strength?: number|null,
 *   revision: number}} Run
 * @typedef {{step: number, psnr: number|null, validation_loss: number|null, best: boolean}} StepLora
 */
import { isMeasured } from "./chart_data.js";
import { onceAFrame } from "./dom.js";

const BASE = "/qwen_edit_trainer";
const POINTS = 600; // requested from the server
const MAX_POINTS = 2400; // kept here; above that, fetch the server's thinned curve again
const RETRY_MS = 4000; // delay after a failed request
const LIST = ""; // key of the list request in `failures` and `waiting`, where other keys are run names

/** @param {any} api ComfyUI's API object. */
export function createStore(api) {
  /** @type {Map<string, Run>} */
  const runs = new Map();
  /** @type {Set<string>} */
  const loaded = new Set();
  /** @type {Map<string, string>} Error message of the last failed request. */
  const failures = new Map();
  /** @type {Set<string>} Failed requests that wait for their retry. */
  const waiting = new Set();
  /** @type {Set<() => void>} */
  const listeners = new Set();
  const tell = onceAFrame(() => listeners.forEach((listener) => listener()));
  /** @type {Set<(run: Run, begins: boolean) => void>} Called when a run is queued or begins, and when it ends. */
  const watchers = new Set();
  let isListed = false; // the runs of the first list began before the page was opened
  let waitingPrompts = 0; // in ComfyUI's queue

  /** @param {string} path */
  async function get(path) {
    return answered(await api.fetchApi(BASE + path));
  }

  /** @param {string} path @param {any} values */
  async function post(path, values) {
    const headers = { "Content-Type": "application/json" };
    return answered(await api.fetchApi(BASE + path, { method: "POST", headers, body: JSON.stringify(values) }));
  }

  /** @param {Response} answer */
  async function answered(answer) {
    const value = await answer.json();
    if (!answer.ok) throw new Error(value.error ?? answer.statusText);
    return value;
  }

  /** @param {string} name */
  function runPath(name) {
    return `/runs/${encodeURIComponent(name)}`;
  }

  /** @param {any} values */
  function merge(values) {
    const none = { active: false, state: "started", step: 0, num_steps: 0, loss: null, revision: 0 };
    const before = runs.get(values.run_name) ?? none;
    const run = { ...before, ...values, revision: before.revision + 1 };
    runs.set(run.run_name, run);
    tell();
    const hasTurned = isUnderWay(run) ? !isUnderWay(before) : before.active; // the queue may call a run otherwise
    if (isListed && hasTurned) watchers.forEach((call) => call(run, isUnderWay(run)));
    return run;
  }

  /**
   * Send a request. If it fails, tell the listeners, and call `again` after RETRY_MS.
   * @param {string} name
   * @param {() => Promise<void>} request
   * @param {() => void} again
   */
  async function attempt(name, request, again) {
    try {
      await request();
      if (failures.delete(name)) tell();
    } catch (error) {
      failures.set(name, String(/** @type {any} */ (error)?.message ?? error));
      tell();
      if (waiting.has(name)) return;
      waiting.add(name);
      setTimeout(() => {
        waiting.delete(name);
        again();
      }, RETRY_MS);
    }
  }

  /** Fetch the list of runs, with retries. @returns {Promise<void>} */
  function refresh() {
    return attempt(LIST, readList, refresh);
  }

  async function readList() {
    const listed = (await get("/runs")).runs;
    const names = new Set(listed.map((/** @type {Run} */ run) => run.run_name));
    for (const name of [...runs.keys(), ...loaded].filter((name) => !names.has(name))) {
      runs.delete(name); // it ended before it had a folder
      loaded.delete(name);
      failures.delete(name);
    }
    const order = new Map();
    listed.forEach((/** @type {Run} */ run) => order.set(run.run_name, merge(run)));
    runs.clear();
    order.forEach((run, name) => runs.set(name, run));
    isListed = true;
    tell();
  }

  /** A prompt was queued, or has ended. @param {CustomEvent} event */
  function onQueue({ detail }) {
    const count = detail?.exec_info?.queue_remaining ?? 0;
    if (count === waitingPrompts) return;
    waitingPrompts = count;
    reloadAll();
  }

  /** Fetch curve and samples of a run, and keep them up to date from now on. @param {string} name */
  function load(name) {
    loaded.add(name);
    const request = () =>
      readRun(name).catch((error) => {
        loaded.delete(name);
        if (runs.has(name)) throw error;
      });
    return attempt(name, request, tell); // a view that still shows the run calls `want` again
  }

  /** @param {string} name */
  async function readRun(name) {
    const [run, curve] = await Promise.all([get(runPath(name)), get(`${runPath(name)}/curve?points=${POINTS}`)]);
    const newer = runs.get(name)?.curve;
    merge({ ...run, curve: run.active && newer ? joined(curve, newer) : curve });
  }

  /** @param {string} name */
  function reload(name) {
    if (loaded.has(name)) load(name);
  }

  function reloadAll() {
    refresh().then(() => [...loaded].forEach(reload));
  }

  /** @param {CustomEvent} event */
  function onMessage({ detail }) {
    const { points = [], samples, ...values } = detail;
    const before = runs.get(detail.run_name);
    if (!detail.active || !before?.active) {
      if (detail.active) merge(values);
      reloadAll(); // if it has ended, its folder says how
      return;
    }
    const curve = before.curve && extended(before.curve, points);
    merge({ ...values, curve });
    if (samples !== undefined || (curve && curve.steps.length > MAX_POINTS)) reload(detail.run_name);
  }

  api.addEventListener("qwen_edit_trainer.run", onMessage);
  api.addEventListener("reconnected", reloadAll);
  api.addEventListener("status", onQueue);

  return {
    refresh,
    /** Load a run, unless it is loaded, being loaded or waiting for a retry. @param {string} name */
    want(name) {
      const run = runs.get(name);
      if (run?.state === "queued" && !run.num_steps) return; // it has no folder, and may never have one
      if (!loaded.has(name) && !waiting.has(name)) load(name);
    },
    /** Error message of the list request or of a run's request. @param {string} [name] The run. */
    problem: (name = LIST) => failures.get(LIST) ?? failures.get(name),
    get,
    post,
    runPath,
    /**
     * Call `call` when a run is queued or begins, and when it ends.
     * @param {(run: Run, begins: boolean) => void} call
     */
    onBeginOrEnd: (call) => watchers.add(call),
    /** @returns {Run[]} Newest first. */
    list: () => [...runs.values()],
    /** @param {string} name @returns {Run|undefined} */
    find: (name) => runs.get(name),
    /** @param {() => void} listener @returns {() => void} Unsubscribes. */
    subscribe(listener) {
      listeners.add(listener);
      return () => listeners.delete(listener);
    },
    /**
     * @param {string} name
     * @param {Sample} sample
     * @param {number} pair
     * @param {string} column
     * @param {number} [edge] Longest side of a thumbnail, in pixels. Full size without it.
     */
    pictureAddress(name, sample, pair, column, edge) {
      const place = `${runPath(name)}/samples/${sample.step}/${pair}/${encodeURIComponent(column)}`;
      return api.apiURL(`${BASE}${place}?v=${sample.version}${edge ? `&edge=${edge}` : ""}`);
    },
    /** Stop a training and keep its LoRA. @param {string} name */
    async stopAndKeep(name) {
      await post("/stop", { run_name: name });
      merge({ run_name: name, stopping: true });
    },
    /** Copy the LoRA of a step to where LoRA loaders list it. @param {string} name @param {number} step */
    async saveStep(name, step) {
      return (await post(`${runPath(name)}/save_step`, { step })).lora_name;
    },
  };
}

/** @typedef {ReturnType<typeof createStore>} Store */

/** Whether a run is in ComfyUI's queue or in progress. @param {{active?: boolean, state: string}} run */
export function isUnderWay(run) {
  return Boolean(run.active) || run.state === "queued";
}

/**
 * @param {Curve} curve
 * @param {any[]} points Steps from the server.
 * @returns {Curve}
 */
export function extended(curve, points) {
  const last = curve.steps[curve.steps.length - 1] ?? 0;
  const fresh = points.filter((point) => point.step > last);
  const measured = { ...curve.measured };
  for (const point of fresh) {
    for (const [name, value] of Object.entries(point)) {
      if (isMeasured(name) && typeof value === "number") {
        measured[name] = [...(measured[name] ?? []), [point.step, value]];
      }
    }
  }
  return {
    steps: [...curve.steps, ...fresh.map((point) => point.step)],
    loss: [...curve.loss, ...fresh.map((point) => point.loss)],
    learning_rate: [...curve.learning_rate, ...fresh.map((point) => point.learning_rate)],
    measured,
  };
}

/**
 * The server's curve, extended by the steps that arrived by message during the request.
 * @param {Curve} curve
 * @param {Curve} live
 */
function joined(curve, live) {
  const last = curve.steps[curve.steps.length - 1] ?? 0;
  const start = live.steps.findIndex((step) => step > last);
  if (start < 0) return curve;
  return {
    steps: [...curve.steps, ...live.steps.slice(start)],
    loss: [...curve.loss, ...live.loss.slice(start)],
    learning_rate: [...curve.learning_rate, ...live.learning_rate.slice(start)],
    measured: curve.measured,
  };
}
