// @ts-check
/** All that touches the graph and the page of ComfyUI, in one place: these interfaces change the most. */

const PREFIX = "QwenEdit_";
export const TRAIN = `${PREFIX}TrainLora`;

/** @param {any} node */
export function isTrainNode(node) {
  return (node.comfyClass ?? node.type) === TRAIN;
}

/** Every node, those inside subgraphs too. @param {any} graph @returns {any[]} */
function allNodes(graph) {
  const own = graph?.nodes ?? graph?._nodes ?? [];
  return own.flatMap((/** @type {any} */ node) => [node, ...(node.subgraph ? allNodes(node.subgraph) : [])]);
}

/** A node's own widget of a name. @param {any} node @param {string} name */
export function widget(node, name) {
  return (node.widgets ?? []).find((/** @type {any} */ each) => each.name === name);
}

/**
 * Whether messages about `id` are about this node. Inside subgraphs ids have the form outer:inner.
 * @param {any} node
 * @param {string|null|undefined} id
 */
export function hasId(node, id) {
  return typeof id === "string" && (id === String(node.id) || id.endsWith(`:${node.id}`));
}

/** The scalar settings of a run by name. @param {any} settings @returns {Record<string, any>} */
export function leaves(settings) {
  const found = /** @type {Record<string, any>} */ ({});
  for (const [name, value] of Object.entries(settings)) {
    if (value !== null && typeof value === "object" && !Array.isArray(value)) Object.assign(found, leaves(value));
    else found[name] = value;
  }
  return found;
}

/**
 * Put a run's settings into the graph: into the training node and its settings nodes; those that are missing and needed
 * are made and connected.
 * @param {any} app
 * @param {any} settings As the server tells them.
 * @returns {{changed: number, made: number}} Widgets and nodes.
 */
export function applySettings(app, settings) {
  const values = leaves(settings);
  const lite = /** @type {any} */ (window).LiteGraph;
  let trains = allNodes(app.graph).filter(isTrainNode);
  let made = 0;
  if (!trains.length) {
    const train = lite.createNode(TRAIN);
    train.pos = middleOf(app);
    app.graph.add(train);
    trains = [train];
    made += 1;
  }
  for (const train of trains) made += addSettingsNodes(lite, train, values);
  const targets = allNodes(app.graph).filter((node) => isTrainNode(node) || isSettingsNode(node));
  const changed = targets.reduce((count, node) => count + setWidgets(node, values), 0);
  app.graph.setDirtyCanvas?.(true, true);
  app.extensionManager?.workflow?.activeWorkflow?.changeTracker?.checkState?.();
  return { changed, made };
}

/** @param {any} node */
function isSettingsNode(node) {
  return /^QwenEdit_\w+Settings$/.test(node.comfyClass ?? node.type ?? "");
}

/**
 * Make a settings node for each free socket of the training node for which the run differs from the defaults.
 * @param {any} lite
 * @param {any} train
 * @param {Record<string, any>} values
 */
function addSettingsNodes(lite, train, values) {
  let made = 0;
  (train.inputs ?? []).forEach((/** @type {any} */ input, /** @type {number} */ index) => {
    if (input.link != null || !/^QWEN_EDIT_\w*SETTINGS$/.test(String(input.type))) return;
    const kinds = Object.entries(lite.registered_node_types).filter(([type]) => type.startsWith(PREFIX));
    const kind = kinds.find(([, each]) => /** @type {any} */ (each).nodeData?.output?.[0] === input.type);
    const node = kind && lite.createNode(kind[0]);
    if (!node || !setWidgets(node, values)) return;
    node.pos = [train.pos[0] - node.size[0] - 60, train.pos[1] + made * 260];
    train.graph.add(node);
    node.connect(0, train, index);
    made += 1;
  });
  return made;
}

/** @param {any} node @param {Record<string, any>} values @returns {number} Of widgets that changed. */
function setWidgets(node, values) {
  let changed = 0;
  for (const each of node.widgets ?? []) {
    if (!(each.name in values) || each.value === values[each.name] || values[each.name] === null) continue;
    each.value = values[each.name];
    each.callback?.(each.value);
    changed += 1;
  }
  return changed;
}

/** @param {any} app */
function middleOf(app) {
  const [x, y, width, height] = app.canvas?.visible_area ?? [0, 0, 800, 600];
  return [x + width / 2, y + height / 4];
}

/**
 * Open the graph that started a run, in a tab of its own.
 * @param {any} app
 * @param {any} workflow
 * @param {string} name
 */
export async function openGraph(app, workflow, name) {
  await app.loadGraphData(workflow, true, true, name);
}

/** Queue a graph as the Run button would. @param {any} api @param {{prompt: any, workflow: any}} graph */
export async function queueGraph(api, { prompt, workflow }) {
  await api.queuePrompt(0, { output: prompt, workflow });
}

/** New files into the lists of all loaders. @param {any} app */
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
  app.extensionManager?.toast?.add?.({ severity, summary, detail, life: 5000 });
}

/** Show the side panel if it is not shown. @param {any} app @param {string} id */
export function openSidebar(app, id) {
  const bar = app.extensionManager?.sidebarTab;
  if (bar?.activeSidebarTabId === id) return;
  if (bar?.toggleSidebarTab) bar.toggleSidebarTab(id);
  else app.extensionManager?.command?.execute?.(`Workspace.ToggleSidebarTab.${id}`);
}
