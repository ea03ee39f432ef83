/** The form: reads settings from its fields, writes them back, and shows what a model offers. */

import { SETTINGS, optionsText, otherOptions } from "./api.js";
import { blobURL, byId, chooseFile, clearErrors, el, icon, iconButton, showError } from "./ui.js";
import { editMask, importMask } from "./mask.js";
import { checkered, paintedPart, squarePNG } from "./png.js";

const form = byId("composer");
const fields = form.elements;
const FIELDS = Object.keys(SETTINGS).filter((name) => name !== "model");
const AXES = Object.keys(SETTINGS).filter((name) => name !== "num_candidates");
const OPERATIONS = { generate: "generations", edit: "edits", vary: "variations" };
/** Of a model that is not loaded yet. */
const SAMPLERS = ["ddim", "ancestral", "dpm++", "unipc"];
const SLOTS = { image: "Choose or drop an image", second: "Second image, to mix" };
const MAX_CELLS = 64;

/** Images and options of the form, which no field can hold. */
const held = {
  image: null, second: null, mask: null, image_embedding: null, layout: null, options: null,
};
let served = [];

const mode = () => fields.mode.value;
const model = () => served.find(({ id }) => id === byId("model").value) ?? served[0];

/** Whether the model has a setting; one that is not loaded yet may have all. */
function supports(name) {
  const { kinds } = SETTINGS[name];
  return !kinds || !model()?.kind || kinds.includes(model().kind);
}

/** Return whether a model can do what a mode needs; one that is not loaded yet may. */
const serves = (one, wanted) => one?.operations?.includes(OPERATIONS[wanted]) ?? true;

const modelsFor = (wanted) => [model(), ...served].filter((one) => serves(one, wanted));

/** Return whether a served model can do what a mode needs. */
export const canUse = (wanted) => modelsFor(wanted).length > 0;

const offered = (name) => SETTINGS[name].modes.includes(mode()) && supports(name);

/** Put options into a select, and keep what is chosen if it is among them. */
function offer(select, names, first = [], label = (name) => name) {
  const chosen = select.value;
  select.replaceChildren(...first, ...names.map((name) => new Option(label(name), name)));
  if (names.includes(chosen)) select.value = chosen;
}

/** Show only what the mode needs and the model supports. */
export function update() {
  for (const part of form.querySelectorAll("[data-modes]")) {
    part.hidden = !part.dataset.modes.split(" ").includes(mode());
  }
  for (const name of FIELDS) fields[name].closest(".field").hidden = !offered(name);
  form.querySelector("[data-slot=second]").hidden = !offered("weight");
  const pair = offered("weight") && held.image && held.second;
  fields.weight.closest(".field").hidden = !pair;
  for (const name of ["weight", "strength"]) {
    byId(`${name}-output`).value = `${Math.round(fields[name].value * 100)} %`;
  }
  byId("paint").textContent = held.mask ? "Change mask" : "Paint mask";
  byId("paint").disabled = byId("import-mask").disabled = !held.image;
  const labels = { generate: "Generate", edit: "Edit image", vary: pair ? "Mix" : "Vary" };
  byId("generate").textContent = labels[mode()];
  for (const select of [fields.x_name, fields.y_name]) {
    offer(select, AXES.filter(offered), [new Option("None", "")], (name) => SETTINGS[name].label);
  }
  for (const radio of fields.mode) {
    radio.disabled = !serves(model(), radio.value);
    radio.parentElement.title = radio.disabled ? `${model().id} cannot do this` : "";
  }
  const options = optionsOfMode();
  byId("options-field").hidden = !options;
  byId("options").textContent = options ? optionsText(options) : "";
  byId("steps").placeholder = model()?.steps ?? "default";
  byId("guidance").placeholder = model()?.guidance ?? "default";
}

/** Return the options without a field; only edits paint. */
function optionsOfMode() {
  const { painting, ...options } = held.options ?? {};
  if (painting && mode() === "edit") options.painting = painting;
  return Object.keys(options).length ? options : undefined;
}

