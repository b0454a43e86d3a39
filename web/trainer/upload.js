// @ts-check
/**
 * A button that uploads a picture and chooses it in a combo. ComfyUI's own upload widget also shows the
 * chosen file, so it would ask the server for a file with the name "held-out pair".
 */
import { element } from "./dom.js";
import { chooseInCombo, toast } from "./graph.js";
import { addButton } from "./node_parts.js";
import { t } from "./words.js";

/**
 * @param {any} node
 * @param {string} name The combo's name.
 * @param {any} app
 * @param {any} api
 */
export function attachUpload(node, name, app, api) {
  const input = element("input", { type: "file", accept: "image/*", on: { change: upload } });
  addButton(node, t("Upload a picture…"), () => input.click());

  async function upload() {
    const body = new FormData();
    body.append("image", input.files[0]);
    input.value = ""; // so that choosing the same file again is a change
    try {
      const answer = await api.fetchApi("/upload/image", { method: "POST", body });
      if (!answer.ok) throw new Error(answer.statusText);
      const saved = await answer.json(); // under a free name, if another picture has this one
      await chooseInCombo(app, node, name, saved.subfolder ? `${saved.subfolder}/${saved.name}` : saved.name);
    } catch (error) {
      toast(app, "error", t("The picture could not be uploaded"), String(/** @type {any} */ (error)?.message ?? error));
    }
  }
}
