// @ts-check
/** The line at the top of the panel: the state of the data set, and the next step. */
import { t } from "../trainer/words.js";
import { captionsOf } from "./store.js";

/**
 * @typedef {"drop"|"before"|"after"|"choose"|"partners"|"instruction"|"findings"|"graph"|"wait"|"run"} Step
 * @typedef {{state: string, next: string, step: Step}} Line `step` says which part of the panel is next.
 */

/**
 * @param {import("./store.js").Store} store
 * @param {boolean} inGraph Whether a node of the graph uses the data set.
 * @returns {Line}
 */
export function stateLine(store, inGraph) {
  const { state, uploads } = store;
  const progress = uploads.progress();
  if (progress) {
    const { done, all } = progress;
    return line(t("Uploading: {done} of {all} files.", { done, all }), "", "wait");
  }
  if (!state.ready) return line(t("Reading the data sets…"), "", "wait");
  if (!state.name) {
    if (!state.uploads) return line(t("No data set is chosen."), t("Choose one."), "choose");
    if (!state.sets.length) return line(t("No data set yet."), t("Drop your pictures below."), "drop");
    return line(t("No data set is chosen."), t("Choose one, or drop pictures to make a new one."), "choose");
  }
  if (!state.set) return line(t("Reading “{name}”…", { name: state.name }), "", "wait");
  return ofSet(store, state.set, inGraph);
}

/**
 * @param {import("./store.js").Store} store
 * @param {import("./server.js").DataSet} set
 * @param {boolean} inGraph
 * @returns {Line}
 */
function ofSet(store, set, inGraph) {
  const { pairs, unmatched, suggestions } = set;
  const ready = pairs.length === 1 ? t("1 pair") : t("{count} pairs", { count: pairs.length });
  if (!pairs.length && !unmatched.length) {
    const next = t("Drop your pictures into Before and After.");
    return line(t("“{name}” is empty.", { name: set.name }), next, "drop");
  }
  if (suggestions.length) {
    const more = t("{pairs}, {count} more look alike.", { pairs: ready, count: suggestions.length });
    return line(more, t("Accept the suggestions, or choose other partners."), "partners");
  }
  if (unmatched.length) {
    const after = unmatched.filter(({ side }) => side === "target").length;
    if (!pairs.length && !after) {
      return line(
        t("{count} before, none after.", { count: unmatched.length }),
        unmatched.length === 1 ? t("Drop its partner into After.") : t("Drop their partners into After."),
        "after",
      );
    }
    if (!pairs.length && after === unmatched.length) {
      return line(
        t("{count} after, none before.", { count: after }),
        after === 1 ? t("Drop its partner into Before.") : t("Drop their partners into Before."),
        "before",
      );
    }
    const alone =
      unmatched.length === 1
        ? t("{pairs}, 1 picture without a partner.", { pairs: ready })
        : t("{pairs}, {count} pictures without a partner.", { pairs: ready, count: unmatched.length });
    const here = after && after < unmatched.length;
    if (here) return line(alone, t("Choose their partners, or delete them."), "partners");
    const ways = after
      ? [t("Drop its partner into Before, or delete it."), t("Drop their partners into Before, or delete them.")]
      : [t("Drop its partner into After, or delete it."), t("Drop their partners into After, or delete them.")];
    return line(alone, ways[unmatched.length === 1 ? 0 : 1], after ? "before" : "after");
  }
  if (set.looks_swapped) {
    const next = t("If before and after are swapped, press Swap all. If not, write the instruction.");
    return line(t("{pairs}.", { pairs: ready }), next, "instruction");
  }
  return ofPairs(store, pairs, ready, captionsOf(set).length, inGraph);
}

/**
 * @param {import("./store.js").Store} store
 * @param {import("./server.js").Pair[]} pairs All have both pictures.
 * @param {string} ready
 * @param {number} captions Number of different captions.
 * @param {boolean} inGraph
 * @returns {Line}
 */
function ofPairs(store, pairs, ready, captions, inGraph) {
  if (!captions) return line(t("{pairs}.", { pairs: ready }), t("Write the instruction."), "instruction");
  const blank = pairs.filter(({ caption }) => !caption).length;
  if (blank)
    return line(
      t("{pairs}, {count} without an instruction.", { pairs: ready, count: blank }),
      t("Write it."),
      "instruction",
    );
  if (pairs.every(({ held_out }) => held_out)) {
    return line(t("{pairs}, all held out.", { pairs: ready }), t("Leave some for the training."), "findings");
  }
  const found = pairs.filter((pair) => store.findings(pair).length).length;
  if (found)
    return line(
      t("{pairs}, {count} with findings.", { pairs: ready, count: found }),
      t("Look at them, or press Run."),
      "findings",
    );
  if (!inGraph) return line(t("{pairs}, ready.", { pairs: ready }), t("Use them in a graph."), "graph");
  return line(t("{pairs}, ready.", { pairs: ready }), t("Press Run."), "run");
}

/** @param {string} state @param {string} next @param {Step} step @returns {Line} */
function line(state, next, step) {
  return { state, next, step };
}
