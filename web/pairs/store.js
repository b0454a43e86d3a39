// @ts-check
/** The panel's state: the data sets, the chosen one with its pairs, and what the server is doing with it. */
import { t } from "../trainer/words.js";
import { createServer } from "./server.js";
import { CAPTION, createUploads } from "./uploads.js";

/**
 * @typedef {import("./server.js").Pair} Pair
 * @typedef {import("./server.js").DataSet} DataSet
 * @typedef {import("./server.js").Suggestion} Suggestion
 * @typedef {{text: string, act: () => Promise<void>, captions?: Record<string, string>, fleeting?: boolean}} Undo
 *   `captions` are those that were replaced. A `fleeting` one is offered until the next change.
 * @typedef {{uploads: boolean, limits: Record<string, number>, sets: {name: string, pairs: number}[], name: string,
 *   set: DataSet|undefined, mode: "all"|"each", checking: boolean, checkNotes: string[], checked: boolean,
 *   undo: Undo|undefined, problem: string, ready: boolean}} State
 */

const RELOAD_MS = 700; // at most one reading in this time while files arrive

/**
 * @param {any} api ComfyUI's api object.
 * @param {() => void} onChange Called when a data set has changed.
 */
export function createStore(api, onChange) {
  const server = createServer(api);
  /** @type {Set<() => void>} */
  const listeners = new Set();
  /** @type {State} */
  const state = {
    uploads: true, limits: {}, sets: [], name: "", set: undefined, mode: "all", checking: false, checkNotes: [],
    checked: false, undo: undefined, problem: "", ready: false,
  }; // prettier-ignore
  /** @type {Map<string, {pair: string, sentences: string[]}>} Findings by pair, with the pair they are about. */
  let findings = new Map();
  let asked = 0; // number of the newest reading; the answers of older ones are dropped
  let reloading = 0;
  /** @type {Set<string>} Clicks whose change is not shown yet. */
  const pending = new Set();
  /** @type {Promise<void>} Ends after the last change. */
  let changes = Promise.resolve();
  const tell = () => listeners.forEach((listener) => listener());
  /** @type {Map<string, Set<string>|undefined>} Pictures, by side and name, that were known before an upload. */
  const present = new Map();
  const uploads = createUploads(server, {
    changed: tell,
    arrived: soon,
    ended(set, added) {
      const before = present.get(set);
      void inTurn(() => finishUploads(set, added, before));
    },
  });

  /** Run a request. If it fails, show its sentence until the next one. @param {() => Promise<void>} request */
  async function attempt(request) {
    try {
      await request();
      state.problem = "";
    } catch (error) {
      fail(error);
    }
    tell();
  }

  /** @param {any} error */
  function fail(error) {
    state.problem = String(error.message ?? error);
    tell();
  }

  /** Do something when earlier changes are done. @param {() => Promise<void>} act @returns {Promise<void>} */
  function inTurn(act) {
    changes = changes.then(act).catch(fail); // else one error would end all later changes
    return changes;
  }

  async function readList() {
    const answer = await server.list();
    state.sets = answer.data_sets;
    state.uploads = answer.uploads;
    state.limits = answer.limits ?? {};
    state.ready = true;
    if (state.name && !state.sets.some(({ name }) => name === state.name)) leave();
  }

  function leave() {
    asked += 1; // an answer that is on its way is about another data set
    Object.assign(state, { name: "", set: undefined, checkNotes: [], checked: false, undo: undefined });
    findings = new Map();
  }

  async function readSet() {
    if (!state.name) return;
    const number = ++asked;
    const before = state.set;
    const set = await server.read(state.name);
    if (number !== asked) return;
    const known = new Map((before?.pairs ?? []).map((pair) => [pair.key, pair]));
    set.pairs = set.pairs.map((pair) => same(known.get(pair.key), pair)); // so that unchanged rows are not drawn again
    if (!before) state.mode = captionsOf(set).length > 1 ? "each" : "all";
    state.set = set;
    const listed = state.sets.find(({ name }) => name === state.name);
    if (listed) listed.pairs = set.pairs.length;
    if (set.suggestions_left) soon(set.name); // the next reading compares more pictures
  }

  function reload() {
    return attempt(readSet);
  }

  /** Read the data set again, but not for every file that arrives. @param {string} name */
  function soon(name) {
    if (name !== state.name || reloading) return;
    reloading = window.setTimeout(() => {
      reloading = 0;
      reload();
    }, RELOAD_MS);
  }

  /**
   * After an upload into the shown data set, its new pairs get the instruction that all others have.
   * @param {string} name
   * @param {import("./uploads.js").Added[]} added
   * @param {Set<string>|undefined} before Its pictures before the upload, by side and name, if they were known.
   */
  async function finishUploads(name, added, before) {
    onChange();
    if (name !== state.name) return;
    window.clearTimeout(reloading);
    reloading = 0;
    await reload();
    if (name !== state.name) return;
    const written = state.set ? captionsOf(state.set) : [];
    const blank = state.set?.pairs.filter((pair) => !pair.caption) ?? [];
    if (state.mode === "all" && written.length === 1 && blank.length) {
      await attempt(() => write({ captions: Object.fromEntries(blank.map(({ key }) => [key, written[0]])) }));
    } else if (written.length > 1) state.mode = "each"; // captions came with the pictures
    if (!before) return; // what was there before must not be undone with the rest
    const pictures = added
      .filter(({ side, file }) => !CAPTION.test(file) && !before.has(`${side} ${file}`))
      .map(({ side, file }) => ({ side, file }));
    if (!pictures.length) return;
    const count = pictures.length;
    const text = count === 1 ? t("1 picture added.") : t("{count} pictures added.", { count });
    offer({ text, act: () => change("delete", { pictures }), fleeting: true });
  }

  /** @param {{all?: string, captions?: Record<string, string>}} body */
  async function write(body) {
    const { set } = state;
    if (!set) return; // it has been deleted outside this page
    if (state.undo?.fleeting) state.undo = undefined;
    const { undo } = await server.post(set.name, "captions", body);
    onChange();
    if (state.set?.name !== set.name) return;
    if (undo) return reload(); // the trash has the captions from before
    const text = (/** @type {Pair} */ { key, caption }) => body.all ?? body.captions?.[key] ?? caption;
    state.set.pairs = state.set.pairs.map((pair) => same(pair, { ...pair, caption: text(pair) }));
    tell();
    return undefined;
  }

  /**
   * Change the data set by a route when earlier changes are done, and show what has become of it.
   * @param {string} action
   * @param {any} body
   * @param {(answer: any) => Undo|null|undefined} [undone] How the change is undone, from the route's answer. null:
   *   what was offered can't be undone any more.
   */
  function change(action, body, undone) {
    const { name } = state;
    const act = async () => {
      if (state.undo?.fleeting) state.undo = undefined;
      try {
        const answer = await server.post(name, action, body);
        const undo = undone?.(answer);
        if (undo !== undefined && name === state.name) state.undo = undo ?? undefined;
      } finally {
        onChange();
        if (name === state.name) await readSet(); // also after a refusal: something else may have changed it
      }
    };
    return inTurn(() => attempt(act));
  }

  /**
   * A change that a click asks for. A second click has no effect until the rows show what the first one did.
   * @param {string} action
   * @param {any} body
   * @param {(answer: any) => Undo|null|undefined} [undone]
   */
  async function click(action, body, undone) {
    const id = JSON.stringify([state.name, action, body]);
    if (pending.has(id)) return;
    pending.add(id);
    await change(action, body, undone);
    requestAnimationFrame(() => pending.delete(id));
  }

  /** @param {Undo|undefined} undo */
  function offer(undo) {
    state.undo = undo;
    tell();
  }

  return {
    state,
    uploads,
    /** Upload files into the chosen data set. @param {string} side @param {import("./dropped.js").Dropped[]} files */
    upload(side, files) {
      if (!uploads.isBusy(state.name)) present.set(state.name, state.set && new Set(picturesOf(state.set)));
      uploads.add(state.name, side, files, state.limits);
    },
    /** @param {import("./server.js").Picture} picture @param {number} edge */
    picture: (picture, edge) => server.picture(state.name, picture, edge),
    /** Sentences of the last check about a pair, unless it has changed since. @param {Pair} pair */
    findings(pair) {
      const found = findings.get(pair.key);
      return found && found.pair === content(pair) ? found.sentences : [];
    },
    /** @param {() => void} listener @returns {() => void} Unsubscribes. */
    subscribe(listener) {
      listeners.add(listener);
      return () => listeners.delete(listener);
    },
    /** Read the list and the chosen data set again. */
    refresh: () =>
      attempt(async () => {
        await readList();
        await readSet();
      }),
    /** @param {string} name Empty for none. */
    choose(name) {
      if (name === state.name) return Promise.resolve(undefined);
      leave();
      state.name = name;
      tell();
      return reload();
    },
    /** Make an empty data set, or throw the refusal. @param {string} name @returns {Promise<string>} Its name */
    async make(name) {
      const made = await server.make(name);
      await attempt(readList);
      return made.name ?? name;
    },
    /** A name that no data set has. */
    freeName() {
      const taken = new Set(state.sets.map(({ name }) => name.toLowerCase()));
      const first = t("my edit");
      for (let number = 1; ; number += 1) {
        const name = number === 1 ? first : `${first} ${number}`;
        if (!taken.has(name.toLowerCase())) return name;
      }
    },
    /** @param {"all"|"each"} mode */
    setMode(mode) {
      state.mode = mode;
      tell();
    },
    /** Write the caption of one pair. @param {string} key @param {string} text */
    writeOne: (key, text) => write({ captions: { [key]: text } }),
    /** Write one caption for all pairs. What it replaces can be undone. @param {string} text */
    async writeAll(text) {
      const { pairs } = state.set ?? { pairs: [] };
      const again = state.undo?.captions !== undefined && captionsOf({ pairs }).length < 2; // one edit, saved twice
      const captions = again ? state.undo?.captions : Object.fromEntries(pairs.map((pair) => [pair.key, pair.caption]));
      await write({ all: text });
      const count = new Set(Object.values(captions ?? {}).filter(Boolean)).size;
      if (count < 2) return;
      const act = () => inTurn(() => attempt(() => write({ captions })));
      offer({ text: t("The instruction replaced {count} different ones.", { count }), act, captions });
    },
    /** @param {{reference: string, target: string}[]} pairs */
    match: (pairs) => click("match", { pairs: pairs.map(({ reference, target }) => ({ reference, target })) }),
    /** @param {string[]|null} keys Null for all. */
    swap(keys) {
      const text = t("Before and after swapped in all pairs.");
      return click("swap", { keys }, ({ captions_came: captions_back }) =>
        keys ? undefined : { text, act: () => change("swap", { keys, captions_back }) },
      );
    },
    /** @param {string} key @param {boolean} held_out */
    holdOut: (key, held_out) => click("hold_out", { keys: [key], held_out }),
    /** Move pictures to the trash. @param {{side: string, file: string}[]} pictures @param {string} what */
    remove(pictures, what) {
      const text = t("“{what}” is in the trash.", { what });
      return click("delete", { pictures: pictures.map(({ side, file }) => ({ side, file })) }, ({ undo }) => {
        return { text, act: () => change("restore", { undo }) };
      });
    },
    /** Move back what went to the trash last. @param {string} token */
    putBack: (token) => click("restore", { undo: token }, () => null),
    /** Delete what is in the trash for good. @param {import("./server.js").Trash} trash As it was shown. */
    emptyTrash: (trash) => click("empty_trash", { state: trash.state }, () => null),
    /**
     * Wait until the uploads into some data sets, and all changes, are on the disk.
     * @param {string[]} names
     * @returns {Promise<number>} Files that could not be uploaded meanwhile.
     */
    async settled(names) {
      const awaited = names.filter(uploads.isBusy);
      await new Promise((resolve) => {
        const look = () => awaited.some(uploads.isBusy) || resolve(listeners.delete(look));
        listeners.add(look);
        look();
      });
      await changes;
      return awaited.reduce((sum, name) => sum + uploads.lost(name), 0);
    },
    async undo() {
      await changes; // what was done just now is what is undone
      const { undo } = state;
      offer(undefined);
      await undo?.act(); // which tells of its failure
    },
    forgetUndo: () => offer(undefined),
    async check() {
      const { name } = state;
      state.checking = true;
      tell();
      await attempt(async () => {
        const answer = await server.post(name, "check");
        if (name !== state.name) return;
        const pairs = new Map((state.set?.pairs ?? []).map((pair) => [pair.key, content(pair)]));
        const found = Object.entries(answer.findings).filter(([key]) => pairs.has(key));
        findings = new Map(found.map(([key, sentences]) => [key, { pair: pairs.get(key) ?? "", sentences }]));
        Object.assign(state, { checkNotes: answer.notes ?? [], checked: true });
      });
      state.checking = false;
      tell();
    },
  };
}

/** @typedef {ReturnType<typeof createStore>} Store */

/** The different captions of a data set, without empty ones. @param {{pairs: Pair[]}} set */
export function captionsOf({ pairs }) {
  return [...new Set(pairs.map(({ caption }) => caption).filter(Boolean))];
}

/** All pictures, by side and name. @param {DataSet} set */
function picturesOf({ pairs, unmatched }) {
  const all = [...pairs.flatMap(({ reference, target }) => [...reference, target]), ...unmatched];
  return all.flatMap((picture) => (picture ? [`${picture.side} ${picture.file}`] : []));
}

/** The old value if the new one equals it. @template T @param {T|undefined} old @param {T} fresh @returns {T} */
function same(old, fresh) {
  return old && JSON.stringify(old) === JSON.stringify(fresh) ? old : fresh;
}

/** What a check is about: a pair without its place in the validation. @param {Pair} pair */
function content({ reference, target, caption }) {
  return JSON.stringify([reference, target, caption]);
}
