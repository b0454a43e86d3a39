// @ts-check
/** Entry point: shows runs on the training node and in a side panel of ComfyUI's page. Training works without it. */
// @ts-ignore - served by ComfyUI
import { app } from "../../scripts/app.js";
// @ts-ignore
import { api } from "../../scripts/api.js";
import { createBeforeStart } from "./trainer/before_start.js";
import { loadStyle } from "./trainer/dom.js";
import { isTrainNode, openSidebar, readOldValues, refreshLists } from "./trainer/graph.js";
import { attachView } from "./trainer/node_view.js";
import { keepDigits, readExponents } from "./trainer/number_widgets.js";
import { createPanel } from "./trainer/panel.js";
import { watchRefusals } from "./trainer/refusals.js";
import { createStore } from "./trainer/store.js";
import { loadWords, t } from "./trainer/words.js";

const TAB = "qwen-edit-trainer";
const store = createStore(api);
/** @type {ReturnType<typeof createPanel>} */
let panel;
/** @type {ReturnType<typeof createBeforeStart>} */
let beforeStart;

app.registerExtension({
  name: "qwen_edit_trainer.runs",

  async init() {
    await loadWords(api, app.extensionManager.setting?.get("Comfy.Locale"));
    panel = createPanel(app, api, store);
    beforeStart = createBeforeStart(app, api, store);
  },

  async setup() {
    loadStyle();
    let unmount = () => {};
    app.extensionManager.registerSidebarTab({
      id: TAB,
      icon: "pi pi-chart-line",
      title: t("Training runs"),
      tooltip: t("Training runs of Qwen Edit Trainer"),
      type: "custom",
      render(/** @type {HTMLElement} */ place) {
        unmount();
        unmount = panel.mount(place);
      },
      destroy() {
        unmount();
        unmount = () => {};
      },
    });
    api.addEventListener("qwen_edit_trainer.lora", () => refreshLists(app));
    watchRefusals(app, api);
    readExponents(app);
    store.refresh();
  },

  nodeCreated(/** @type {any} */ node) {
    readOldValues(node);
    keepDigits(node);
    if (!isTrainNode(node)) return;
    const onPick = (/** @type {string} */ run, /** @type {number} */ step) => {
      openSidebar(app, TAB);
      panel.open(run, step);
    };
    attachView(node, { app, store, onPick, first: beforeStart.attach(node) });
  },
});
