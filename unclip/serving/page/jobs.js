/** Running jobs: one call of the API, or one for each cell of a grid, until done or cancelled. */

import * as api from "./api.js";

const CONNECTIONS = 5; // browsers open six to a host; the rest of the page needs one
const MAX_WAIT = 600_000; // ms of waiting for a busy server

/** Of this tab, also after a reload: begins the ids of its jobs on the server. */
export const TAB = (sessionStorage.tab ??=
  crypto.getRandomValues(new Uint32Array(4)).join("-"));

/** @type {Map<number, AbortController>} of the running entries, oldest first */
const running = new Map();
let free = CONNECTIONS;
const waiting = []; // functions that start the next call

export const cancel = (id) => running.get(id)?.abort();
/** Cancel the job that was started last. */
export const cancelLatest = () => cancel([...running.keys()].pop());

export const range = (length) => Array.from({ length }, (_, i) => i);

/** Return the number of images that an entry will have. */
export const expected = ({ grid, n }) =>
  grid ? grid.x.values.length * (grid.y?.values.length ?? 1) : n;

/** Return the settings that generate one image of an entry alone. */
export function settingsOf(entry, result) {
  const { grid, ...settings } = entry.settings;
  if (grid) return cell(entry.settings, result.index);
  return { ...settings, n: 1, num_candidates: undefined, seed: result.seed };
}

function cell({ grid, ...settings }, index) {
  const { x, y } = grid;
  settings[x.name] = x.values[index % x.values.length];
  if (y) settings[y.name] = y.values[Math.floor(index / x.values.length)];
  return settings;
}

/**
 * Run an entry, or what is left of it after a reload; its status, results and error are set in place.
 * @param {{progress: function(string, number), partial: function(Blob, number), done: function}} on
 */
export async function run(entry, on) {
  const { settings } = entry;
  const controller = new AbortController();
  running.set(entry.id, controller);
  const total = expected(settings);
  const cells = settings.grid ? range(total).map((i) => cell(settings, i)) : [settings];
  const has = (index) => entry.results.some((one) => one.index === index);
  const generate = async (one, first) => {
    if (settings.grid && has(first)) return;
    const job = `${TAB}-${entry.id}-${first}`;
    await connect(controller.signal);
    try {
      await patiently(one, job, controller.signal, {
        progress(event) {
          on.progress(...describe(event, settings.grid && entry.results.length, total));
        },
        partial: (blob, index) => on.partial(blob, first + index),
        done(result) {
          if (has(first + result.index)) return;
          entry.results.push({ ...result, index: first + result.index });
          entry.results.sort((a, b) => a.index - b.index);
          on.done();
        },
      });
    } catch (error) {
      if (controller.signal.aborted) api.cancel(job);
      throw error;
    } finally {
      disconnect();
    }
  };
  try {
    await Promise.all(cells.map(generate));
    entry.status = "done";
  } catch (error) {
    entry.status = controller.signal.aborted ? "cancelled" : "failed";
    entry.error = error.message;
    controller.abort(); // the other cells
    if (entry.status === "failed") throw error;
  } finally {
    running.delete(entry.id);
  }
}

/** Wait until `start(resolve)` resolves; when the signal is aborted, call `stop` and reject. */
const orAborted = (signal, start, stop) =>
  new Promise((resolve, reject) => {
    const started = start(resolve);
    const abort = () => (stop(started), reject(signal.reason));
    signal.addEventListener("abort", abort, { once: true });
  });

async function connect(signal) {
  signal.throwIfAborted();
  if (free > 0) return (free -= 1);
  const leave = (place) => waiting.splice(waiting.indexOf(place) >>> 0, 1);
  return orAborted(signal, (resolve) => (waiting.push(resolve), resolve), leave);
}

function disconnect() {
  const next = waiting.shift();
  if (next) next();
  else free += 1;
}

/** Generate; wait as long as a busy server asks, and connect again if the connection is lost. */
async function patiently(settings, job, signal, on) {
  const started = Date.now();
  for (;;) {
    try {
      return await api.generate(settings, job, signal, on);
    } catch (error) {
      if (!error.retryAfter || Date.now() - started > MAX_WAIT) throw error;
      const problem = error.status ? "The server is busy" : "The connection was lost";
      on.progress({ problem, wait: error.retryAfter });
      const wait = (resolve) => setTimeout(resolve, error.retryAfter * 1000);
      await orAborted(signal, wait, clearTimeout);
    }
  }
}

/** Return a progress event as text and as a fraction. */
function describe(event, finished, total) {
  if (finished) return [`${finished} of ${total} images`, finished / total];
  if (event.wait) return [`${event.problem}; trying again in ${event.wait} s`, 0];
  const { queue_position: ahead, step, num_steps: total_steps } = event;
  if (ahead !== undefined) return [ahead ? `Waiting, ${ahead} ahead` : "Waiting", 0];
  const stage = event.stage[0].toUpperCase() + event.stage.slice(1).replace(/_\d+$/, "");
  return [`${stage}, step ${step} of ${total_steps}`, step / total_steps];
}
