/** The history on the page: a card for each entry, with its images and its state. */

import * as history from "./history.js";
import { blobURL, byId, el, iconButton, toast } from "./ui.js";
import { SETTINGS, optionsText } from "./api.js";
import { TAB, cancel, expected, range, settingsOf } from "./jobs.js";

const PAGE = 30;
const STATES = { cancelled: "Cancelled.", interrupted: "Interrupted when the page was closed." };

/** @type {import("./history.js").Entry[]} newest first */
export const entries = [];
const cards = new Map(); // id -> element
let handlers = {};

/** Connect the gallery. `on` has open(entry, result), reuse(settings), again(entry) and run(entry). */
export function prepare(on) {
  handlers = on;
  byId("older").onclick = loadOlder;
  byId("clear").onclick = clear;
}

/** Load the entries that follow those on the page. */
export async function loadOlder() {
  const older = await history.before(entries.at(-1)?.id ?? Infinity, PAGE);
  for (const entry of older) {
    const running = entry.status === "running";
    if (running && entry.tab !== TAB) entry.status = "interrupted"; // closed, or another tab
    entries.push(entry);
    byId("entries").append(card(entry));
    if (running && entry.tab === TAB) handlers.run(entry);
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
  const active = document.activeElement;
  const focused = old.contains(active) && active.getAttribute("aria-label");
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

const restore = (removed) => (removed.forEach(add), history.save(...removed));
const update = () => (byId("clear").hidden = !(byId("empty").hidden = entries.length > 0));

// -- cards

/** Return the prompt of settings, or else what they do. */
export function titleOf(settings) {
  if (settings.mode !== "vary") return settings.prompt;
  return settings.second ? "Mix of two images" : "Variation";
}

/** Return settings as names and texts. */
export function factsOf(settings) {
  const facts = [];
  for (const [name, { label, modes, share }] of Object.entries(SETTINGS)) {
    const value = settings[name];
    if (name === "prompt" || value === undefined || !modes.includes(settings.mode)) continue;
    facts.push([label, share ? `${Math.round(value * 100)} %` : value]);
  }
  if (settings.options) facts.push(["Other options", optionsText(settings.options)]);
  return facts;
}

function card(entry) {
  const { settings, status } = entry;
  const { grid } = settings;
  const varied = grid ? [grid.x.name, grid.y?.name].filter(Boolean) : [];
  const title = varied.includes("prompt") ? "Prompts" : titleOf(settings);
  const labels = varied.map((name) => SETTINGS[name].label);
  const facts = factsOf(settings).filter(([label]) => !labels.includes(label));
  const time = el("time", { dateTime: new Date(entry.id).toISOString() }, timeOf(entry.id));
  const meta = el("p.meta", time, ...facts.map(([name, value]) => el("span", `${name} ${value}`)));
  const buttons = el(
    "div.row",
    iconButton("reuse", `Use settings of: ${title}`, () => handlers.reuse(settings)),
    iconButton("trash", `Delete: ${title}`, () => remove(entry)),
  );
  const wide = grid || expected(settings) > 1 ? ".wide" : "";
  const element = el(`article.entry${wide}`, { "aria-label": title, "data-status": status });
  element.append(el("div.entry-head", el("div", el("h3", title), meta), buttons));
  if (status === "running") {
    const bar = el("progress", { "aria-label": "Progress" });
    const stop = el("button", { onclick: () => cancel(entry.id) }, "Cancel");
    element.append(el("div.progress", bar, el("p", "Waiting"), stop));
  }
  if (status === "running" || entry.results.length) element.append((grid ? table : tiles)(entry));
  if (status !== "running" && status !== "done") {
    const again = el("button", { onclick: () => handlers.again(entry) }, "Run again");
    element.append(el("div.state", el("p", STATES[status] ?? entry.error), again));
  }
  cards.set(entry.id, element);
  return element;
}

function tiles(entry) {
  const running = entry.status === "running";
  const shown = running ? range(expected(entry.settings)) : entry.results.map((one) => one.index);
  return el("div.tiles", ...shown.map((index) => tile(entry, index)));
}

function table(entry) {
  const { x, y } = entry.settings.grid;
  const corner = [y, x].filter(Boolean).map(({ name }) => SETTINGS[name].label).join(" / ");
  const columns = [corner, ...x.values].map((value) => el("th", { scope: "col" }, String(value)));
  const rows = (y?.values ?? [""]).map((value, row) => {
    const cells = x.values.map((_, i) => el("td", tile(entry, row * x.values.length + i)));
    return el("tr", el("th", { scope: "row" }, String(value)), ...cells);
  });
  const scroller = { tabIndex: 0, role: "region", "aria-label": "Parameter grid" };
  const head = el("thead", el("tr", ...columns));
  return el("div.grid-table", scroller, el("table", head, el("tbody", ...rows)));
}

function tile(entry, index) {
  const result = entry.results.find((one) => one.index === index);
  if (!result) return el("div.tile.pending", { "data-index": index });
  const title = titleOf(settingsOf(entry, result));
  const label = `Open image ${index + 1}: ${title}, seed ${result.seed}`;
  const onclick = () => handlers.open(entry, result);
  const image = el("img", { src: blobURL(result.blob), alt: "" });
  return el("button.tile", { "data-index": index, "aria-label": label, onclick }, image);
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
  const options = today ? {} : { dateStyle: "medium" };
  return date.toLocaleString(undefined, { timeStyle: "short", ...options });
}
