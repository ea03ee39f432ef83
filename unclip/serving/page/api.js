/** The Images API: requests, streams, errors, and the same requests as curl and Python. */

/**
 * @typedef {Object} Settings what the user chose for one call
 * @property {"generate"|"edit"|"vary"} mode
 * @property {number} n and, where given, those of SETTINGS: prompt, seed, ...
 * @property {string} [image_embedding] base64, in place of the image of a variation
 * @property {string} [layout] base64, of the image with this embedding
 * @property {Object} [options] sampling options of the model that have no field in the form
 * @property {Blob} [image] @property {Blob} [second] @property {Blob} [mask]
 * @property {{x: Axis, y: Axis=}} [grid]
 * @typedef {{name: string, values: Array<string|number>}} Axis
 * @typedef {{blob: Blob, seed: number, index: number}} Result index: of the image or grid cell
 * @typedef {{path: string, fields: Object, files: Array<[string, Blob, string]>}} Call
 */

const BASE = new URL("v1/", document.baseURI);
const ALL = "generate edit vary";
const PRIOR = { modes: "generate edit", kinds: "unclip" };
/**
 * The settings with a field in the form; kinds: of the models that have it, if not all; text: not a
 * number, share: a number from 0 to 1.
 */
export const SETTINGS = {
  prompt: { label: "Prompt", modes: "generate edit", text: true },
  vary_prompt: { label: "Prompt", modes: "vary", text: true }, // optional
  negative_prompt: { label: "Negative prompt", modes: ALL, text: true },
  seed: { label: "Seed", modes: ALL },
  steps: { label: "Steps", modes: ALL, kinds: "unclip glide" },
  guidance: { label: "Guidance", modes: ALL },
  sampler: { label: "Sampler", modes: ALL, kinds: "unclip glide", text: true },
  embedding: { label: "Embedding", ...PRIOR, text: true },
  prior_steps: { label: "Prior steps", ...PRIOR },
  prior_guidance: { label: "Prior guidance", ...PRIOR },
  prior_candidates: { label: "Prior candidates", ...PRIOR },
  strength: { label: "Strength", modes: "edit", kinds: "unclip", share: true },
  weight: { label: "Share of second", modes: "vary", kinds: "unclip", share: true },
  num_candidates: { label: "Candidates", modes: "generate", kinds: "unclip dalle" },
  model: { label: "Model", modes: ALL, text: true },
};
const PATHS = { generate: "images/generations", edit: "images/edits", vary: "images/variations" };
const MORE = { n: { modes: ALL }, image_embedding: { modes: "vary" }, layout: { modes: "vary" } };
const METHODS = { generate: "generate", edit: "edit", vary: "create_variation" };
/** Of the SDK's methods; that of variations has no prompt. */
const OPENAI_FIELDS = ["model", "n", "response_format"];
const BUSY = [429, 503];

const isObject = (value) => typeof value === "object" && value !== null;
const isList = (value) => Array.isArray(value) && !value.some(isObject);

/** Return what of a model's options differs from its defaults; undefined if nothing does. */
export function otherOptions(options, defaults) {
  if (JSON.stringify(options) === JSON.stringify(defaults)) return undefined;
  if (!isObject(options) || !isObject(defaults) || isList(options)) return options;
  if (Array.isArray(options)) {
    if (options.length !== defaults.length) return options;
    return options.map((one, i) => otherOptions(one, defaults[i]) ?? {});
  }
  const parts = Object.entries(options).map(([name, value]) => [
    name, otherOptions(value, defaults[name]),
  ]);
  const changed = parts.filter(([, value]) => value !== undefined);
  return changed.length ? Object.fromEntries(changed) : undefined;
}

/** Return options as text: "prior sampler unipc, upsamplers 0 steps 5". */
export function optionsText(options, before = "") {
  const parts = Object.entries(options).map(([name, value]) => {
    if (isObject(value) && !isList(value)) return optionsText(value, `${before}${name} `);
    const shown = isList(value) ? value.join(" to ") : (value ?? "none");
    return `${before}${name.replaceAll("_", " ")} ${shown}`;
  });
  return parts.filter(Boolean).join(", ");
}

/** Make the error that the API answered, or that kept it from answering. */
const failure = (message, status = 0, param = null, retryAfter = null) =>
  Object.assign(new Error(message), { status, param, retryAfter });

/** Make the error of a connection that ended early; the job goes on for some seconds. */
const lost = () => failure("The connection to the server was lost.", 0, null, 1);

/** Cancel a job on the server. */
export const cancel = (job) => request(`jobs/${job}`, { method: "DELETE" }).catch(() => {});

export const apiKey = {
  get: () => sessionStorage.getItem("key") ?? localStorage.getItem("key"),
  set(key, remember) {
    sessionStorage.removeItem("key");
    localStorage.removeItem("key");
    if (key) (remember ? localStorage : sessionStorage).setItem("key", key);
  },
};

