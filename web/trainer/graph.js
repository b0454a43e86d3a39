// @ts-check
/** Access to ComfyUI's graph and page, with subgraphs.js, because these interfaces change most often. */
import { allNodes, pathTo, rootOf, widget } from "./subgraphs.js";

export { inputsOf, ownWidget, widget } from "./subgraphs.js";

const PREFIX = "QwenEdit_";
const TRAIN = `${PREFIX}TrainLora`; // has an input for each settings node
const SHORT_TRAIN = `${PREFIX}Train`; // of the short path
const TOP_BAR = 130; // pixels at the top of the canvas that ComfyUI's menus and a node's title need
const AFTER_OPENING = 300; // milliseconds until ComfyUI has placed the view of a subgraph and ended the selection
const USE_TEMPLATES = { "edit-v1": "Use Qwen-Image-Edit", "edit-v2": "Use 2509", "edit-v3": "Use 2511" };
const NONE = "none"; // the combo value for no preset or no LoRA

/** The class of a node. @param {any} node @returns {string} */
export function kindOf(node) {
  return node.comfyClass ?? node.type ?? "";
}

/** What ComfyUI's menus call a class. @param {string} kind @returns {string} */
export function nameOfKind(kind) {
  return /** @type {any} */ (window).LiteGraph?.registered_node_types[kind]?.title ?? kind;
}

/**
 * Call `also` with the same arguments after the existing method, if any.
 * @param {any} object
 * @param {string} method
 * @param {(...given: any[]) => void} also
 */
export function chain(object, method, also) {
  const before = object[method];
  object[method] = function chained(/** @type {any[]} */ ...given) {
    const answer = before?.apply(this, given);
    also(...given);
    return answer;
  };
}

/** @param {any} node */
export function isTrainNode(node) {
  return [TRAIN, SHORT_TRAIN].includes(kindOf(node));
}

/** Whether a node class is one of this pack. @param {string|undefined} kind */
export function isOurs(kind) {
  return Boolean(kind?.startsWith(PREFIX));
}

/** Whether a message with this node id is about this node. @param {any} node @param {string|null|undefined} id */
export function hasId(node, id) {
  return typeof id === "string" && pathTo(rootOf(node), id).pop() === node;
}

/** The open graph, not the subgraph that may be shown. @param {any} app */
function rootGraph(app) {
  return app.rootGraph ?? app.graph;
}

/** The open graph's node with this id. @param {any} app @param {string} id @returns {any} */
export function nodeWithId(app, id) {
  return pathTo(rootGraph(app), id).pop();
}

/** The node with this id in the graph or subgraph that is shown. @param {any} app @param {string} id @returns {any} */
export function shownNode(app, id) {
  return pathTo(app.canvas?.graph, id).pop();
}

/** A node's title, if the open graph has the node. @param {any} app @param {string} id @returns {string|undefined} */
export function titleOf(app, id) {
  return nodeWithId(app, id)?.title;
}

/**
 * Select a node and move it to the middle of the canvas, its title in view. Opens the subgraph that it is in.
 * @param {any} app
 * @param {string} id
 * @param {number} covered Height in pixels of what covers the canvas at the bottom.
 */
export async function goToNode(app, id, covered) {
  const path = pathTo(rootGraph(app), id);
  const node = path.pop();
  if (!node) return;
  const { canvas } = app;
  const outer = path.pop();
  if (canvas.graph !== node.graph) {
    if (outer) canvas.openSubgraph(outer.subgraph, outer);
    else canvas.setGraph(node.graph);
    await new Promise((done) => setTimeout(done, AFTER_OPENING));
  }
  canvas.selectNode(node);
  canvas.centerOnNode(node);
  const { scale, offset } = canvas.ds;
  const free = canvas.canvas.clientHeight - covered - node.size[1] * scale;
  offset[1] = Math.max(TOP_BAR, free / 2) / scale - node.pos[1];
  canvas.setDirty(true, true);
}

