// @ts-check
/**
 * Room for the labels of widgets, and names of the boxes for several lines. The canvas shows a box's name only while it
 * is empty, and instead of it an example if there is one. Nodes 2.0 up to frontend 1.3x show it only while the box is
 * empty; later ones have labels of their own.
 */
import { element } from "./dom.js";
import { chain, kindOf } from "./graph.js";

const WIDTH = 440; // pixels of a new node with long values, which the canvas would draw over the labels
const WITH_LONG_VALUES = ["QwenEdit_ChooseModel", "QwenEdit_Train", "QwenEdit_TrainLora"];
const LEFT = 16; // pixels from the node's edge
const BASELINE = 7; // pixels below the top of the widget, whose box begins at 10
const FONT = "10px Inter, Arial, sans-serif";
/** @type {Set<string>} The classes of nodes for which there are rules. */
const ruled = new Set();

/**
 * Make a node as large as its widgets need.
 * @param {any} node A new node with all its widgets. Its saved size comes later.
 */
export function makeRoom(node) {
  const [width, height] = node.computeSize();
  const wide = WITH_LONG_VALUES.includes(kindOf(node)) ? Math.max(WIDTH, width) : width;
  node.setSize([Math.max(wide, node.size[0]), Math.max(height, node.size[1])]);
}

/** @param {any} node A new node. */
export function nameBoxes(node) {
  const kind = kindOf(node);
  const boxes = (node.widgets ?? []).filter((/** @type {any} */ each) => each.element?.tagName === "TEXTAREA");
  const nameOf = (/** @type {any} */ { label, name }) => label ?? name;
  for (const box of boxes) if (box.element.placeholder === box.name) box.element.placeholder = nameOf(box);
  if (!boxes.length) return;
  if (!ruled.has(kind)) document.head.append(element("style", { text: boxes.map(ruleFor(kind)).join("\n") }));
  ruled.add(kind);
  chain(node, "onDrawForeground", (/** @type {CanvasRenderingContext2D} */ canvas) => {
    const lite = /** @type {any} */ (window).LiteGraph;
    if (node.flags?.collapsed || lite.vueNodesMode) return;
    canvas.save();
    canvas.font = FONT;
    canvas.textAlign = "left";
    canvas.fillStyle = lite.WIDGET_SECONDARY_TEXT_COLOR;
    for (const box of boxes) {
      const isNamed = !box.element.value && box.element.placeholder === nameOf(box); // also on a subgraph's node
      if (box.y && !box.hidden && !isNamed) canvas.fillText(nameOf(box), LEFT, box.y + BASELINE);
    }
    canvas.restore();
  });
}

/** The style of a box of Nodes 2.0 up to frontend 1.3x. @param {string} kind */
function ruleFor(kind) {
  return (/** @type {any} */ { name, label }) => {
    const box = `[node-type="${kind}"]:has(> textarea[aria-label="${name}"])`;
    return `${box}::before { content: ${JSON.stringify(label ?? name)}; }`;
  };
}
