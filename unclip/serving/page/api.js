/** The Images API: requests, streams, errors, and the same requests as curl and Python. */

/**
 * @typedef {Object} Settings what the user chose for one call
 * @property {"generate"|"edit"|"vary"} mode
 * @property {string} [model]
 * @property {string} [prompt]
 * @property {string} [negative_prompt]
 * @property {number} [n] @property {number} [seed] @property {number} [steps]
 * @property {number} [guidance] @property {string} [sampler] @property {number} [num_candidates]
 * @property {number} [strength] of an edit
 * @property {number} [weight] share of the second image, 0 to 1
 * @property {string} [image_embedding] base64, in place of the image of a variation
 * @property {Blob} [image] @property {Blob} [second] @property {Blob} [mask]
 * @property {Grid} [grid]
 *
 * @typedef {Object} Grid @property {Axis} x @property {Axis} [y]
 * @typedef {Object} Axis @property {string} name @property {Array<string|number>} values
 *
 * @typedef {Object} Result
 * @property {Blob} blob @property {number} seed @property {number} index of the image or grid cell
 *
 * @typedef {Object} Call a request in the API's terms
 * @property {string} path @property {Object} fields @property {Array<[string, Blob, string]>} files
 */

const BASE = new URL("v1/", document.baseURI);
const NUMBERS = ["n", "seed", "steps", "guidance"];
const FIELDS = {
  generate: ["model", "prompt", "negative_prompt", ...NUMBERS, "sampler", "num_candidates"],
  edit: ["model", "prompt", ...NUMBERS, "sampler", "strength"],
  vary: ["model", ...NUMBERS, "sampler", "image_embedding"],
};
const PATHS = { generate: "images/generations", edit: "images/edits", vary: "images/variations" };
const OPENAI_FIELDS = ["model", "prompt", "n", "response_format"];
const BUSY = [429, 503];

/** An error that the API answered, or that kept it from answering. */
export class APIError extends Error {
  constructor(message, status = 0, param = null, retryAfter = null) {
    super(message);
    Object.assign(this, { status, param, retryAfter });
  }
}

export const apiKey = {
  get: () => sessionStorage.getItem("key") ?? localStorage.getItem("key"),
  set(key, remember) {
    sessionStorage.removeItem("key");
    localStorage.removeItem("key");
    if (key) (remember ? localStorage : sessionStorage).setItem("key", key);
  },
};

/** Fetch from the API. APIError unless it succeeds. */
async function request(path, options = {}) {
  const key = apiKey.get();
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(new URL(path, BASE), { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new APIError("The server does not answer. Check that it is running.");
  }
  if (response.ok) return response;
  const { error } = await response.json().catch(() => ({}));
  const wait = BUSY.includes(response.status)
    ? Number(response.headers.get("retry-after") ?? 5)
    : null;
  const message = error?.message ?? `The server answered with status ${response.status}.`;
  throw new APIError(message, response.status, error?.param, wait);
}

/** Return the served models; the first is the default. */
export const models = async () => (await (await request("models")).json()).data;

/** Translate settings into a request. @returns {Call} */
export function call(settings) {
  const fields = {};
  for (const name of FIELDS[settings.mode]) {
    if (settings[name] !== undefined && settings[name] !== "") fields[name] = settings[name];
  }
  const files = [];
  if (settings.mode === "vary" && settings.second && !settings.image_embedding) {
    files.push(
      ["image[]", settings.image, "first.png"],
      ["image[]", settings.second, "second.png"],
    );
    fields.weights = `${round(1 - settings.weight)},${round(settings.weight)}`;
  } else if (settings.mode !== "generate" && settings.image && !settings.image_embedding) {
    files.push(["image", settings.image, "image.png"]);
  }
  if (settings.mode === "edit" && settings.mask) files.push(["mask", settings.mask, "mask.png"]);
  if (fields.strength === 1 && settings.mask) delete fields.strength;
  return { path: PATHS[settings.mode], fields, files };
}

const round = (value) => Number(value.toFixed(4));

/**
 * Generate images; events arrive at the handlers. APIError, or AbortError once `signal` is aborted,
 * which cancels the job on the server.
 * @param {Settings} settings
 * @param {AbortSignal} signal
 * @param {{progress: function(Object), partial: function(Blob, number), done: function(Result)}} on
 */
export async function generate(settings, signal, on) {
  const { path, fields, files } = call(settings);
  Object.assign(fields, { stream: true, partial_images: 3, indexed_partials: true });
  const options = { method: "POST", signal };
  if (files.length) {
    options.body = new FormData();
    for (const [name, value] of Object.entries(fields)) options.body.append(name, value);
    for (const [name, blob, filename] of files) options.body.append(name, blob, filename);
  } else {
    options.body = JSON.stringify(fields);
    options.headers = { "Content-Type": "application/json" };
  }
  const response = await request(path, options);
  let completed = 0;
  for await (const line of lines(response.body)) {
    if (line.startsWith(": {")) on.progress(JSON.parse(line.slice(2)));
    if (!line.startsWith("data: {")) continue;
    const event = JSON.parse(line.slice(6));
    if (event.error) throw new APIError(event.error.message, 500, event.error.param);
    const blob = decode(event.b64_json, event.output_format);
    const index = event.image_index ?? completed;
    if (event.type.endsWith(".partial_image")) on.partial(blob, index);
    else {
      completed += 1;
      on.done({ blob, index, seed: event.seed });
    }
  }
  if (completed < fields.n)
    throw new APIError("The connection ended before the images were complete.");
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
    throw new APIError("The connection to the server was lost.");
  }
}

