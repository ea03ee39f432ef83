/** The form: reads settings from its fields, writes them back, and shows what a model offers. */

import { blobURL, byId, chooseFile, clearErrors, el, icon, iconButton, showError } from "./ui.js";
import { editMask, importMask } from "./mask.js";
import { checkered, paintedPart, squarePNG } from "./png.js";

const form = byId("composer");
const NUMBERS = ["n", "seed", "steps", "guidance", "num_candidates"];
const TEXTS = ["prompt", "negative_prompt", "sampler"];
const OPERATIONS = { generate: "generations", edit: "edits", vary: "variations" };
const SAMPLERS = ["ddim", "ancestral", "dpm++", "unipc"];
const AXES = {
  seed: "Seed",
  steps: "Steps",
  guidance: "Guidance",
  sampler: "Sampler",
  prompt: "Prompt",
  negative_prompt: "Negative prompt",
  strength: "Strength",
  weight: "Share of second",
  model: "Model",
};
const ONLY = {
  prompt: ["generate", "edit"],
  negative_prompt: ["generate"],
  strength: ["edit"],
  weight: ["vary"],
};
const SLOTS = { image: "Image", second: "Second image" };
const MAX_CELLS = 64;
export const axisLabel = (name) => AXES[name];

/** Images of the form, which no field can hold. */
const held = { image: null, second: null, mask: null, image_embedding: null };
let served = [];

const mode = () => form.elements.mode.value;
const model = () => served.find(({ id }) => id === byId("model").value) ?? served[0];

/** Show only what the mode needs. */
export function update() {
  for (const part of form.querySelectorAll("[data-modes]")) {
    part.hidden = !part.dataset.modes.split(" ").includes(mode());
  }
  const pair = mode() === "vary" && held.image && held.second;
  byId("mix-field").hidden = !pair;
  byId("weight-output").value = `${Math.round(form.elements.weight.value * 100)} %`;
  byId("strength-output").value = `${Math.round(form.elements.strength.value * 100)} %`;
  byId("paint").textContent = held.mask ? "Change mask" : "Paint mask";
  byId("paint").disabled = byId("import-mask").disabled = !held.image;
  byId("generate").textContent = {
    generate: "Generate",
    edit: "Edit image",
    vary: pair ? "Mix" : "Vary",
  }[mode()];
  for (const select of [form.elements.x_name, form.elements.y_name]) {
    const chosen = select.value;
    const names = Object.keys(AXES).filter((name) => (ONLY[name] ?? [mode()]).includes(mode()));
    const options = names.map((name) => new Option(AXES[name], name));
    select.replaceChildren(new Option("None", ""), ...options);
    select.value = names.includes(chosen) ? chosen : "";
  }
  const offers = model()?.operations;
  for (const radio of form.elements.mode) {
    radio.disabled = Boolean(offers) && !offers.includes(OPERATIONS[radio.value]);
    radio.parentElement.title = radio.disabled ? `${model().id} cannot do this` : "";
  }
  byId("steps").placeholder = model()?.steps ?? "default";
  byId("guidance").placeholder = model()?.guidance ?? "default";
}

/** Fill the list of models, and of the samplers of the chosen one. */
export function setModels(models) {
  const chosen = byId("model").value;
  served = models;
  byId("model").replaceChildren(...models.map(({ id }) => new Option(id, id)));
  if (models.some(({ id }) => id === chosen)) byId("model").value = chosen;
  showModel();
}

function showModel() {
  const chosen = form.elements.sampler.value;
  const samplers = (model()?.samplers ?? SAMPLERS).map((name) => new Option(name, name));
  form.elements.sampler.replaceChildren(new Option("Default", ""), ...samplers);
  form.elements.sampler.value = chosen;
  if (form.elements.sampler.selectedIndex < 0) form.elements.sampler.value = "";
  const offers = model()?.operations;
  if (offers && !offers.includes(OPERATIONS[mode()])) form.elements.mode.value = "generate";
  update();
}

/** Return the settings of the form, or null after showing what is missing. */
export function read() {
  clearErrors(form);
  const settings = { mode: mode(), model: byId("model").value || undefined };
  for (const name of NUMBERS) {
    const field = form.elements[name];
    if (!field.checkValidity()) return refuse(name, field.validationMessage);
    if (field.value !== "" && !field.closest("[hidden]")) settings[name] = field.valueAsNumber;
  }
  for (const name of TEXTS) {
    const field = form.elements[name];
    if (field.value.trim() && !field.closest("[hidden]")) settings[name] = field.value.trim();
  }
  settings.n ??= 1;
  if (settings.mode !== "vary" && !settings.prompt) return refuse("prompt", "Describe the image.");
  if (settings.mode === "edit") {
    if (!held.image) return refuse("image", "Choose an image to edit.");
    settings.strength = form.elements.strength.valueAsNumber;
    if (!held.mask && settings.strength === 1) {
      return refuse("mask", "Paint a mask, or lower the strength to change the whole image.");
    }
    Object.assign(settings, { image: held.image, ...(held.mask && { mask: held.mask }) });
  }
  if (settings.mode === "vary") {
    if (held.image_embedding) settings.image_embedding = held.image_embedding;
    else if (!held.image) return refuse("image", "Choose an image to vary.");
    else settings.image = held.image;
    if (held.image && held.second) {
      Object.assign(settings, { second: held.second, weight: form.elements.weight.valueAsNumber });
    }
  }
  if (!byId("grid").open) return settings;
  const x = readAxis("x");
  const y = readAxis("y");
  if (x === null || y === null) return null;
  if (!x && !y) return settings;
  if (x && y && x.name === y.name) return refuse("grid", "Rows and columns are the same setting.");
  const cells = (x?.values.length ?? 1) * (y?.values.length ?? 1);
  if (cells > MAX_CELLS) {
    return refuse("grid", `The grid has ${cells} images; at most ${MAX_CELLS} are allowed.`);
  }
  return { ...settings, n: 1, num_candidates: undefined, grid: x ? { x, y } : { x: y } };
}