/** A run's settings by name, with nested sections flattened. @param {any} settings @returns {Record<string, any>} */
export function leaves(settings) {
  const found = /** @type {Record<string, any>} */ ({});
  for (const [name, value] of Object.entries(settings)) {
    if (value !== null && typeof value === "object" && !Array.isArray(value)) Object.assign(found, leaves(value));
    else found[name] = value;
  }
  return found;
}

/**
 * Copy a run's settings into the training node and its settings nodes. Creates and connects settings nodes that are
 * missing. Resets the preset, which would otherwise apply where no settings node is connected.
 * @param {any} app
 * @param {any} settings From the server.
 * @param {string} name A free name for the new run.
 * @returns {{changed: number, made: number, left: string[]}} Number of changed widgets and
 *   created nodes, and settings whose value no widget offers.
 */
export function applySettings(app, settings, name) {
  const values = { ...leaves(settings), preset: NONE, run_name: name };
  const lite = /** @type {any} */ (window).LiteGraph;
  let trains = allNodes(rootGraph(app)).filter(isTrainNode);
  let made = 0;
  if (!trains.length) {
    trains = [addNode(app, TRAIN)];
    made += 1;
  }
  for (const train of trains) {
    if (hasPresetAlways(train)) made += addToShort(lite, train, values);
    else made += addSettingsNodes(lite, train, values);
  }
  const targets = allNodes(rootGraph(app)).filter((node) => isTrainNode(node) || isSettingsNode(node));
  const done = targets.map((node) => setWidgets(node, hasPresetAlways(node) ? { ...values, preset: null } : values));
  noteChange(app);
  return {
    changed: done.reduce((count, each) => count + each.changed, 0),
    made,
    left: [...new Set(done.flatMap((each) => each.left))],
  };
}

/** Whether this is the short training node. @param {any} node */
function hasPresetAlways(node) {
  return kindOf(node) === SHORT_TRAIN;
}

/** @param {any} node */
function isSettingsNode(node) {
  return /^QwenEdit_\w+Settings$/.test(kindOf(node));
}

/**
 * Create a settings node for each free input of the training node whose settings differ from the defaults. If an import
 * is connected, create one for every free input, because the import would apply there.
 * @param {any} lite
 * @param {any} train
 * @param {Record<string, any>} values
 * @param {boolean} [all] Create one for every free input.
 */
function addSettingsNodes(lite, train, values, all = false) {
  const sockets = /** @type {any[]} */ (train.inputs ?? []);
  const imported = all || sockets.some((socket) => socket.name === "imported" && socket.link != null);
  let made = 0;
  (train.inputs ?? []).forEach((/** @type {any} */ input, /** @type {number} */ index) => {
    if (input.link != null || !/^QWEN_EDIT_\w*SETTINGS$/.test(String(input.type))) return;
    const kinds = Object.entries(lite.registered_node_types).filter(([type]) => type.startsWith(PREFIX));
    const kind = kinds.find(([, each]) => /** @type {any} */ (each).nodeData?.output?.[0] === input.type);
    const node = kind && lite.createNode(kind[0]);
    if (!node) return;
    const { changed, left } = setWidgets(node, values);
    // No node means off, but the defaults of these nodes are on.
    const noAverage = input.name === "ema_settings" && !values.use_ema;
    const isOff = noAverage || (input.name === "preservation_settings" && !values.preservation_probability);
    if (all && !(node.widgets ?? []).some((/** @type {any} */ each) => each.name in values)) return;
    if (!imported && (isOff || changed + left.length === 0)) return;
    node.pos = [train.pos[0] - node.size[0] - 60, train.pos[1] + made * 260];
    train.graph.add(node);
    node.connect(0, train, index);
    made += 1;
  });
  return made;
}

/**
 * Give the short training node all settings through the node More Settings, because its preset can't be turned off.
 * @param {any} lite
 * @param {any} train
 * @param {Record<string, any>} values
 */
