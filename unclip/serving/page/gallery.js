/** The history on the page: a card for each entry, with its images and its state. */

import * as history from "./history.js";
import { blobURL, byId, el, iconButton, toast } from "./ui.js";
import { axisLabel } from "./form.js";
import { cancel, expected, settingsOf } from "./jobs.js";

const PAGE = 30;
const STATES = { cancelled: "Cancelled.", interrupted: "Interrupted when the page was closed." };

/** @type {import("./history.js").Entry[]} newest first */
export const entries = [];
let handlers = {};

const cards = new Map(); // id -> element

/**
 * Connect the gallery.
 * @param {{open: function(Entry, Result), reuse: function(Settings), again: function(Entry)}} on
 */
export function prepare(on) {
  handlers = on;
  byId("older").onclick = loadOlder;
  byId("clear").onclick = clear;
}

/** Load the entries that follow those on the page. */
export async function loadOlder() {
  const older = await history.before(entries.at(-1)?.id ?? Infinity, PAGE);
  for (const entry of older) {
    if (entry.status === "running") { // its connection ended with the page
      entry.status = "interrupted";
      await history.save(entry);
    }
    entries.push(entry);
    byId("entries").append(card(entry));
  }
  byId("older").hidden = older.length < PAGE;
  update();
}

export function add(entry) {
  const at = entries.findIndex(({ id }) => id < entry.id);
  const next = at < 0 ? null : cards.get(entries[at].id);
  entries.splice(at < 0 ? entries.length : at, 0, entry);
  byId("entries").insertBefore(card(entry), next);
  update();
}

/** Draw an entry again after it has changed. */
export function refresh(entry) {
  const old = cards.get(entry.id);
  if (!old?.isConnected) return;
  const focused =
    old.contains(document.activeElement) && document.activeElement.getAttribute("aria-label");
  const replaced = card(entry);
  old.replaceWith(replaced);
  if (focused) replaced.querySelector(`[aria-label="${CSS.escape(focused)}"]`)?.focus();
}

/** Remove an entry for good. */
export function forget(entry) {
  take(entry);
  cancel(entry.id);
  return history.remove(entry.id);
}

async function remove(entry) {
  await forget(entry);
  toast("Deleted.", "Undo", () => restore([entry]));
}

function take(entry) {
  entries.splice(entries.indexOf(entry), 1);
  cards.get(entry.id).remove();
  update();
}

async function clear() {
  const removed = entries.filter(({ status }) => status !== "running");
  const older = await history.before(entries.at(-1)?.id ?? 0, Infinity);
  for (const entry of removed) take(entry);
  await history.clear();
  await history.save(...entries);
  byId("older").hidden = true;
  toast("History cleared.", "Undo", () => restore([...removed, ...older]));
}

async function restore(removed) {
  removed.forEach(add);
  await history.save(...removed);
}

function update() {
  byId("empty").hidden = entries.length > 0;
  byId("clear").hidden = entries.length === 0;
}

// -- cards

/** Return the prompt of settings, or else what they do. */
export function titleOf(settings) {
  if (settings.mode !== "vary") return settings.prompt;
  return settings.second ? "Mix of two images" : "Variation";
}

/** Return settings as names and texts. */
export function factsOf(settings) {
  const percent = (value) => value !== undefined && `${Math.round(value * 100)} %`;
  const facts = {
    "Negative prompt": settings.negative_prompt,
    Seed: settings.seed,
    Steps: settings.steps,
    Guidance: settings.guidance,
    Sampler: settings.sampler,
    Strength: settings.mode === "edit" && percent(settings.strength),
    "Share of second": settings.second && percent(settings.weight),
    Candidates: settings.num_candidates,
    Model: settings.model,
  };
  return Object.entries(facts).filter(([, value]) => value !== undefined && value !== false);
}