/** Fill the list of models, and of the samplers of the chosen one. */
export function setModels(models) {
  served = models;
  offer(byId("model"), models.map(({ id }) => id));
  showModel();
}

function showModel() {
  offer(fields.sampler, model()?.samplers ?? SAMPLERS, [new Option("Default", "")]);
  if (!serves(model(), mode())) fields.mode.value = "generate";
  update();
}

/** Return the settings of the form, or null after showing what is missing. */
export function read() {
  clearErrors(form);
  const settings = { mode: mode(), model: byId("model").value || undefined };
  for (const name of ["n", ...FIELDS]) {
    const field = fields[name];
    if (field.closest("[hidden]")) continue;
    if (!field.checkValidity()) return refuse(name, field.validationMessage);
    if (!field.value.trim()) continue;
    settings[name] = SETTINGS[name]?.text ? field.value.trim() : field.valueAsNumber;
  }
  settings.n ??= 1;
  if (optionsOfMode()) settings.options = optionsOfMode();
  const { image, second, mask, image_embedding, layout } = held;
  if (settings.mode !== "vary" && !settings.prompt) return refuse("prompt", "Describe the image.");
  if (settings.mode === "edit") {
    if (!image) return refuse("image", "Choose an image to edit.");
    const { strength } = settings; // undefined if the model can only inpaint
    if (!mask && !(strength < 1)) {
      const other = strength ? ", or lower the strength to change the whole image" : "";
      return refuse("mask", `Paint a mask${other}.`);
    }
    Object.assign(settings, { image, ...(mask && { mask }) });
  }
  if (settings.mode === "vary") {
    if (!image && !image_embedding) return refuse("image", "Choose an image to vary.");
    Object.assign(settings, image_embedding ? { image_embedding, ...(layout && { layout }) } : { image });
    if (settings.weight !== undefined) settings.second = second;
  }
  return byId("grid").open ? withGrid(settings) : settings;
}

function withGrid(settings) {
  const axes = ["x", "y"].map(readAxis);
  if (axes.includes(null)) return null;
  const [x, y] = axes.filter(Boolean);
  if (!x) return settings;
  if (x.name === y?.name) return refuse("grid", "Rows and columns are the same setting.");
  const cells = x.values.length * (y?.values.length ?? 1);
  if (cells <= MAX_CELLS) return { ...settings, n: 1, num_candidates: undefined, grid: { x, y } };
  return refuse("grid", `The grid has ${cells} images; at most ${MAX_CELLS} are allowed.`);
}

const separator = (name) => (name.endsWith("prompt") ? " | " : ", ");

/** Return an axis of the grid; undefined if it is not used, null after showing what is wrong. */
function readAxis(axis) {
  const name = fields[`${axis}_name`].value;
  if (!name) return undefined;
  const { label, text } = SETTINGS[name];
  const given = fields[`${axis}_values`].value;
  const parts = given.split(separator(name).trim()).map((part) => part.trim());
  if (!parts.some(Boolean)) return refuse("grid", `Give values for ${label.toLowerCase()}.`);
  const values = parts.filter(Boolean).map(text ? String : Number);
  if (values.some(Number.isNaN)) return refuse("grid", `${label} takes numbers: ${given}`);
  if (name !== "weight" || (held.image && held.second)) return { name, values };
  return refuse("grid", "Choose two images to mix.");
}

function refuse(field, message) {
  showError(field, message);
  byId(field)?.focus?.();
  return null;
}

/** Switch to a mode, if necessary with another model; false after showing that none has it. */
function switchTo(newMode) {
  if (!canUse(newMode)) {
    showError("form", `No model of this server offers ${OPERATIONS[newMode]}.`);
    return false;
  }
  const [able] = modelsFor(newMode); // the present one first
  if (able !== model()) {
    byId("model").value = able.id;
    held.options = null;
  }
  fields.mode.value = newMode;
  showModel();
  return true;
}

/** Write settings into the form; what they leave open becomes the default. False if no model of
 * the server has their mode. */
