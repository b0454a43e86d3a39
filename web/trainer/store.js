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
 *   problem?: string, phase?: string, stopping?: boolean, node_id?: string|null, changed?: number, has_graph?: boolean,
 *   psnr?: Record<string, number|null>, unmeasured?: string, curve?: Curve, samples?: Sample[], revision: number}} Run
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

  /** @param {string} path */
  async function get(path) {
    const answer = await api.fetchApi(BASE + path);
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
    const before = runs.get(values.run_name) ?? { state: "started", step: 0, num_steps: 0, loss: null, revision: 0 };
    const run = { ...before, ...values, revision: before.revision + 1 };
    runs.set(run.run_name, run);
    tell();
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
    [...runs.keys()].filter((name) => !names.has(name)).forEach((name) => runs.delete(name));
    const order = new Map();
    listed.forEach((/** @type {Run} */ run) => order.set(run.run_name, merge(run)));
    runs.clear();
    order.forEach((run, name) => runs.set(name, run));
    tell();
  }

  /** Fetch curve and samples of a run, and keep them up to date from now on. @param {string} name */
  function load(name) {
    loaded.add(name);
    const request = () =>
      readRun(name).catch((error) => {
        loaded.delete(name);
        throw error;
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
      merge({ ...values, state: detail.active ? "training" : before?.state });
      reloadAll();
      return;
    }
    const curve = before.curve && extended(before.curve, points);
    merge({ ...values, curve });
    if (samples !== undefined || (curve && curve.steps.length > MAX_POINTS)) reload(detail.run_name);
  }

  api.addEventListener("qwen_edit_trainer.run", onMessage);
  api.addEventListener("reconnected", reloadAll);

  return {
    refresh,
    /** Load a run, unless it is loaded, being loaded or waiting for a retry. @param {string} name */
    want(name) {
      if (!loaded.has(name) && !waiting.has(name)) load(name);
    },
    /** Error message of the list request or of a run's request. @param {string} [name] The run. */
    problem: (name = LIST) => failures.get(LIST) ?? failures.get(name),
    get,
    runPath,
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
      const body = JSON.stringify({ run_name: name });
      const headers = { "Content-Type": "application/json" };
      const answer = await api.fetchApi(`${BASE}/stop`, { method: "POST", headers, body });
      if (!answer.ok) throw new Error((await answer.json()).error);
      merge({ run_name: name, stopping: true });
    },
  };
}

/** @typedef {ReturnType<typeof createStore>} Store */

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
