// @ts-check
/** Uploads files, a few at a time, and keeps the problems of files in one list. */
import { labelled, t } from "../trainer/words.js";

/**
 * @typedef {import("./dropped.js").Dropped} Dropped
 * @typedef {import("./server.js").Server} Server
 * @typedef {{set: string, side: string, name: string, file: File}} Task
 * @typedef {{set: string, side: string, file: string}} Added
 * @typedef {{done: number, all: number, share: number, name: string}} Progress `share` from 0 to 1, by bytes.
 */

const AT_ONCE = 3;
export const CAPTION = /\.(txt|caption)$/i;

/**
 * @param {Server} server
 * @param {{changed: () => void, arrived: (set: string) => void, ended: (added: Added[]) => void}} tell
 *   `changed` after progress, `arrived` after each file, `ended` after the last.
 */
export function createUploads(server, tell) {
  /** @type {Task[]} */
  let waiting = [];
  let stop = new AbortController();
  let running = 0;
  let done = 0;
  let lost = 0; // of this batch or the last one: cancelled, refused or too large
  let all = 0;
  let name = "";
  let bytesDone = 0;
  let bytesAll = 0;
  /** @type {Map<Task, number>} Bytes sent of the running ones. */
  const sent = new Map();
  /** @type {string[]} */
  let problems = [];
  /** @type {Added[]} */
  let added = [];

  /** @param {Task} task */
  async function send(task) {
    name = task.name;
    sent.set(task, 0);
    const progress = (/** @type {number} */ bytes) => {
      sent.set(task, bytes);
      tell.changed();
    };
    try {
      const answer = await server.upload(task.set, task.side, task.name, task.file, { progress, signal: stop.signal });
      problems.push(...(answer.problems ?? []));
      added.push(...(answer.added ?? []).map((each) => ({ set: task.set, ...each })));
    } catch (error) {
      lost += 1;
      if (!stop.signal.aborted) problems.push(labelled(task.name, /** @type {any} */ (error).message));
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
      tell.changed();
    }
    running -= 1;
    if (running) return;
    done = all = bytesDone = bytesAll = 0;
    tell.ended(added);
    added = [];
    tell.changed();
  }

  return {
    /** @param {string} set @param {string} side @param {Dropped[]} files @param {Record<string, number>} limits */
    add(set, side, files, limits) {
      if (!running) lost = 0;
      for (const { file, path } of files) {
        const largest = (/\.zip$/i.test(path) ? limits.zip_bytes : limits.file_bytes) ?? Infinity;
        if (file.size > largest) {
          const [size, allowed] = [Math.ceil(file.size / 1e6), Math.floor(largest / 1e6)];
          lost += 1;
          problems.push(t("{file}: {size} MB. The server takes at most {allowed} MB.", { file: path, size, allowed }));
          continue;
        }
        const sure = side === "auto" ? path : /** @type {string} */ (path.split("/").pop());
        waiting.push({ set, side: side !== "auto" && CAPTION.test(path) ? "target" : side, name: sure, file });
        all += 1;
        bytesAll += file.size;
      }
      if (!running) stop = new AbortController();
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
      lost += waiting.length;
      waiting = [];
      stop.abort();
    },
    /** Number of files of this batch or the last one that did not arrive. */
    lost: () => lost,
    /** What went wrong with files, until it is cleared. */
    problems: () => problems,
    clear() {
      problems = [];
      tell.changed();
    },
  };
}

/** @typedef {ReturnType<typeof createUploads>} Uploads */
