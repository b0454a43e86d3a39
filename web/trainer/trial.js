// @ts-check
/** Tries a run's LoRA: queues the node Try Qwen Edit LoRA, and shows what it draws beside the pictures before it. */
import { element, setText } from "./dom.js";
import { queueGraph } from "./graph.js";
import { listed, t } from "./words.js";

/**
 * @typedef {import("./store.js").Run} Run
 * @typedef {{filename: string, subfolder: string, type: string}} Place
 * @typedef {{step: number, pair: number, strength: number, pictures: Record<string, Place>,
 *   psnr: Record<string, number|null>}} Result
 */

export const TRY_NODE = "QwenEdit_TryLora";
const ID = "qwen-edit-trial"; // the node's id in the prompt; no node of the user's graph has it
const MOST = 1.5; // strength

/**
 * @param {{api: any, onError: (what: string, error: any) => void}} given
 */
export function createTrial({ api, onError }) {
  const strength = element("input", {
    type: "range", class: "qet-slider", min: 0, max: MOST, step: 0.05, value: 1,
    "aria-label": t("Strength of the LoRA"),
  }); // prettier-ignore
  const strengthLabel = element("output", { class: "qet-step-label" });
  const button = element("button", { type: "button", class: "qet-button" });
  const state = element("p", { class: "qet-quiet", role: "status" });
  const shown = element("div", { class: "qet-trial" });
  const box = element(
    "section", { class: "qet-compare", "aria-label": t("Try the LoRA") },
    element("h4", { class: "qet-heading", text: t("Try the LoRA") }),
    element("label", { class: "qet-row qet-step-row" }, `${t("strength")} `, strength, strengthLabel),
    element("div", { class: "qet-actions" }, button), state, shown,
  ); // prettier-ignore
  /** @type {Map<string, Result>} Results of the run by step, pair and strength. */
  const results = new Map();
  /** @type {Run|undefined} */
  let run;
  let [step, pair] = [0, 0];
  let followed = [0, 0]; // what the comparison showed last
  /** @type {Result|undefined} */
  let current; // whose pictures are shown
  let mayScroll = false; // after a click on the button at the end of the run, which is far above the pictures
  let asked = ""; // id of the prompt in the queue
  let wanted = ""; // key of the result that the prompt will give
  let said = ""; // how the trial goes on, or how it ended

  const key = () => `${step}/${pair}/${Number(strength.value).toFixed(2)}`;
  const isKept = () => Boolean(run && (step === endOf(run) || run.loras?.some((lora) => lora.step === step)));

  function paint() {
    const value = Number(strength.value);
    setText(strengthLabel, value.toFixed(2));
    setText(button, asked ? t("Drawing…") : t("Try step {step}", { step }));
    button.disabled = Boolean(asked) || !isKept();
    button.title = t("Draw this held-out pair with the LoRA of step {step} at this strength", { step });
    setText(state, asked || isKept() ? said : notKept(run));
    const alike = [...results.values()].filter((result) => result.step === step && result.pair === pair);
    const distance = (/** @type {Result} */ result) => Math.abs(result.strength - value);
    draw(alike.sort((one, other) => distance(one) - distance(other))[0]);
  }

  /** @param {Result|undefined} result The one whose strength is nearest. */
  function draw(result) {
    if (result === current) return; // else the pictures would load again
    current = result;
    shown.hidden = !result;
    if (!result) return shown.replaceChildren();
    const columns = Object.entries(result.pictures);
    shown.replaceChildren(
      ...columns.map(([column, place]) => {
        const psnr = result.psnr[column];
        const name = column === "lora" || column === "ema"
          ? t("LoRA at strength {strength}", { strength: result.strength.toFixed(2) })
          : titleOf(column); // prettier-ignore
        const src = api.apiURL(`/view?${new URLSearchParams(place)}`);
        const label = typeof psnr === "number" ? `${name} (${psnr.toFixed(1)} dB)` : name;
        const picture = element("img", { src, alt: label, on: { load: reveal } });
        return element("figure", {}, picture, element("figcaption", { text: label }));
      }),
    );
  }

  /** Scroll to the pictures. They have their height when they are loaded. */
  function reveal() {
    if (mayScroll) shown.scrollIntoView({ block: "nearest" });
  }

  /** Queue a sample of the shown step and pair, unless it is drawn already. */
  async function begin() {
    if (!run || asked || !isKept()) return;
    wanted = key();
    if (results.has(wanted)) return paint();
    const inputs = {
      run_name: run.run_name, step: step === endOf(run) ? 0 : step, strength: Number(strength.value), pair: pair + 1,
      picture: "held-out pair", instruction: "",
    }; // prettier-ignore
    asked = "…";
    said = t("Queued. The model is loaded first, as at the start of a training.");
    paint();
    try {
      const prompt = { [ID]: { class_type: TRY_NODE, inputs } };
      asked = (await queueGraph(api, { prompt, workflow: undefined }, { next: true })).prompt_id;
    } catch (error) {
      end("");
      onError(t("Try it"), error);
    }
  }

  /** @param {string} text What happened. */
  function end(text) {
    asked = "";
    said = text;
    paint();
    if (key() !== wanted && isKept() && wanted.startsWith(`${step}/${pair}/`)) begin(); // the slider has moved on
  }

  /** @param {string} name @param {(detail: any) => void} call For messages about our prompt. */
  function hear(name, call) {
    api.addEventListener(name, (/** @type {CustomEvent} */ { detail }) => {
      if (asked && detail?.prompt_id === asked) call(detail);
    });
  }

  hear("progress", ({ value, max }) => {
    said = t("Drawing: {done} of {total}", { done: value, total: max });
    paint();
  });
  hear("executed", ({ output }) => {
    const [found] = output?.qwen_edit_try ?? [];
    if (!found || found.run_name !== run?.run_name) return;
    results.set(wanted, { ...found, pair: Number(wanted.split("/")[1]) });
  });
  hear("execution_success", () => end(""));
  hear("execution_interrupted", () => {
    wanted = "";
    end(t("Interrupted."));
  });
  hear("execution_error", (detail) => {
    wanted = "";
    end(String(detail.exception_message ?? "").trim());
  });
  strength.addEventListener("input", () => {
    mayScroll = false;
    paint();
  });
  strength.addEventListener("change", begin);
  button.addEventListener("click", begin);

  return {
    element: box,
    /** Draw the shown pair with the LoRA of the run's end, at the chosen strength. */
    beginAtEnd() {
      step = (run && endOf(run)) ?? step;
      box.scrollIntoView({ block: "nearest" });
      strength.focus({ preventScroll: true }); // the pressed button is out of view now
      mayScroll = true;
      return begin();
    },
    /** @param {Run} next @param {number} atStep @param {number} ofPair */
    show(next, atStep, ofPair) {
      if (next.run_name !== run?.run_name) {
        results.clear();
        asked = said = "";
        followed = [0, 0];
        mayScroll = false;
        strength.value = "1";
      }
      run = next;
      if (atStep !== followed[0] || ofPair !== followed[1]) {
        [step, pair] = followed = [atStep, ofPair];
        if (!asked) said = "";
      }
      box.hidden = !next.samples?.length || (!next.loras?.length && endOf(next) === undefined);
      paint();
    },
  };
}

/** The step of the run's final LoRA; undefined if it has none. @param {Run} run */
export function endOf(run) {
  return run.lora_name ? (run.kept_step ?? run.step) : undefined;
}

/** @param {Run|undefined} run */
function notKept(run) {
  const steps = (run?.loras ?? []).map((lora) => (lora.best ? t("{step} (best)", { step: lora.step }) : lora.step));
  return t("The LoRA of this step is not kept. Kept steps: {steps}.", { steps: listed(steps) });
}

/** @param {string} column */
function titleOf(column) {
  const titles = /** @type {Record<string, string>} */ ({
    "reference-1": t("reference"),
    base: t("base model"),
    target: t("target"),
  });
  return titles[column] ?? column.replaceAll("-", " ");
}
