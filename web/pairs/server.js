// @ts-check
/** Requests to the server's routes for data sets. A refused request throws an Error with the server's sentence. */
import { t } from "../trainer/words.js";

const BASE = "/qwen_edit_trainer/data_sets";
const KEPT_ALIVE = 60_000; // bytes. Browsers refuse more than 64 KiB in requests that outlive their page.
const STALLED_MS = 300_000; // an upload without progress for so long is given up

/**
 * @typedef {"reference"|"reference_2"|"reference_3"|"target"} Side
 * @typedef {{file: string, side: Side, width: number|null, height: number|null,
 *   version: string}} Picture
 * @typedef {{key: string, reference: (Picture|null)[], target: Picture|null, caption: string, held_out: boolean}} Pair
 * @typedef {{reference: string, target: string, likeness: number}} Suggestion
 * @typedef {{name: string, revision: string, pairs: Pair[], unmatched: Picture[], suggestions: Suggestion[],
 *   suggestions_left: number, looks_swapped: boolean, notes: string[], trash: Trash}} DataSet `suggestions_left`: how
 *   many pictures are not compared yet. `looks_swapped`: captions lie beside the pictures before the edit only.
 * @typedef {{files: number, bytes: number, size: string, state: string, newest: string, newest_files: string[]}} Trash
 *   `state` changes with what is in it. `newest`: token of the newest removal that can be undone; empty if there is
 *   none. `newest_files` has the first ones of it.
 * @typedef {{added: {file: string, side: Side}[], problems: string[]}} Uploaded
 */

/** @param {any} api ComfyUI's api object. */
export function createServer(api) {
  /** @param {string} set @param {string} [rest] */
  const path = (set, rest = "") => `${BASE}/${encodeURIComponent(set)}${rest}`;

  /** @param {string} address @param {any} [options] @returns {Promise<any>} */
  async function ask(address, options) {
    const answer = await api.fetchApi(address, { cache: "no-store", ...options }).catch(() => {
      throw new Error(t("The server does not answer."));
    });
    const text = await answer.text();
    return read(answer.status, text);
  }

  /** @param {string} address @param {any} [body] */
  function post(address, body = {}) {
    const headers = { "Content-Type": "application/json" };
    const text = JSON.stringify(body);
    const keepalive = new Blob([text]).size < KEPT_ALIVE; // so that closing the page does not lose it
    return ask(address, { method: "POST", headers, body: text, keepalive });
  }

  return {
    list: () => ask(BASE),
    /** @param {string} name */
    make: (name) => post(BASE, { name }),
    /** @param {string} set @returns {Promise<DataSet>} */
    read: (set) => ask(path(set)),
    /** @param {string} set @param {string} action The end of the route, such as "swap". @param {any} [body] */
    post: (set, action, body) => post(path(set, `/${action}`), body),
    /**
     * @param {string} set
     * @param {Picture} picture
     * @param {number} edge Longest side in pixels, at most 1024.
     */
    picture(set, picture, edge) {
      const place = path(set, `/pictures/${picture.side}/${encodeURIComponent(picture.file)}`);
      return api.apiURL(`${place}?edge=${edge}&v=${encodeURIComponent(picture.version)}`);
    },
    /**
     * Send one file. XMLHttpRequest, because fetch does not report progress.
     * @param {string} set
     * @param {string} side A side, or "auto".
     * @param {string} name
     * @param {Blob} file
     * @param {{progress: (bytes: number) => void, signal: AbortSignal}} options
     * @returns {Promise<Uploaded>}
     */
    upload(set, side, name, file, { progress, signal }) {
      return new Promise((resolve, reject) => {
        const request = new XMLHttpRequest();
        const query = new URLSearchParams({ side, name });
        request.open("POST", api.apiURL(`${path(set, "/pictures")}?${query}`));
        request.setRequestHeader("Content-Type", "application/octet-stream");
        const unread = () => new Error(t("the file can't be read, or the server does not answer."));
        let stalled = 0;
        const wait = () => {
          window.clearTimeout(stalled);
          stalled = window.setTimeout(() => {
            reject(unread());
            request.abort();
          }, STALLED_MS);
        };
        request.upload.onprogress = (event) => {
          wait();
          progress(event.loaded);
        };
        request.onloadend = () => window.clearTimeout(stalled);
        request.onerror = () => reject(unread());
        request.onabort = () => reject(new DOMException("", "AbortError"));
        request.onload = () => {
          try {
            resolve(read(request.status, request.responseText));
          } catch (error) {
            reject(error);
          }
        };
        signal.addEventListener("abort", () => request.abort(), { once: true });
        if (signal.aborted) return reject(new DOMException("", "AbortError"));
        wait();
        request.send(file);
        return undefined;
      });
    },
  };
}

/** @typedef {ReturnType<typeof createServer>} Server */

/** The answer's JSON. @param {number} status @param {string} text */
function read(status, text) {
  let body;
  try {
    body = JSON.parse(text);
    if (status >= 200 && status < 300) return body;
  } catch {
    // a proxy's page, for example
  }
  if (body?.error) throw new Error(String(body.error));
  if (status === 413) throw new Error(t("The file is larger than the server allows."));
  throw new Error(t("The server refused this with status {status}.", { status }));
}
