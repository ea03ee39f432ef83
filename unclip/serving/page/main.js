/** The page: connects the form, the running jobs, the history and the viewer. */

import * as api from "./api.js";
import * as form from "./form.js";
import * as gallery from "./gallery.js";
import * as history from "./history.js";
import * as jobs from "./jobs.js";
import * as viewer from "./viewer.js";
import { byId, chooseFile, copy, el, prepareDocument, showError, toast } from "./ui.js";
import { readSettings } from "./png.js";

const EXAMPLES = ["a red apple", "a smiling cat, blob emoji", "a green heart in noto style"];
const MAX_SEED = 2 ** 31;
let lastId = 0;

// -- jobs

async function start(settings = form.read()) {
  if (!settings) return;
  lastId = Math.max(Date.now(), lastId + 1);
  settings.seed ??= Math.floor(Math.random() * MAX_SEED); // the history needs it
  const entry = { id: lastId, tab: jobs.TAB, settings, status: "running", results: [] };
  gallery.add(entry);
  keep(entry);
  if (innerWidth < 800) byId("entries").scrollIntoView({ behavior: "smooth" });
  await run(entry);
}

/** Run a new entry, or one that ran when the page was reloaded. */
async function run(entry) {
  const { settings } = entry;
  const partials = new Map();
  const showPartial = (blob, index) => gallery.showPartial(entry, blob, index);
  try {
    await jobs.run(entry, {
      progress: (text, fraction) => gallery.showProgress(entry, text, fraction),
      partial: (blob, index) => (partials.set(index, blob), showPartial(blob, index)),
      done() {
        gallery.refresh(entry);
        partials.forEach(showPartial);
        keep(entry);
      },
    });
  } catch (error) {
    showFailure(error, entry);
  }
  gallery.refresh(entry);
  if (!gallery.entries.includes(entry)) return; // deleted meanwhile
  keep(entry);
  const count = entry.results.length;
  if (entry.status === "done") toast(count > 1 ? `${count} images are ready` : "Image is ready");
  if (entry.status === "cancelled") toast("Cancelled");
  if (models.some(({ id, kind }) => id === settings.model && !kind)) loadModels();
}

/** Show an error where it can be fixed. */
function showFailure(error, entry) {
  if (error.status === 401) return askForKey(error.message, () => (loadModels(), again(entry)));
  const param = error.param?.replace("image[]", "image");
  const names = [`${entry.settings.mode}_${param}`, param];
  const field = names.find((name) => byId(`${name}-error`));
  if (field) showError(field, error.message);
}

const again = (entry) => (gallery.forget(entry), start(entry.settings));

async function keep(entry) {
  if (await history.save(entry)) return;
  notify("This browser has no room for the history. Delete some images.");
}

// -- the server

let models = [];

async function loadModels() {
  try {
    models = await api.models();
    form.setModels(models);
    byId("notice").hidden = true;
  } catch (error) {
    if (error.status === 401) askForKey(api.apiKey.get() ? error.message : "", loadModels);
    else notify(error.message, "Try again", loadModels);
  }
  byId("key-button").hidden = !api.apiKey.get();
}

function notify(message, action = null, onclick = null) {
  const box = byId("notice");
  box.replaceChildren(el("p", message), ...(action ? [el("button", { onclick }, action)] : []));
  box.hidden = false;
}

function askForKey(message, then) {
  const dialog = byId("key-dialog");
  byId("key").value = "";
  showError("key", message);
  if (!dialog.open) dialog.showModal();
  byId("key-form").onsubmit = () => {
    api.apiKey.set(byId("key").value.trim(), byId("key-remember").checked);
    byId("key-button").hidden = false;
    then();
  };
}

// -- files

function reuse(settings) {
  if (!form.write(settings)) return;
  byId("composer").scrollIntoView({ block: "start" });
  toast("Settings loaded");
}

async function loadSettings(file) {
  if (!file) return;
  try {
    reuse(await readSettings(file));
  } catch (error) {
    showError("form", error.message);
    byId("form-error").scrollIntoView({ block: "nearest" });
  }
}

function connect() {
  prepareDocument();
  form.prepare();
  viewer.prepare();
  gallery.prepare({ open: viewer.open, reuse, again, run });
  byId("composer").addEventListener("submit", (event) => (event.preventDefault(), start()));
  byId("prompt").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    start();
  });
  addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !document.querySelector("dialog[open]")) jobs.cancelLatest();
  });
  const copyAs = (write, what) => () => {
    const { grid, ...settings } = form.read() ?? {};
    if (settings.mode) copy(write(settings), what);
  };
  byId("copy-curl").onclick = copyAs(api.asCurl, "the curl command");
  byId("copy-python").onclick = copyAs(api.asPython, "the Python code");
  byId("load-png").onclick = async () => loadSettings(await chooseFile("image/png"));
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault();
    loadSettings(event.dataTransfer.files[0]);
  });
  addEventListener("paste", ({ clipboardData, target }) => {
    const image = [...clipboardData.files].find(({ type }) => type.startsWith("image/"));
    const typing = target.closest("textarea, input") && clipboardData.types.includes("text/plain");
    if (image && !typing && !document.querySelector("dialog[open]")) form.paste(image);
  });
  byId("key-button").onclick = () => askForKey("", loadModels);
  const example = (prompt) => (form.write({ mode: "generate", prompt }), start());
  byId("examples").append(
    ...EXAMPLES.map((prompt) => el("button", { onclick: () => example(prompt) }, prompt)),
  );
}

connect();
const kept = await history.open();
await Promise.all([gallery.loadOlder(), loadModels()]);
if (!kept) notify("This browser keeps no history: images are lost when the page is closed.");
document.documentElement.dataset.ready = "";
