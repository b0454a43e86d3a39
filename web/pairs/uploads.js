// @ts-check
/** Uploads files, a few at a time, and keeps the problems of files in one list. */
import { labelled, t } from "../trainer/words.js";

/**
 * @typedef {import("./dropped.js").Dropped} Dropped
 * @typedef {import("./server.js").Server} Server
 * @typedef {{side: string, file: string}} Added
 * @typedef {{left: number, lost: number, added: Added[]}} Batch The files of a data set that are uploaded together:
 *   `left` are still to come, `lost` were cancelled, refused or too large.
 * @typedef {{set: string, batch: Batch, side: string, name: string, file: File}} Task
 * @typedef {{done: number, all: number, share: number, name: string}} Progress `share` from 0 to 1, by bytes.
 */

const AT_ONCE = 3;
export const CAPTION = /\.(txt|caption)$/i;

/**
 * @param {Server} server
 * @param {{changed: () => void, arrived: (set: string) => void, ended: (set: string, added: Added[]) => void}} tell
 *   `changed` after progress, `arrived` after each file, `ended` after the last one of a data set.
 */
export function createUploads(server, tell) {
  /** @type {Task[]} */
  const waiting = [];
  let stop = new AbortController();
  let running = 0;
  let done = 0;
  let all = 0;
  let name = "";
  let bytesDone = 0;
  let bytesAll = 0;
  /** @type {Map<Task, number>} Bytes sent of the running ones. */
  const sent = new Map();
  /** @type {string[]} */
  let problems = [];
  /** @type {Map<string, Batch>} The newest one of each data set. */
  const batches = new Map();
  const isBusy = (/** @type {string} */ set) => Boolean(batches.get(set)?.left);

  /** @param {Task} task */
  function finish({ set, batch }) {
    batch.left -= 1;
    if (!batch.left) tell.ended(set, batch.added);
  }

  /** @param {Task} task */
  async function send(task) {
    const { signal } = stop;
    name = task.name;
    sent.set(task, 0);
    const progress = (/** @type {number} */ bytes) => {
      sent.set(task, bytes);
      tell.changed();
    };
    try {
      const answer = await server.upload(task.set, task.side, task.name, task.file, { progress, signal });
      problems.push(...answer.problems);
      task.batch.lost += answer.problems.length;
      task.batch.added.push(...answer.added);
    } catch (error) {
      task.batch.lost += 1;
      if (!signal.aborted) problems.push(labelled(task.name, /** @type {any} */ (error).message));
    }
    sent.delete(task);
    bytesDone += task.file.size;
    done += 1;
  }

  async function work() {
    running += 1;
    for (let task = waiting.shift(); task; task = waiting.shift()) {
      await send(task);
      tell.arrived(task.set);
      finish(task);
      tell.changed();
    }
    running -= 1;
    if (running) return;
    done = all = bytesDone = bytesAll = 0;
    tell.changed();
  }

  return {
    /** @param {string} set @param {string} side @param {Dropped[]} files @param {Record<string, number>} limits */
    add(set, side, files, limits) {
      if (!isBusy(set)) batches.set(set, { left: 0, lost: 0, added: [] });
      const batch = /** @type {Batch} */ (batches.get(set));
      for (const { file, path } of files) {
        const largest = (/\.zip$/i.test(path) ? limits.zip_bytes : limits.file_bytes) ?? Infinity;
        if (file.size > largest) {
          const [size, allowed] = [Math.ceil(file.size / 1e6), Math.floor(largest / 1e6)];
          batch.lost += 1;
          problems.push(t("{file}: {size} MB. The server takes at most {allowed} MB.", { file: path, size, allowed }));
          continue;
        }
        const sure = side === "auto" ? path : /** @type {string} */ (path.split("/").pop());
        const place = side !== "auto" && CAPTION.test(path) ? "target" : side;
        waiting.push({ set, batch, side: place, name: sure, file });
        batch.left += 1;
        all += 1;
        bytesAll += file.size;
      }
      if (stop.signal.aborted) stop = new AbortController();
      for (let more = Math.min(AT_ONCE - running, waiting.length); more > 0; more -= 1) work();
      tell.changed();
    },
    /** @returns {Progress|undefined} */
    progress() {
      if (!running) return undefined;
      const bytes = bytesDone + [...sent.values()].reduce((sum, each) => sum + each, 0);
      return { done, all, share: bytesAll ? Math.min(1, bytes / bytesAll) : 0, name };
    },
    cancel() {
      for (const task of waiting.splice(0)) {
        task.batch.lost += 1;
        finish(task);
      }
      stop.abort();
    },
    /** Whether files of a data set are still to come. */
    isBusy,
    /** Number of files of a data set that did not arrive, of this upload or the last one. @param {string} set */
    lost: (set) => batches.get(set)?.lost ?? 0,
    /** What went wrong with files, until it is cleared. */
    problems: () => problems,
    clear() {
      problems = [];
      tell.changed();
    },
  };
}

/** @typedef {ReturnType<typeof createUploads>} Uploads */
