// @ts-check
/** Finds nodes and their widgets in a graph and in the subgraphs of its nodes, for graph.js. */

const INPUTS = "-10"; // LiteGraph's id of a subgraph's inputs

/** All nodes, once each, including those in subgraphs. @param {any} graph @returns {any[]} */
export function allNodes(graph) {
  const own = graph?.nodes ?? graph?._nodes ?? [];
  const all = own.flatMap((/** @type {any} */ node) => [node, ...(node.subgraph ? allNodes(node.subgraph) : [])]);
  return [...new Set(all)];
}

/**
 * The nodes from the outermost subgraph's to the one with this id, empty if the graph has no such node. In subgraphs
 * ids have the form outer:inner.
 * @param {any} graph
 * @param {string} id
 * @returns {any[]}
 */
export function pathTo(graph, id) {
  const path = [];
  for (const part of id.split(":")) {
    const node = (graph?.nodes ?? graph?._nodes ?? []).find((/** @type {any} */ each) => String(each.id) === part);
    if (!node) return [];
    path.push(node);
    graph = node.subgraph;
  }
  return path;
}

/** The graph that no subgraph holds. @param {any} node */
export function rootOf(node) {
  return node.graph?.rootGraph ?? node.graph;
}

/** The server's declarations of a node's inputs by name. @param {any} node @returns {Record<string, any>} */
export function inputsOf(node) {
  const { input = {} } = node.constructor.nodeData ?? {};
  return { ...input.required, ...input.optional };
}

/** A node's own widget with this name. @param {any} node @param {string} name */
export function ownWidget(node, name) {
  return (node?.widgets ?? []).find((/** @type {any} */ each) => each.name === name);
}

/**
 * The widget that gives the value of a node's widget: the one of the subgraph's node, if the subgraph has an input for
 * it. If several nodes have this subgraph, the first one's.
 * @param {any} node
 * @param {string} name
 * @returns {any}
 */
export function widget(node, name) {
  const own = ownWidget(node, name);
  const input = (node?.inputs ?? []).find((/** @type {any} */ each) => each.widget?.name === name);
  const link = input?.link == null ? undefined : node.graph?.getLink?.(input.link);
  if (!own || String(link?.origin_id) !== INPUTS) return own;
  const holder = allNodes(rootOf(node)).find((each) => each.subgraph === node.graph);
  return widget(holder, holder?.inputs[link.origin_slot]?.name) ?? own;
}