function decode(base64, format) {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  return new Blob([bytes], { type: `image/${format ?? "png"}` });
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
    for (const [name, value] of Object.entries(fields)) {
      parts.push(`--form-string ${quote(`${name}=${value}`)}`);
    }
    for (const [name, , filename] of files) parts.push(`-F ${quote(`${name}=@${filename}`)}`);
  } else {
    parts.push("-H 'Content-Type: application/json'", `-d ${quote(JSON.stringify(fields))}`);
  }
  return parts.join(" \\\n  ");
}

/** Return Python code that makes the call with the `openai` package and saves the images. */
export function asPython(settings) {
  const { path, fields, files } = call(settings);
  const base = JSON.stringify(BASE.href.replace(/\/$/, ""));
  const key = apiKey.get() ? 'os.environ["OPENAI_API_KEY"]' : '"none"';
  const mixed = files.some(([name]) => name === "image[]");
  const imports = ["import base64", ...(apiKey.get() ? ["import os"] : [])];
  if (mixed) {
    // the SDK sends one image only
    const list = files.map(([name, , file]) => `("${name}", open("${file}", "rb"))`).join(", ");
    return [
      ...imports,
      "",
      "import httpx",
      "",
      "response = httpx.post(",
      `    ${base} + "/${path}",`,
      `    headers={"Authorization": "Bearer " + ${key}},`,
      `    data=${python({ ...fields, response_format: "b64_json" })},`,
      `    files=[${list}],`,
      "    timeout=600,",
      ")",
      'for i, image in enumerate(response.raise_for_status().json()["data"]):',
      '    with open(f"image-{i}.png", "wb") as file:',
      '        file.write(base64.b64decode(image["b64_json"]))',
      "",
    ].join("\n");
  }
  const known = OPENAI_FIELDS;
  const entries = Object.entries({ ...fields, response_format: "b64_json" });
  const lines = entries
    .filter(([name]) => known.includes(name))
    .map(([name, value]) => `    ${name}=${python(value)},`);
  for (const [name, , file] of files) lines.push(`    ${name}=open("${file}", "rb"),`);
  const extra = Object.fromEntries(entries.filter(([name]) => !known.includes(name)));
  if (Object.keys(extra).length) lines.push(`    extra_body=${python(extra)},`);
  const method = { generate: "generate", edit: "edit", vary: "create_variation" }[settings.mode];
  return [
    ...imports,
    "",
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${base}, api_key=${key})`,
    `response = client.images.${method}(`,
    ...lines,
    ")",
    "for i, image in enumerate(response.data):",
    '    with open(f"image-{i}.png", "wb") as file:',
    "        file.write(base64.b64decode(image.b64_json))",
    "",
  ].join("\n");
}

/** Write a value of JSON types without booleans, whose syntax Python shares. */
const python = (value) => JSON.stringify(value);
