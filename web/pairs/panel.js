// @ts-check
/** The side panel "Edit pairs": a data set of picture pairs, from the first drop to a graph that uses it. */
import { element, onceAFrame, setText } from "../trainer/dom.js";
import { addNode, chooseInCombo, nodesOfKind, selectedNode, setValue, toast, widget } from "../trainer/graph.js";
import { sentences, t } from "../trainer/words.js";
import { createProblems, createProgress, createTrash, createUndo, createUse } from "./boxes.js";
import { createChooser } from "./chooser.js";
import { createInstruction } from "./instruction.js";
import { createList } from "./list.js";
import { createLook } from "./look.js";
import { stateLine } from "./state_line.js";
import { createStore } from "./store.js";
import { acceptDrops, createZones } from "./zones.js";

export const PAIRS_NODE = "QwenEdit_EditPairs";

/** @typedef {import("./dropped.js").Dropped} Dropped */

/**
 * @param {any} app
 * @param {any} api
 * @param {() => void} onChange Called when a data set has changed.
 */
export function createPairsPanel(app, api, onChange) {
  const store = createStore(api, onChange);
  const { state, uploads } = store;
  const line = element("p", { class: "qet-state", role: "status" });
  const problem = element("p", { class: "qet-problem", role: "alert", hidden: true });
  const chooser = createChooser(store, (name) => choose(name, true));
  const zones = createZones(give);
  const progress = createProgress(uploads);
  const problems = createProblems(uploads);
  const undo = createUndo(store);
  const trash = createTrash(store, () => list.focusHeading());
  const notes = element("ul", { class: "qet-notes" });
  const used = createUse(useInGraph, clearInstruction);
  const instruction = createInstruction(store);
  const look = createLook(store);
  const list = createList(store, look.open);
  const head = element(
    "div",
    { class: "qet-head" },
    line,
    problem,
    chooser.element,
    zones.element,
    progress.element,
    undo.element,
  );
  const body = element(
    "div",
    { class: "qet-body" },
    problems.element,
    used.element,
    instruction.element,
    notes,
    list.element,
    trash.element,
  );
  const root = element("div", { class: "qet-panel qet-pairs" }, head, body, look.element);
  const paint = onceAFrame(draw);
  /** @type {any} The node whose button opened the panel. */
  let opener;
  let mounted = false;
  let hasNewFiles = false; // since the instruction was asked for
  let shown = ""; // name of the data set

  acceptDrops(root, give, (text) => toast(app, "warn", text));
  keepFromComfy(root, () => store.undo());

  /** The node of the graph that this panel is about. */
  function node() {
    const nodes = nodesOfKind(app, PAIRS_NODE);
    if (nodes.includes(opener)) return opener;
    const selected = selectedNode(app);
    return nodes.includes(selected) ? selected : nodes.length === 1 ? nodes[0] : undefined;
  }

  /** The value of a widget of that node. @param {string} name */
  const inNode = (name) => String((node() && widget(node(), name)?.value) ?? "");

  /** How the graph gets the data set. */
  function way() {
    if (node()) return t("Use in the graph");
    return nodesOfKind(app, PAIRS_NODE).length ? t("Use in the clicked node") : t("Add a node with these pairs");
  }

  /** @param {string} name @param {boolean} [inGraph] Whether the node of the graph gets it too. */
  async function choose(name, inGraph = false) {
    if (name !== state.name) {
      if (!(await saveAll())) return paint(); // the field says what could not be saved
      await store.choose(name);
    }
    if (inGraph && node()) await useInGraph();
    paint();
  }

  async function useInGraph() {
    const target = nodesOfKind(app, PAIRS_NODE).length ? node() : addNode(app, PAIRS_NODE);
    if (target) await chooseInCombo(app, target, "data_set", state.name);
    else toast(app, "info", t("Click the node Edit Pairs that you mean, and press the button again."));
    paint();
  }

  function clearInstruction() {
    setValue(app, widget(node(), "instruction"), "");
    paint();
  }

  /**
   * Upload what was dropped or chosen. Without a data set, a new one is made.
   * @param {string} side
   * @param {Dropped[]} files
   */
  async function give(side, files) {
    if (!state.uploads) return toast(app, "warn", t("Uploads are turned off on this server."));
    if (!state.name) {
      try {
        await choose(await store.make(store.freeName()), true);
      } catch (error) {
        return toast(app, "error", t("No data set could be made"), /** @type {any} */ (error).message);
      }
    }
    hasNewFiles = true;
    store.upload(side, files);
    return undefined;
  }

  async function saveAll() {
    const saved = await Promise.all([instruction.flush(), list.flush()]);
    return saved.every(Boolean);
  }

  function draw() {
    if (shown !== state.name) instruction.reset();
    shown = state.name;
    const { state: what, next, step } = stateLine(store, inNode("data_set") === state.name);
    if (line.dataset.shown !== what + next) {
      line.dataset.shown = what + next;
      const then = next ? [element("b", { text: t("Next:") }), sentences(["", next])] : [];
      line.replaceChildren(sentences([what, ""]), ...then);
    }
    problem.hidden = !state.problem;
    setText(problem, state.problem);
    chooser.show();
    root.toggleAttribute("data-fixed", !state.uploads);
    zones.show(state.set, step);
    progress.show();
    problems.show();
    undo.show();
    used.show(step === "graph", inNode("data_set") === state.name ? inNode("instruction") : "", way());
    instruction.show(step === "instruction");
    if (hasNewFiles && step === "instruction" && mayTakeFocus(root)) instruction.focus();
    if (step === "instruction" || step === "run") hasNewFiles = false;
    const off = state.uploads ? [] : [t("Changes to data sets are turned off on this server.")];
    const remarks = [...off, ...(state.set?.notes ?? []), ...state.checkNotes, ...checked(store)];
    if (notes.dataset.shown !== remarks.join("\n")) {
      notes.dataset.shown = remarks.join("\n");
      notes.replaceChildren(...remarks.map((text) => element("li", { text })));
    }
    notes.hidden = !remarks.length;
    list.show();
    trash.show();
  }

  /** Read again what may have changed on the disk or in the graph. */
  function refresh() {
    if (mounted && document.visibilityState === "visible") store.refresh();
  }

  async function start() {
    await store.refresh();
    const own = state.sets.find(({ name }) => name === inNode("data_set")) ?? (node() ? undefined : state.sets[0]);
    if (own && !state.name) await choose(own.name);
  }

  return {
    /** @param {HTMLElement} place @returns {() => void} Removes it. */
    mount(place) {
      place.append(root);
      root.style.setProperty("--qet-back", backgroundOf(place));
      const end = store.subscribe(paint);
      const hidden = () => (document.visibilityState === "hidden" ? saveAll() : refresh());
      document.addEventListener("visibilitychange", hidden);
      mounted = true;
      start();
      draw();
      return () => {
        mounted = false;
        saveAll();
        end();
        document.removeEventListener("visibilitychange", hidden);
        root.remove();
      };
    },
    /**
     * Wait until all that was given here to a prompt's data sets is on the disk. Throws if it can't be saved.
     * @param {Record<string, {class_type: string, inputs: any}>} [prompt]
     */
    async settle(prompt = {}) {
      const nodes = Object.values(prompt).filter(({ class_type }) => class_type === PAIRS_NODE);
      const names = [...new Set(nodes.map(({ inputs }) => inputs.data_set))];
      if (!names.length) return;
      if (names.some(uploads.isBusy)) toast(app, "info", t("The run starts when all pictures are uploaded."));
      const count = await store.settled(names);
      if (count) throw new Error(t("Not started: files that could not be uploaded: {count}.", { count }));
      if (!names.includes(state.name) || (await saveAll())) return;
      throw new Error(t("Not started: a text in the side panel Edit pairs could not be saved. Open it to see why."));
    },
    /** Let a new node use the data set that is shown, rather than the first one. @param {any} made */
    prefill(made) {
      const combo = widget(made, "data_set");
      if (combo?.options?.values?.includes?.(state.name)) combo.value = state.name;
    },
    /** Show the data set of a node. @param {any} wanted */
    async open(wanted) {
      opener = wanted;
      await store.refresh();
      const name = widget(wanted, "data_set")?.value;
      await choose(state.sets.some((set) => set.name === name) ? name : "");
    },
  };
}