function addToShort(lite, train, values) {
  const place = (train.inputs ?? []).findIndex((/** @type {any} */ input) => input.name === "more_settings");
  if (place < 0) return 0;
  const link = train.inputs[place].link;
  let more = link == null ? undefined : train.graph.getNodeById(train.graph.links[link]?.origin_id);
  const before = more;
  if (!more) {
    more = lite.createNode(`${PREFIX}MoreSettings`);
    if (!more) return 0;
    more.pos = [train.pos[0] - more.size[0] - 60, train.pos[1]];
    train.graph.add(more);
    more.connect(0, train, place);
  }
  return (before ? 0 : 1) + addSettingsNodes(lite, more, values, true);
}

/**
 * @param {any} node
 * @param {Record<string, any>} values
 * @returns {{changed: number, left: string[]}} Number of changed widgets, and settings whose value
 *   the widget does not offer.
 */
function setWidgets(node, values) {
  const left = [];
  let changed = 0;
  for (const { name } of node.widgets ?? []) {
    if (!(name in values) || values[name] === null) continue;
    const each = widget(node, name);
    const value = asWidget(each, values[name]);
    if (value === undefined) left.push(`${name} ${values[name]}`);
    if (value === undefined || each.value === value) continue;
    each.value = value;
    each.callback?.(value);
    changed += 1;
  }
  return { changed, left };
}

/**
 * Convert the values of widgets that were toggles when the graph was saved and are combos now.
 * @param {any} node A new node. Its saved values come later.
 */
export function readOldValues(node) {
  if (!isSettingsNode(node)) return;
  chain(node, "onConfigure", () => {
    for (const each of node.widgets ?? []) if (typeof each.value === "boolean") each.value = asWidget(each, each.value);
  });
}

/**
 * Convert a setting to the value of its widget. A list becomes one line per item. In a combo, a path selects the choice
 * with the same file name, an empty text selects none, and true or false selects on or off.
 * @param {any} target The widget.
 * @param {any} value
 * @returns {any} Undefined if no choice or more than one matches.
 */
function asWidget(target, value) {
  if (Array.isArray(value)) return value.join("\n");
  const choices = target.options?.values;
  if (!Array.isArray(choices) || choices.includes(value)) return value;
  if (value === "") return choices.includes(NONE) ? NONE : undefined;
  if (typeof value === "boolean") value = value ? "on" : "off";
  const named = choices.filter((choice) => lastName(choice) === lastName(value));
  if (named.includes(target.value)) return target.value;
  return named.length === 1 ? named[0] : undefined;
}

/** @param {any} path */
function lastName(path) {
  return String(path).split(/[/\\]/).pop() ?? "";
}

/** @param {any} app */
function middleOf(app) {
  const [x, y, width, height] = app.canvas?.visible_area ?? [0, 0, 800, 600];
  return [x + width / 2, y + height / 4];
}

/**
 * Open the graph that started a run in a new tab.
 * @param {any} app
 * @param {any} workflow
 * @param {string} name
 */
export async function openGraph(app, workflow, name) {
  await app.loadGraphData(workflow, true, true, name);
}

/** The graph as Run would queue it. @param {any} app @returns {Promise<any>} Type and inputs of each node by its id. */
export async function promptOf(app) {
  return (await app.graphToPrompt())?.output;
}

/**
 * Queue a graph, as the Run button does.
 * @param {any} api
 * @param {{prompt: any, workflow: any}} graph
 * @param {{next?: boolean}} [how] `next`: before all prompts that wait.
 * @returns {Promise<{prompt_id: string}>}
 */
export function queueGraph(api, { prompt, workflow }, { next = false } = {}) {
  return api.queuePrompt(next ? -1 : 0, { output: prompt, workflow });
}

/**
 * Open the pack's template that uses a LoRA in an edit graph, with this LoRA chosen.
 * @param {any} app
 * @param {any} api
 * @param {string} lora Its name in the LoRA loaders.
 * @param {keyof typeof USE_TEMPLATES} flavour That of the model on which it was trained.
 */