function card(entry) {
  const { settings, status } = entry;
  const { grid } = settings;
  const varied = grid ? [grid.x.name, grid.y?.name] : [];
  const facts = factsOf(settings).filter(
    ([name]) => !varied.some((axis) => axis && axisLabel(axis) === name),
  );
  const title = varied.includes("prompt") ? "Prompts" : titleOf(settings);
  const meta = el(
    "p.meta",
    {},
    el("time", { dateTime: new Date(entry.id).toISOString() }, timeOf(entry.id)),
  );
  for (const [name, value] of facts) meta.append(el("span", {}, `${name} ${value}`));
  const head = el("div.entry-head", {}, el("div", {}, el("h3", {}, title), meta));
  const buttons = el("div.row");
  buttons.append(
    iconButton("reuse", `Use settings of: ${title}`, () => handlers.reuse(settings)),
    iconButton("trash", `Delete: ${title}`, () => remove(entry)),
  );
  head.append(buttons);
  const single = !grid && expected(settings) === 1;
  const element = el(
    single ? "article.entry" : "article.entry.wide",
    { "aria-label": title, "data-status": status },
    head,
  );
  if (status === "running") {
    element.append(
      el(
        "div.progress",
        {},
        el("progress", { "aria-label": "Progress" }),
        el("p", {}, "Waiting"),
        el("button", { onclick: () => cancel(entry.id) }, "Cancel"),
      ),
    );
  }
  if (status === "running" || entry.results.length)
    element.append(grid ? table(entry) : tiles(entry));
  if (status !== "running" && status !== "done") {
    const message = el("p", {}, STATES[status] ?? entry.error);
    element.append(
      el(
        "div.state",
        {},
        message,
        el("button", { onclick: () => handlers.again(entry) }, "Run again"),
      ),
    );
  }
  cards.set(entry.id, element);
  return element;
}

function tiles(entry) {
  const count = entry.status === "running" ? expected(entry.settings) : entry.results.length;
  const all = Array.from({ length: count }, (_, i) =>
    tile(entry, entry.status === "running" ? i : entry.results[i].index),
  );
  return el("div.tiles", {}, ...all);
}

function table(entry) {
  const { x, y } = entry.settings.grid;
  const corner = y ? `${axisLabel(y.name)} / ${axisLabel(x.name)}` : axisLabel(x.name);
  const columns = x.values.map((value) => el("th", { scope: "col" }, String(value)));
  const rows = (y?.values ?? [""]).map((value, row) => {
    const cells = x.values.map((_, column) =>
      el("td", {}, tile(entry, row * x.values.length + column)),
    );
    return el("tr", {}, el("th", { scope: "row" }, String(value)), ...cells);
  });
  const header = el("thead", {}, el("tr", {}, el("th", { scope: "col" }, corner), ...columns));
  const scroller = { tabIndex: 0, role: "region", "aria-label": "Parameter grid" };
  return el("div.grid-table", scroller, el("table", {}, header, el("tbody", {}, ...rows)));
}

function tile(entry, index) {
  const result = entry.results.find((one) => one.index === index);
  if (!result) return el("div.tile.pending", { "data-index": index });
  const alt = `${titleOf(settingsOf(entry, result))}, seed ${result.seed}`;
  const label = `Open image ${index + 1}: ${alt}`;
  const open = {
    "data-index": index,
    "aria-label": label,
    onclick: () => handlers.open(entry, result),
  };
  return el("button.tile", open, el("img", { src: blobURL(result.blob), alt: "" }));
}

/** Show the progress of a running entry. */
export function showProgress(entry, text, fraction) {
  const [bar, line] = cards.get(entry.id).querySelector(".progress")?.children ?? [];
  if (!bar) return;
  line.textContent = text;
  if (fraction) bar.value = fraction;
  else bar.removeAttribute("value");
}

/** Show a partial image in the place of the final one. */
export function showPartial(entry, blob, index) {
  const place = cards.get(entry.id).querySelector(`.pending[data-index="${index}"]`);
  if (!place) return;
  const image = place.firstElementChild ?? place.appendChild(el("img", { alt: "Preview" }));
  const old = image.src;
  image.onload = () => old && URL.revokeObjectURL(old);
  image.src = URL.createObjectURL(blob);
}

function timeOf(id) {
  const date = new Date(id);
  const today = date.toDateString() === new Date().toDateString();
  return date.toLocaleString(
    undefined,
    today ? { timeStyle: "short" } : { dateStyle: "medium", timeStyle: "short" },
  );
}