function readAxis(axis) {
  const name = form.elements[`${axis}_name`].value;
  if (!name) return undefined;
  const text = form.elements[`${axis}_values`].value;
  const parts = text
    .split(name.endsWith("prompt") ? "|" : ",")
    .map((part) => part.trim())
    .filter(Boolean);
  if (!parts.length) return refuse("grid", `Give values for ${AXES[name].toLowerCase()}.`);
  const isText = TEXTS.includes(name) || name === "model";
  const values = isText ? parts : parts.map(Number);
  if (!isText && values.some(Number.isNaN))
    return refuse("grid", `${AXES[name]} takes numbers: ${text}`);
  if (name === "weight" && !(held.image && held.second))
    return refuse("grid", "Choose two images to mix.");
  return { name, values };
}

function refuse(field, message) {
  showError(field, message);
  byId(field)?.focus?.();
  return null;
}

/** Write settings into the form; what they leave open becomes the default. */
export function write(settings) {
  clearErrors(form);
  form.elements.mode.value = settings.mode;
  const { x, y } = settings.grid ?? {};
  if (settings.model && served.some(({ id }) => id === settings.model)) {
    byId("model").value = settings.model;
    showModel();
  }
  for (const name of [...NUMBERS, ...TEXTS]) form.elements[name].value = settings[name] ?? "";
  form.elements.n.value = settings.n ?? 1;
  form.elements.strength.value = settings.strength ?? 1;
  form.elements.weight.value = settings.weight ?? 0.5;
  for (const name of Object.keys(held)) held[name] = settings[name] ?? null;
  update();
  byId("grid").open = Boolean(x);
  for (const [axis, chosen] of [
    ["x", x],
    ["y", y],
  ]) {
    form.elements[`${axis}_name`].value = chosen?.name ?? "";
    form.elements[`${axis}_values`].value =
      chosen?.values.join(chosen.name.endsWith("prompt") ? " | " : ", ") ?? "";
  }
  showSlots();
}

/** Switch to a mode with an image in its place, and keep the other settings. */
export async function use(newMode, blob, slot = "image") {
  form.elements.mode.value = newMode;
  await place(slot, blob);
  form.scrollIntoView({ block: "start" });
  if (newMode === "edit") await paint();
}

/** Put an image into the mix: first where there is none, else second. */
export const addToMix = (blob) => use("vary", blob, held.image ? "second" : "image");

async function place(slot, file) {
  clearErrors(form);
  try {
    held[slot] = file && (await squarePNG(file));
    if (slot === "image") {
      held.mask = held.image_embedding = null;
      if (file) held.mask = await ownMask(held.image);
    }
  } catch (error) {
    showError("image", error.message);
  }
  showSlots();
}

/** Return the mask in the alpha of an image, which the API would use as well. */
async function ownMask(image) {
  const painted = await paintedPart(image, null, true);
  return painted ? image : null;
}

function showSlots() {
  for (const [name, label] of Object.entries(SLOTS)) {
    const slot = form.querySelector(`[data-slot=${name}]`);
    const blob = held[name];
    if (name === "image" && held.image_embedding) {
      const text = el("span.slot-text", {}, "Embedding from PNG");
      slot.replaceChildren(
        text,
        iconButton("close", "Remove embedding", () => place(name, null)),
      );
    } else if (blob) {
      const open = el("button.slot-image", {
        "aria-label": `Replace ${label.toLowerCase()}`,
        onclick: () => choose(name),
      });
      open.append(el("img", { src: blobURL(blob), alt: "" }));
      if (name === "image" && held.mask && mode() === "edit") showMask(open);
      slot.replaceChildren(
        open,
        iconButton("close", `Remove ${label.toLowerCase()}`, () => place(name, null)),
      );
    } else {
      const open = el("button.slot-empty", { onclick: () => choose(name) }, icon("image"));
      open.append(
        el("span", {}, name === "second" ? "Second image, to mix" : "Choose or drop an image"),
      );
      slot.replaceChildren(open);
    }
  }
  update();
}

async function showMask(parent) {
  const painted = await paintedPart(held.mask);
  if (painted) parent.append(checkered(painted));
}

async function choose(slot) {
  const file = await chooseFile();
  if (file) await place(slot, file);
}

async function paint() {
  const mask = await editMask(held.image, held.mask);
  if (mask) held.mask = mask;
  showSlots();
}

/** Connect the fields; called once. */
export function prepare() {
  form.addEventListener("input", update);
  for (const radio of form.elements.mode) radio.addEventListener("change", showSlots);
  byId("model").addEventListener("change", showModel);
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
      if (event.dataTransfer.files[0]) place(slot.dataset.slot, event.dataTransfer.files[0]);
    });
  }
  showModel();
  showSlots();
}
