// @ts-check
/** The button "Edit pairs…" on the node Edit Pairs. */
import { t } from "../trainer/words.js";

/** @param {any} node @param {() => void} open */
export function attachButton(node, open) {
  const button = node.addWidget("button", t("Edit pairs…"), null, open, { serialize: false });
  button.serialize = false; // not in the saved graph
}
