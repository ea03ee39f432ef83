/** Settings from the metadata of PNG files that unclip wrote, and square images for uploads. */

import { decode } from "./api.js";

const KEYWORD = "unclip";
const KEEP = 0.4375; // fraction that the API's variations of DALL-E keep of an image

/** Return the metadata of a PNG, one entry for each image. Error with one line if it has none. */
async function readMetadata(file) {
  const bytes = new Uint8Array(await file.arrayBuffer());
  const view = new DataView(bytes.buffer);
  const latin = (start, end) => String.fromCharCode(...bytes.subarray(start, end));
  for (let at = 8; latin(1, 4) === "PNG" && at + 12 <= bytes.length;) {
    const length = view.getUint32(at);
    const [type, start, end] = [latin(at + 4, at + 8), at + 8, at + 8 + length];
    if (type === "iTXt" && latin(start, start + KEYWORD.length + 1) === `${KEYWORD}\0`) {
      const flag = start + KEYWORD.length + 1; // then method, language, translated keyword
      const text = bytes.indexOf(0, bytes.indexOf(0, flag + 2) + 1) + 1;
      const data = JSON.parse(await inflate(bytes.slice(text, end), bytes[flag] === 1));
      const entries = Array.isArray(data) ? data : (data.entries ?? [data]);
      return entries.map((entry) => withPictures(entry, data.pictures));
    }
    at = end + 4;
  }
  const name = file.name || "The file";
  throw new Error(`${name} has no unclip settings. Choose a PNG made by unclip.`);
}

async function inflate(bytes, compressed) {
  const stream = new Blob([bytes]).stream();
  const body = compressed ? stream.pipeThrough(new DecompressionStream("deflate")) : stream;
  return new Response(body).text();
}

/** Replace the indices of images that several entries share. */
function withPictures(entry, pictures) {
  const image = (value) => (Number.isInteger(value) ? pictures?.[value] : value);
  return { ...entry, picture: image(entry.picture), mask: image(entry.mask) };
}

/** Return options without those that have a field in the form. */
function withoutFields({ embedding, prior_candidates, ...options }) {
  const stage = ({ steps, guidance, sampler, ...others }) =>
    others.timesteps ? { steps, ...others } : others;
  if (!options.decoder) return stage(options); // of DALL-E
  options.decoder = stage(options.decoder);
  if (options.prior) {
    const { sampler } = options.prior;
    options.prior = { sampler, ...stage(options.prior) };
  }
  return options;
}

/** Return the settings that a PNG was made with. @returns {Promise<import("./api.js").Settings>} */
export async function readSettings(file) {
  const [entry] = await readMetadata(file);
  const options = entry.options ?? {};
  const { steps, guidance, sampler } = options.decoder ?? options;
  const { embedding, prior, prior_candidates } = options;
  const { seed, model } = entry;
  const settings = { mode: "generate", n: 1, model: model ?? undefined, seed };
  settings.options = withoutFields(options);
  Object.assign(settings, { steps, guidance, sampler, embedding, prior_candidates });
  Object.assign(settings, { prior_steps: prior?.steps, prior_guidance: prior?.guidance });
  const { operation, arguments: given = entry } = entry; // operations have the texts in arguments
  const prompt = given.prompt ?? entry.prompt ?? undefined;
  settings.negative_prompt = given.negative_prompt ?? undefined;
  const extended = operation === "outpaint" && (await extend(entry.picture, given));
  if (["inpaint", "image_to_image"].includes(operation) || extended) {
    const { strength, ...painting } = given.painting ?? {};
    Object.assign(settings, { mode: "edit", prompt, strength: given.strength ?? strength });
    if (given.painting) settings.options.painting = painting;
    if (entry.picture) settings.image = decode(entry.picture);
    Object.assign(settings, extended);
    const painted = entry.mask && (await paintedPart(decode(entry.mask)));
    if (painted) settings.mask = await maskPNG(painted);
  } else if (operation === "variations" && given.keep === KEEP) {
    Object.assign(settings, { mode: "vary", vary_prompt: prompt });
    if (entry.picture) settings.image = decode(entry.picture);
  } else if (entry.image_emb && !operation) {
    const { image_emb: image_embedding, layout = undefined } = entry;
    Object.assign(settings, { mode: "vary", vary_prompt: prompt, image_embedding, layout });
  } else if (!operation && typeof prompt === "string") {
    settings.prompt = prompt;
  } else {
    throw new Error(`This page cannot repeat the operation "${operation}" of this PNG.`);
  }
  return settings;
}

