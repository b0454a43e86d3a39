// @ts-check
/** Formats numbers and states for display. */
import { t } from "./words.js";

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
export function duration(seconds) {
  if (typeof seconds !== "number" || !Number.isFinite(seconds)) return UNKNOWN;
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 60) return t("{seconds} s", { seconds: whole });
  if (whole < 3600) return t("{minutes} min {seconds} s", { minutes: Math.floor(whole / 60), seconds: whole % 60 });
  return t("{hours} h {minutes} min", { hours: Math.floor(whole / 3600), minutes: Math.floor((whole % 3600) / 60) });
}

/** An estimated time, without digits that it can't have. @param {number} seconds */
export function roughly(seconds) {
  if (seconds < 90) return t("{seconds} s", { seconds: Math.max(1, Math.round(seconds)) });
  const minutes = Math.round(seconds / 60);
  if (minutes < 60) return t("{minutes} min", { minutes });
  return t("{hours} h {minutes} min", { hours: Math.floor(minutes / 60), minutes: minutes % 60 });
}

/** @param {number|null|undefined} seconds Seconds per step. */
function speed(seconds) {
  if (typeof seconds !== "number" || !(seconds > 0)) return UNKNOWN;
  if (seconds < 1) return t("{number} steps/s", { number: (1 / seconds).toFixed(1) });
  return t("{number} s/step", { number: seconds.toFixed(1) });
}

/** @param {number|null|undefined} bytes */
function memory(bytes) {
  return bytes ? `${(bytes / 2 ** 30).toFixed(1)} GiB` : UNKNOWN;
}

/**
 * @param {import("./store.js").Run} run
 * @returns {string}
 */
export function state(run) {
  if (run.active && run.stopping) return t("ending");
  const states = /** @type {Record<string, string>} */ ({
    queued: t("queued"),
    encoding: t("encoding pairs"),
    training: t("training"),
    started: t("starting"),
    interrupted: t("interrupted"),
    elsewhere: t("running in another process"),
    damaged: t("damaged"),
    paused: t("paused"),
    kept: t("ended early"),
    finished: t("finished"),
  });
  return states[run.state] ?? String(run.state);
}

/**
 * One line: steps and memory, and for a run in progress its phase, or its speed and remaining time.
 * @param {import("./store.js").Run} run
 */
export function progress(run) {
  const { step, num_steps: count } = run;
  if (run.state === "queued") return t("Waits in ComfyUI's queue");
  if (run.state === "encoding") return run.phase || t("Encoding the pairs");
  const parts = [count ? t("step {step} of {count}", { step, count }) : t("step {step}", { step })];
  if (run.active) {
    if (run.phase) parts.push(run.phase);
    else if (run.seconds_per_step) {
      parts.push(speed(run.seconds_per_step), t("{time} left", { time: duration(run.seconds_left) }));
    }
  }
  if (run.peak_bytes) parts.push(t("VRAM {size}", { size: memory(run.peak_bytes) }));
  return parts.join(" · ");
}

/** How much of a run, or of its phase before the first step, is done: 0 to 1. @param {import("./store.js").Run} run */
export function share(run) {
  if (run.active && run.phase && run.phase_total) return (run.phase_done ?? 0) / run.phase_total;
  return run.num_steps ? run.step / run.num_steps : 0;
}
