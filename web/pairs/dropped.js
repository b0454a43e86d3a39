// @ts-check
/** The files of a drop or of a file chooser, with the paths that they have in a dropped folder. */

/** @typedef {{file: File, path: string}} Dropped */

// What operating systems put into folders. Nobody means to upload these.
const SYSTEM = /^(\..*|thumbs\.db|ehthumbs\.db|desktop\.ini|__macosx|icon\r)$/i;

/** Whether a drag carries files. @param {DragEvent} event */
export function hasFiles(event) {
  return Boolean(event.dataTransfer && [...event.dataTransfer.types].includes("Files"));
}

/**
 * The files of a drop, also of dropped folders, in name order.
 * @param {DataTransfer} transfer
 * @returns {Promise<Dropped[]>}
 */
export async function filesOf(transfer) {
  const flat = [...transfer.files].map((file) => ({ file, path: file.name }));
  const items = [...transfer.items].filter((item) => item.kind === "file");
  const entries = items.map((item) => item.webkitGetAsEntry?.() ?? null); // before any await, which ends the event
  if (!entries.some((entry) => entry?.isDirectory)) return inOrder(flat);
  const found = await Promise.all(entries.map((entry) => (entry ? filesBelow(entry, "") : [])));
  return inOrder(found.flat());
}

/**
 * The files of a chooser. A folder chooser gives each file its path below the folder.
 * @param {FileList|null} files
 * @returns {Dropped[]}
 */
export function filesIn(files) {
  return inOrder([...(files ?? [])].map((file) => ({ file, path: file.webkitRelativePath || file.name })));
}

/** Whether the files lie in two or more folders, as those of both sides do. @param {Dropped[]} files */
export function inSeveralFolders(files) {
  const folders = files.map(({ path }) => path.split("/").slice(0, -1).join("/"));
  return new Set(folders).size > 1;
}

/** @param {Dropped[]} files */
function inOrder(files) {
  const own = files.filter(({ path }) => !path.split("/").some((part) => SYSTEM.test(part)));
  return own.sort((one, other) => one.path.localeCompare(other.path, "en", { numeric: true }));
}

/** @param {FileSystemEntry} entry @param {string} above @returns {Promise<Dropped[]>} */
async function filesBelow(entry, above) {
  const path = above ? `${above}/${entry.name}` : entry.name;
  if (entry.isFile) {
    const file = await new Promise((resolve, reject) =>
      /** @type {FileSystemFileEntry} */ (entry).file(resolve, reject),
    );
    return [{ file, path }];
  }
  const reader = /** @type {FileSystemDirectoryEntry} */ (entry).createReader();
  const found = [];
  for (;;) {
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject)); // at most 100 at a time
    if (!some.length) return (await Promise.all(found.map((each) => filesBelow(each, path)))).flat();
    found.push(...some);
  }
}
