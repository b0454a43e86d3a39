// @ts-check
/**
 * The page's texts in the user's language. The English text is the key of its translation, so a text without a
 * translation is shown in English. The translations of all packs come in one answer of the server, made from their
 * `locales/<language>/main.json`; ours are below the key SECTION.
 */

const SECTION = "qwenEditTrainer";

/** @type {Record<string, unknown>} */
let words = {};

/**
 * A text in the user's language. Tests collect the texts of all calls, so `text` must be a string literal.
 * @param {string} text In English, with placeholders such as {name}.
 * @param {Record<string, string|number>} [values] The values of the placeholders.
 */
export function t(text, values = {}) {
  const found = Object.hasOwn(words, text) ? words[text] : text;
  const said = typeof found === "string" ? found : text;
  return said.replace(/\{(\w+)\}/g, (whole, name) => (Object.hasOwn(values, name) ? String(values[name]) : whole));
}

/** Sentences one after the other, with the space between them that the language has. @param {string[]} texts */
export function sentences(texts) {
  return texts.length ? texts.reduce((before, next) => t("{before} {next}", { before, next })) : "";
}

/** Items with the language's comma between them. @param {(string|number)[]} items */
export function listed(items) {
  return items.map(String).reduce((before, next) => (before ? t("{before}, {next}", { before, next }) : next), "");
}

/** A text with what it is or where it comes from before it. @param {string} label @param {string} text */
export function labelled(label, text) {
  return t("{label}: {text}", { label, text });
}

/**
 * Load the translations. Texts made before this call stay in English.
 * @param {any} api ComfyUI's API object.
 * @param {string|undefined} locale ComfyUI's language setting, such as "zh" or "pt-BR".
 */
export async function loadWords(api, locale = "en") {
  words = {};
  const [language] = locale.split("-");
  if (language === "en") return;
  try {
    const catalogues = await (await api.fetchApi("/i18n")).json();
    words = catalogues[locale]?.[SECTION] ?? catalogues[language]?.[SECTION] ?? {};
  } catch (error) {
    console.warn("Qwen Edit Trainer's texts stay in English, because their translation could not be loaded.", error);
  }
}
