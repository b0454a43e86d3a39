// @ts-check
/** Formats numbers and states for display. */

const UNKNOWN = "–";

/** @param {number|null|undefined} value */
export function loss(value) {
  if (typeof value !== "number" || !Number.isFinite(value)) return UNKNOWN;
  return value !== 0 && Math.abs(value) < 0.001 ? value.toExponential(2) : value.toPrecision(4);
}

/** @param {number|null|undefined} value */
export function rate(value) {
  if (typeof value !== "number" || !Number.isFinite(value)) return UNKNOWN;
  return value === 0 ? "0" : value.toExponential(1).replace(".0e", "e");
}

/** @param {number|null|undefined} seconds */
function duration(seconds) {
  if (typeof seconds !== "number" || !Number.isFinite(seconds)) return UNKNOWN;
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
}

/** @param {number|null|undefined} seconds Seconds per step. */
function speed(seconds) {
  if (typeof seconds !== "number" || !(seconds > 0)) return UNKNOWN;
  return seconds < 1 ? `${(1 / seconds).toFixed(1)} steps/s` : `${seconds.toFixed(1)} s/step`;
}

/** @param {number|null|undefined} bytes */
function memory(bytes) {
  return bytes ? `${(bytes / 2 ** 30).toFixed(1)} GiB` : UNKNOWN;
}

const STATES = {
  training: "training",
  started: "starting",
  interrupted: "interrupted",
  elsewhere: "running in another process",
  damaged: "damaged",
  paused: "paused",
  kept: "ended early",
  finished: "finished",
};

/**
 * @param {import("./store.js").Run} run
 * @returns {string}
 */
export function state(run) {
  if (run.active && run.stopping) return "ending";
  return STATES[/** @type {keyof typeof STATES} */ (run.state)] ?? String(run.state);
}

/**
 * One line: steps and memory, and for a run in progress its phase, or its speed and remaining time.
 * @param {import("./store.js").Run} run
 */
export function progress(run) {
  const parts = [run.num_steps ? `step ${run.step} of ${run.num_steps}` : `step ${run.step}`];
  if (run.active) {
    if (run.phase) parts.push(run.phase);
    else if (run.seconds_per_step) parts.push(speed(run.seconds_per_step), `${duration(run.seconds_left)} left`);
  }
  if (run.peak_bytes) parts.push(`VRAM ${memory(run.peak_bytes)}`);
  return parts.join(" · ");
}
