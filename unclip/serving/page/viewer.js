/** The viewer: one image at full size, what it was made with, and what can be made of it. */

import { asCurl, asPython } from "./api.js";
import { blobURL, byId, copy, download, el } from "./ui.js";
import { entries, factsOf, titleOf } from "./gallery.js";
import { addToMix, canUse, use, write } from "./form.js";
import { readSettings } from "./png.js";
import { settingsOf } from "./jobs.js";

const dialog = byId("viewer");
let shown = { entry: null, result: null };

const all = () => entries.flatMap((entry) => entry.results.map((result) => ({ entry, result })));

export function open(entry, result) {
  show({ entry, result });
  dialog.showModal();
}

async function show(item) {
  shown = item;
  const settings = settingsOf(item.entry, item.result);
  const position = all().findIndex(({ result }) => result === item.result);
  byId("previous").disabled = position <= 0;
  byId("next").disabled = position >= all().length - 1;
  for (const [action, mode] of Object.entries({ vary: "vary", mix: "vary", edit: "edit" })) {
    dialog.querySelector(`[data-action=${action}]`).disabled = !canUse(mode);
  }
  byId("viewer-image").src = blobURL(item.result.blob);
  byId("viewer-image").alt = `${titleOf(settings)}, seed ${item.result.seed}`;
  byId("viewer-title").textContent = titleOf(settings);
  // With defaults; of the options without a field, those of the entry are enough.
  const { options, ...stored } = await readSettings(item.result.blob).catch(() => ({}));
  if (shown !== item) return;
  const given = Object.entries(settings).filter(([, value]) => value !== undefined);
  const facts = factsOf({ ...stored, ...Object.fromEntries(given) });
  facts.push(["Made", new Date(item.entry.id).toLocaleString()]);
  byId("viewer-facts").replaceChildren(
    ...facts.map(([name, value]) => el("div", el("dt", name), el("dd", String(value)))),
  );
}

function move(by) {
  const items = all();
  const next = items[items.findIndex(({ result }) => result === shown.result) + by];
  if (next) show(next);
}

const ACTIONS = {
  vary: (blob) => (dialog.close(), use("vary", blob)),
  edit: (blob) => (dialog.close(), use("edit", blob)),
  mix: (blob) => (dialog.close(), addToMix(blob)),
  reuse: (_, settings) => (dialog.close(), write(settings)),
  download: (blob, { seed }) => download(blob, `unclip-${seed}.png`),
  curl: (_, settings) => copy(asCurl(settings), "the curl command"),
  python: (_, settings) => copy(asPython(settings), "the Python code"),
};

/** Connect buttons and keys; called once. */
export function prepare() {
  byId("previous").onclick = () => move(-1);
  byId("next").onclick = () => move(1);
  dialog.addEventListener("keydown", ({ key }) => {
    if (key === "ArrowLeft") move(-1);
    if (key === "ArrowRight") move(1);
  });
  dialog.addEventListener("click", ({ target }) => {
    const action = target.dataset?.action;
    if (action) ACTIONS[action](shown.result.blob, settingsOf(shown.entry, shown.result));
  });
}
