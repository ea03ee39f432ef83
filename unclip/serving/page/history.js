/** The history: entries in IndexedDB, where the browser offers it. */

/**
 * @typedef {Object} Entry
 * @property {number} id milliseconds since 1970, unique @property {string} [error]
 * @property {"running"|"done"|"failed"|"cancelled"|"interrupted"} status
 * @property {string} tab that runs it
 * @property {import("./api.js").Settings} settings @property {import("./api.js").Result[]} results
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
  const request = indexedDB.open("unclip", 1);
  request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id" });
  database = await result(request).catch(() => null);
  return database !== null;
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

export const remove = async (id) => database && result(store("readwrite").delete(id));
export const clear = async () => database && result(store("readwrite").clear());

/** Return up to `limit` entries from before `id`, newest first. @returns {Promise<Entry[]>} */
export async function before(id, limit) {
  if (!database) return [];
  const keys = await result(store("readonly").getAllKeys(IDBKeyRange.upperBound(id, true)));
  const latest = keys.slice(-limit).reverse();
  return Promise.all(latest.map((key) => result(store("readonly").get(key))));
}