/** Fetch from the API, or fail. */
async function request(path, options = {}) {
  const key = apiKey.get();
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(new URL(path, BASE), { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw failure("The server does not answer. Check that it is running.");
  }
  const { ok, status } = response;
  if (ok) return response;
  const { error } = await response.json().catch(() => ({}));
  const wait = BUSY.includes(status) ? Number(response.headers.get("retry-after") ?? 5) : null;
  const message = error?.message ?? `The server answered with status ${status}.`;
  throw failure(message, status, error?.param, wait);
}

/** Return the served models; the first is the default. */
export const models = async () => (await (await request("models")).json()).data;

/** Translate settings into a request. @returns {Call} */
export function call(settings) {
  const fields = {};
  for (const [name, { modes }] of Object.entries({ ...SETTINGS, ...MORE })) {
    const given = settings[name] !== undefined && settings[name] !== "" && name !== "weight";
    if (!given || !modes.includes(settings.mode)) continue;
    fields[name.replace("vary_", "")] = settings[name];
  }
  if (settings.options) fields.options = JSON.stringify(settings.options);
  const files = [];
  const { mode, image, second, mask, weight } = settings;
  if (mode === "vary" && second && !settings.image_embedding) {
    files.push(["image[]", image, "first.png"], ["image[]", second, "second.png"]);
    fields.weights = [1 - weight, weight].map((share) => Number(share.toFixed(4))).join(",");
  } else if (mode !== "generate" && image && !settings.image_embedding) {
    files.push(["image", image, "image.png"]);
  }
  if (mode === "edit" && mask) files.push(["mask", mask, "mask.png"]);
  if (mask && fields.strength === 1) delete fields.strength;
  return { path: PATHS[mode], fields, files };
}

/**
 * Generate images, or wait for those of an earlier request with the same job id.
 * @param {Settings} settings
 * @param {{progress: function(Object), partial: function(Blob, number), done: function(Result)}} on
 */
export async function generate(settings, job, signal, on) {
  const { path, fields, files } = call(settings);
  Object.assign(fields, { stream: true, partial_images: 3, indexed_partials: true });
  const options = { method: "POST", signal, headers: { "X-Unclip-Job": job } };
  if (files.length) {
    options.body = new FormData();
    for (const [name, value] of Object.entries(fields)) options.body.append(name, value);
    for (const [name, blob, filename] of files) options.body.append(name, blob, filename);
  } else {
    options.body = JSON.stringify(fields);
    options.headers["Content-Type"] = "application/json";
  }
  const response = await request(path, options);
  let completed = 0;
  for await (const line of lines(response.body)) {
    if (line.startsWith(": {")) on.progress(JSON.parse(line.slice(2)));
    if (!line.startsWith("data: {")) continue;
    const event = JSON.parse(line.slice(6));
    if (event.error) throw failure(event.error.message, 500, event.error.param);
    const blob = decode(event.b64_json, event.output_format);
    const index = event.image_index ?? completed;
    if (event.type.endsWith(".partial_image")) on.partial(blob, index);
    else {
      completed += 1;
      on.done({ blob, index, seed: event.seed });
    }
  }
  if (completed < fields.n) throw lost();
}

async function* lines(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n");
      rest = parts.pop();
      yield* parts;
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw lost();
  }
}

/** Decode an image. */
export function decode(base64, format = "png") {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  return new Blob([bytes], { type: `image/${format}` });
}

// -- the same request for other programs

const quote = (text) => `'${String(text).replaceAll("'", "'\\''")}'`;

/** Return a curl command that makes the call. */
export function asCurl(settings) {
  const { path, fields, files } = call(settings);
  const parts = [`curl ${quote(new URL(path, BASE))}`];
  if (apiKey.get()) parts.push('-H "Authorization: Bearer $OPENAI_API_KEY"');
  fields.response_format = "b64_json";
  if (files.length) {
    const entries = Object.entries(fields);
    parts.push(...entries.map(([name, value]) => `--form-string ${quote(`${name}=${value}`)}`));
    parts.push(...files.map(([name, , filename]) => `-F ${quote(`${name}=@${filename}`)}`));
  } else {
    parts.push("-H 'Content-Type: application/json'", `-d ${quote(JSON.stringify(fields))}`);
  }
  return parts.join(" \\\n  ");
}

/** Return Python code that makes the call and saves the images: with `openai`, or, for an embedding
 * or several images, which its method does not take, with `requests`. */
export function asPython(settings) {
  const { path, fields, files } = call(settings);
  const python = JSON.stringify; // there are no booleans
  const base = python(BASE.href.replace(/\/$/, ""));
  const key = apiKey.get() ? 'os.environ["OPENAI_API_KEY"]' : '"none"';
  fields.response_format = "b64_json";
  const opened = files.map(([name, , file]) => [name, `open("${file}", "rb")`]);
  const list = (pairs) => pairs.map(([name, file]) => `("${name}", ${file})`).join(", ");
  let library, lines;
  if (fields.image_embedding || files.some(([name]) => name === "image[]")) {
    library = "import requests";
    lines = [
      `response = requests.post(\n    ${base} + "/${path}",`,
      `    headers={"Authorization": "Bearer " + ${key}},`,
      `    ${files.length ? "data" : "json"}=${python(fields)},`,
      ...(files.length ? [`    files=[${list(opened)}],`] : []),
      "    timeout=600,\n)\nresponse.raise_for_status()",
      'images = [image["b64_json"] for image in response.json()["data"]]',
    ];
  } else {
    library = "from openai import OpenAI";
    const extra = {};
    const known = [];
    for (const [name, value] of Object.entries(fields)) {
      const prompt = name === "prompt" && settings.mode !== "vary";
      if (prompt || OPENAI_FIELDS.includes(name)) known.push([name, python(value)]);
      else extra[name] = value;
    }
    if (Object.keys(extra).length) opened.push(["extra_body", python(extra)]);
    lines = [
      `client = OpenAI(base_url=${base}, api_key=${key})`,
      `response = client.images.${METHODS[settings.mode]}(`,
      ...[...known, ...opened].map(([name, value]) => `    ${name}=${value},`),
      ")\nimages = [image.b64_json for image in response.data]",
    ];
  }
  const save = [
    "for i, image in enumerate(images):",
    '    with open(f"image-{i}.png", "wb") as file:',
    "        file.write(base64.b64decode(image))\n",
  ];
  const imports = ["import base64", ...(apiKey.get() ? ["import os"] : [])];
  return [...imports, "", library, "", ...lines, ...save].join("\n");
}
