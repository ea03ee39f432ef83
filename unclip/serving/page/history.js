/** The history: entries in IndexedDB, where the browser offers it. */

/**
 * @typedef {Object} Entry
 * @property {number} id milliseconds since 1970, unique
 * @property {import("./api.js").Settings} settings
 * @property {"running"|"done"|"failed"|"cancelled"|"interrupted"} status
 * @property {import("./api.js").Result[]} results
 * @property {string} [error]
 */

const STORE = "entries";
let database = null;

const result = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

const store = (mode) => database.transaction(STORE, mode).objectStore(STORE);

/** Open the database. False if the history will not survive a reload. */
export async function open() {
  try {
    const request = indexedDB.open("unclip", 1);
    request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id" });
    database = await result(request);
    return true;
  } catch {
    return false;
  }
}

/** Add or replace entries. False if there is no room. @param {...Entry} entries */
export async function save(...entries) {
  try {
    for (const entry of database ? entries : []) await result(store("readwrite").put(entry));
    return true;
  } catch {
    return false;
  }
}

export async function remove(id) {
  if (database) await result(store("readwrite").delete(id));
}

export async function clear() {
  if (database) await result(store("readwrite").clear());
}

/** Return up to `limit` entries from before `id`, newest first. @returns {Promise<Entry[]>} */
export async function before(id, limit) {
  if (!database) return [];
  const entries = [];
  const request = store("readonly").openCursor(IDBKeyRange.upperBound(id, true), "prev");
  return new Promise((resolve, reject) => {
    request.onerror = () => reject(request.error);
    request.onsuccess = () => {
      const cursor = request.result;
      if (!cursor || entries.length === limit) return resolve(entries);
      entries.push(cursor.value);
      cursor.continue();
    };
  });
}