/** The colour behind an element, which the head needs while pairs scroll below it. @param {Element} place */
function backgroundOf(place) {
  for (let at = /** @type {Element|null} */ (place); at; at = at.parentElement) {
    const colour = getComputedStyle(at).backgroundColor;
    if (colour && !/^(transparent|rgba\(.*, 0\))$/.test(colour)) return colour;
  }
  return "var(--comfy-menu-bg)";
}

/** Whether nobody uses a field, a dialog or the panel, as after dropping files. @param {Element} root */
function mayTakeFocus(root) {
  const busy = "input, textarea, select, [contenteditable], [role=dialog], [role=menu], [role=alert]";
  return !document.activeElement?.closest(busy) && !root.contains(document.activeElement);
}

/** What a check without findings says. @param {import("./store.js").Store} store */
function checked({ state, findings }) {
  const clean =
    state.checked &&
    !state.checking &&
    !state.checkNotes.length &&
    state.set?.pairs.every((pair) => !findings(pair).length);
  return clean ? [t("✓ The check found nothing wrong.")] : [];
}

/**
 * Keep keys and the clipboard from ComfyUI, which would use them for its graph. Only Ctrl+Enter, to run it, goes on.
 * @param {HTMLElement} root
 * @param {() => void} undo
 */
function keepFromComfy(root, undo) {
  for (const name of ["copy", "cut", "paste", "keyup"]) root.addEventListener(name, (event) => event.stopPropagation());
  root.addEventListener("keydown", (event) => {
    const control = event.ctrlKey || event.metaKey;
    if (control && event.key === "Enter") return;
    event.stopPropagation();
    const isField = /^(TEXTAREA|INPUT)$/.test(/** @type {Element} */ (event.target).tagName);
    if (!control || event.key.toLowerCase() !== "z" || isField) return;
    event.preventDefault();
    undo();
  });
}