export async function openWithLora(app, api, lora, flavour) {
  // The pack's folder may have any name; this file lies in /extensions/<name>/trainer/.
  const pack = new URL("..", import.meta.url).pathname.split("/").filter(Boolean).pop();
  const name = encodeURIComponent(`Qwen edit LoRA - ${USE_TEMPLATES[flavour]}`);
  const answer = await api.fetchApi(`/workflow_templates/${pack}/${name}.json`);
  if (!answer.ok) throw new Error(answer.statusText);
  await app.loadGraphData(await answer.json(), true, true, lastName(lora).replace(/\.safetensors$/, ""));
  for (const node of allNodes(rootGraph(app))) {
    if (/^LoraLoader/.test(kindOf(node))) await chooseInCombo(app, node, "lora_name", lora);
  }
}

/** The nodes of a class, also those in subgraphs. @param {any} app @param {string} kind */
export function nodesOfKind(app, kind) {
  return allNodes(rootGraph(app)).filter((node) => kindOf(node) === kind);
}

/** All nodes of this pack, also those in subgraphs. @param {any} app @returns {any[]} */
export function ourNodes(app) {
  return allNodes(rootGraph(app)).filter((node) => isOurs(kindOf(node)));
}

/** Add a node in the middle of what is seen of the graph. @param {any} app @param {string} kind */
export function addNode(app, kind) {
  const node = /** @type {any} */ (window).LiteGraph.createNode(kind);
  node.pos = middleOf(app);
  (app.canvas?.graph ?? app.graph).add(node);
  return node;
}

/** The node that is selected, if it is the only one. @param {any} app @returns {any} */
export function selectedNode(app) {
  const selected = Object.values(app.canvas?.selected_nodes ?? {});
  return selected.length === 1 ? selected[0] : undefined;
}

/**
 * Choose a value in a combo of a node. If the combo does not offer it yet, its choices are read again first.
 * @param {any} app
 * @param {any} node
 * @param {string} name
 * @param {string} value
 */
export async function chooseInCombo(app, node, name, value) {
  const combo = widget(node, name);
  if (!combo) return;
  const offered = combo.options?.values;
  if (!offered?.includes?.(value)) {
    await refreshLists(app);
    if (Array.isArray(offered)) offered.push(value); // Nodes 2.0 keeps this list, and draws other values in red
  }
  setValue(app, combo, value);
}

/** Set a widget as its user does. @param {any} app @param {any} target @param {any} value */
export function setValue(app, target, value) {
  target.value = value;
  target.callback?.(value);
  noteChange(app);
}

/** Draw the graph again, and let ComfyUI note that it has changed, to save and to undo it. @param {any} app */
function noteChange(app) {
  app.graph?.setDirtyCanvas?.(true, true);
  app.extensionManager?.workflow?.activeWorkflow?.changeTracker?.checkState?.();
}

/** Refresh the file lists of all loader nodes. @param {any} app */
export async function refreshLists(app) {
  await app.refreshComboInNodes?.();
}

/**
 * @param {any} app
 * @param {"success"|"info"|"warn"|"error"} severity
 * @param {string} summary
 * @param {string} [detail]
 */
export function toast(app, severity, summary, detail = "") {
  app.extensionManager?.toast?.add?.({ severity, summary, detail, life: severity === "error" ? 20000 : 5000 });
}

/** Show the side panel if it is hidden. @param {any} app @param {string} id */
export function openSidebar(app, id) {
  const bar = app.extensionManager?.sidebarTab;
  if (bar?.activeSidebarTabId === id) return;
  if (bar?.toggleSidebarTab) bar.toggleSidebarTab(id);
  else app.extensionManager?.command?.execute?.(`Workspace.ToggleSidebarTab.${id}`);
}

/**
 * Our nodes with what ComfyUI keeps of their last outputs. In subgraphs its keys have the form graph:node.
 * @param {any} app
 * @param {Record<string, any>} outputs
 * @returns {[any, any][]}
 */
export function withOutputs(app, outputs) {
  const idOf = (/** @type {any} */ { graph, id }) => (graph === rootGraph(app) ? id : `${graph?.id}:${id}`);
  return ourNodes(app).map((node) => [node, outputs[idOf(node)]]);
}