/** Return an image with black borders and the mask that paints them; null if outpainting would not
 * paint them alike: its windows have the shorter side of the image. */
async function extend(base64, { left, top, right, bottom }) {
  const image = base64 && (await createImageBitmap(decode(base64)));
  if (!image) return null;
  const canvas = canvasOf(null, image.width + left + right, image.height + top + bottom);
  const shorter = ({ width, height }) => Math.min(width, height);
  if (shorter(canvas) > shorter(image)) return null;
  const context = canvas.getContext("2d");
  context.drawImage(image, left, top);
  const mask = await toPNG(canvas); // transparent borders
  context.globalCompositeOperation = "destination-over";
  context.fillRect(0, 0, canvas.width, canvas.height);
  return { image: await toPNG(canvas), mask };
}

/** Draw an image or a part of it on a new canvas. */
export function canvasOf(image, width, height, ...source) {
  const canvas = document.createElement("canvas");
  Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  if (image) context.drawImage(image, ...source, 0, 0, width, height);
  return canvas;
}

const toPNG = (canvas) => new Promise((resolve) => canvas.toBlob(resolve, "image/png"));

/** Return an image that the API takes: a square PNG as it is, anything else cropped to one. */
export async function squarePNG(file) {
  let image;
  try {
    image = await createImageBitmap(file);
  } catch {
    throw new Error(`${file.name || "The file"} is not an image. Choose a PNG, JPEG or WebP.`);
  }
  const side = Math.min(image.width, image.height);
  if (file.type === "image/png" && image.width === image.height && side <= 2048) return file;
  const size = Math.min(side, 1024);
  const corner = [(image.width - side) / 2, (image.height - side) / 2];
  return toPNG(canvasOf(image, size, size, ...corner, side, side));
}

/**
 * Return the painted part of a mask image, opaque on clear, at its own or another size: its
 * transparent pixels, or, without any, its light ones. Null if there is none.
 */
export async function paintedPart(file, size = null, transparentOnly = false) {
  const image = await createImageBitmap(file);
  const { width, height } = size ?? image;
  const canvas = canvasOf(image, width, height);
  const context = canvas.getContext("2d");
  const pixels = context.getImageData(0, 0, width, height);
  const { data } = pixels;
  let clear = false;
  for (let i = 3; i < data.length; i += 4) clear ||= data[i] < 128;
  if (transparentOnly && !clear) return null;
  let painted = false;
  for (let i = 0; i < data.length; i += 4) {
    const light = 0.299 * data[i] + 0.587 * data[i + 1] + 0.114 * data[i + 2];
    data[i + 3] = (clear ? data[i + 3] < 128 : light > 127) ? 255 : 0;
    painted ||= data[i + 3] > 0;
  }
  context.putImageData(pixels, 0, 0);
  return painted ? canvas : null;
}

/** Draw the painted part as the checkerboard that stands for transparency. */
export function checkered(painted) {
  const side = Math.max(1, Math.round(painted.width / 48));
  const board = canvasOf(null, 2 * side, 2 * side);
  const pen = board.getContext("2d");
  for (const [color, at, size] of [["#fff", 0, 2], ["#aaa", 0, 1], ["#aaa", 1, 1]]) {
    pen.fillStyle = color;
    pen.fillRect(at * side, at * side, size * side, size * side);
  }
  const canvas = canvasOf(painted, painted.width, painted.height);
  const context = canvas.getContext("2d");
  context.globalCompositeOperation = "source-atop";
  context.fillStyle = context.createPattern(board, "repeat");
  context.fillRect(0, 0, canvas.width, canvas.height);
  return canvas;
}

/** Turn a canvas of `paintedPart` into an upload: alpha 0 where it is painted, 255 elsewhere. */
export function maskPNG(painted) {
  const canvas = canvasOf(painted, painted.width, painted.height);
  const context = canvas.getContext("2d");
  const pixels = context.getImageData(0, 0, canvas.width, canvas.height);
  for (let i = 0; i < pixels.data.length; i += 4) {
    pixels.data.set([0, 0, 0, pixels.data[i + 3] < 128 ? 255 : 0], i);
  }
  context.putImageData(pixels, 0, 0);
  return toPNG(canvas);
}