export function write(settings) {
  clearErrors(form);
  if (served.some(({ id }) => id === settings.model)) byId("model").value = settings.model;
  if (!switchTo(settings.mode)) return false;
  const defaults = { n: 1, strength: 1, weight: 0.5 };
  for (const name of ["n", ...FIELDS]) {
    fields[name].value = settings[name] ?? defaults[name] ?? "";
  }
  for (const name of Object.keys(held)) held[name] = settings[name] ?? null;
  held.options = otherOptions(settings.options ?? {}, model()?.options ?? {}) ?? null;
  update();
  byId("grid").open = Boolean(settings.grid);
  for (const axis of ["x", "y"]) {
    const { name = "", values = [] } = settings.grid?.[axis] ?? {};
    fields[`${axis}_name`].value = name;
    fields[`${axis}_values`].value = values.join(separator(name));
  }
  showSlots();
  return true;
}

/** Switch to a mode with an image in its place; the other settings stay. */
export async function use(newMode, blob, slot = "image") {
  if (!switchTo(newMode)) return;
  await place(slot, blob);
  form.scrollIntoView({ block: "start" });
  if (newMode === "edit") await paint();
}

/** Put an image into the mix: first where there is none, else second. */
export const addToMix = (blob) =>
  use("vary", blob, held.image && supports("weight") ? "second" : "image");

/** Take a pasted image: to edit, if that is what the form does, else to vary or mix. */
export function paste(file) {
  if (mode() !== "edit" && canUse("vary")) return addToMix(file);
  return switchTo("edit") && place("image", file);
}

async function place(slot, file) {
  clearErrors(form);
  try {
    held[slot] = file && (await squarePNG(file));
    if (slot === "image") {
      held.mask = held.image_embedding = held.layout = null;
      // The API would use the alpha of an image as well.
      if (file && (await paintedPart(held.image, null, true))) held.mask = held.image;
    }
  } catch (error) {
    showError("image", error.message);
  }
  showSlots();
}

function showSlots() {
  for (const [name, text] of Object.entries(SLOTS)) {
    const what = name === "image" ? "image" : "second image";
    const onclick = async () => {
      const file = await chooseFile();
      if (file) await place(name, file);
    };
    const clear = (label) => iconButton("close", label, () => place(name, null));
    let parts = [el("button.slot-empty", { onclick }, icon("image"), el("span", text))];
    if (name === "image" && held.image_embedding) {
      parts = [el("span.slot-text", "Embedding from PNG"), clear("Remove embedding")];
    } else if (held[name]) {
      const image = el("img", { src: blobURL(held[name]), alt: "" });
      const open = el("button.slot-image", { "aria-label": `Replace ${what}`, onclick }, image);
      if (name === "image" && held.mask && mode() === "edit") showMask(open);
      parts = [open, clear(`Remove ${what}`)];
    }
    form.querySelector(`[data-slot=${name}]`).replaceChildren(...parts);
  }
  update();
}

async function showMask(parent) {
  const painted = await paintedPart(held.mask);
  if (painted) parent.append(checkered(painted));
}

async function paint() {
  held.mask = (await editMask(held.image, held.mask)) ?? held.mask;
  showSlots();
}

function dropOptions() {
  held.options = null;
  update();
}

/** Connect the fields; called once. */
export function prepare() {
  form.addEventListener("input", update);
  for (const radio of fields.mode) radio.addEventListener("change", showSlots);
  byId("model").addEventListener("change", () => (dropOptions(), showModel()));
  byId("options-clear").onclick = dropOptions;
  byId("paint").onclick = paint;
  byId("import-mask").onclick = async () => {
    try {
      held.mask = (await importMask(held.image)) ?? held.mask;
      showError("mask", "");
    } catch (error) {
      showError("mask", error.message);
    }
    showSlots();
  };
  for (const slot of form.querySelectorAll("[data-slot]")) {
    slot.addEventListener("dragover", (event) => event.preventDefault());
    slot.addEventListener("drop", (event) => {
      event.preventDefault();
      event.stopPropagation();
      const [file] = event.dataTransfer.files;
      if (file) place(slot.dataset.slot, file);
    });
  }
  showModel();
  showSlots();
}
