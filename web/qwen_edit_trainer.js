// @ts-check
/** Entry point: shows runs on the training node and in a side panel of ComfyUI's page. Training works without it. */
// @ts-ignore - served by ComfyUI
import { app } from "../../scripts/app.js";
// @ts-ignore
import { api } from "../../scripts/api.js";
import { createPairsPanel, PAIRS_NODE } from "./pairs/panel.js";
import { createBeforeStart } from "./trainer/before_start.js";
import { loadStyle } from "./trainer/dom.js";
import { isOurs, isTrainNode, kindOf, openSidebar, readOldValues, refreshLists } from "./trainer/graph.js";
import { makeRoom, nameBoxes } from "./trainer/labels.js";
import { addButton } from "./trainer/node_parts.js";
import { attachView } from "./trainer/node_view.js";
import { keepDigits, readExponents } from "./trainer/number_widgets.js";
import { createPanel } from "./trainer/panel.js";
import { watchRefusals } from "./trainer/refusals.js";
import { attachReport, clearProgressTexts, createReport, restoreReports } from "./trainer/reports.js";
import { showUsed } from "./trainer/shown_widgets.js";
import { createStore } from "./trainer/store.js";
import { TRY_NODE } from "./trainer/trial.js";
import { attachUpload } from "./trainer/upload.js";
import { loadWords, t } from "./trainer/words.js";

const TAB = "qwen-edit-trainer";
const PAIRS_TAB = "qwen-edit-pairs";
const store = createStore(api);
/** The panel that is shown, and how to remove it. */
let shown = { tab: "", remove: () => {} };
/** @type {ReturnType<typeof createPanel>} */
let panel;
/** @type {ReturnType<typeof createBeforeStart>} */
let beforeStart;
/** @type {ReturnType<typeof createPairsPanel>} */
let pairs;

app.registerExtension({
  name: "qwen_edit_trainer.runs",

  async init() {
    await loadWords(api, app.extensionManager.setting?.get("Comfy.Locale"));
    panel = createPanel(app, api, store);
    beforeStart = createBeforeStart(app, api, store);
    pairs = createPairsPanel(app, api, beforeStart.forget);
  },

  async setup() {
    loadStyle();
    registerTab(PAIRS_TAB, "pi pi-images", t("Edit pairs"), t("Pairs of pictures that an edit is learned from"), pairs);
    registerTab(TAB, "pi pi-chart-line", t("Training runs"), t("Training runs of Qwen Edit Trainer"), panel);
    api.addEventListener("qwen_edit_trainer.lora", () => refreshLists(app));
    watchRefusals(app, api, pairs.settle);
    clearProgressTexts(app, api);
    readExponents(app);
    store.refresh();
  },

  nodeCreated(/** @type {any} */ node) {
    if (!isOurs(kindOf(node))) return;
    readOldValues(node);
    keepDigits(node);
    nameBoxes(node);
    if (kindOf(node) === TRY_NODE) attachUpload(node, "picture", app, api);
    attachReport(app, node);
    showUsed(node);
    if (kindOf(node) === PAIRS_NODE) {
      pairs.prefill(node); // its saved values come later
      addButton(node, t("Edit pairs…"), () => {
        openSidebar(app, PAIRS_TAB);
        pairs.open(node);
      });
    }
    if (isTrainNode(node)) {
      const onPick = (/** @type {string} */ run, /** @type {number} */ step) => {
        openSidebar(app, TAB);
        panel.open(run, step);
      };
      attachView(node, { app, store, onPick, first: beforeStart.attach(node), last: createReport(app, node) });
    }
    makeRoom(node);
  },

  onNodeOutputsUpdated(/** @type {Record<string, any>} */ outputs) {
    restoreReports(app, outputs);
  },
});

/**
 * ComfyUI renders a panel again into the same place, also one that followed another there, and destroys neither first.
 * @param {string} id
 * @param {string} icon
 * @param {string} title
 * @param {string} tooltip
 * @param {{mount: (place: HTMLElement) => () => void}} content
 */
function registerTab(id, icon, title, tooltip, content) {
  app.extensionManager.registerSidebarTab({
    id, icon, title, tooltip, type: "custom",
    render(/** @type {HTMLElement} */ place) {
      shown.remove();
      shown = { tab: id, remove: content.mount(place) };
    },
    destroy() {
      if (shown.tab !== id) return;
      shown.remove();
      shown = { tab: "", remove: () => {} };
    },
  }); // prettier-ignore
}
