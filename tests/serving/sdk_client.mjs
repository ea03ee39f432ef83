// Uses the `openai` package of Node against a server; run by check_sdks.py.
//     node sdk_client.mjs http://127.0.0.1:8000/v1 KEY image.png mask.png
import assert from "node:assert/strict";
import fs from "node:fs";
import OpenAI, { toFile } from "openai";

const [baseURL, apiKey, image, mask] = process.argv.slice(2);
const sdk = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const file = (path) => toFile(fs.createReadStream(path), "image.png", { type: "image/png" });

const result = await sdk.images.generate({ prompt: "a red apple", n: 2, size: "256x256" });
assert.equal(result.data.length, 2);
const png = Buffer.from(await (await fetch(result.data[0].url)).arrayBuffer());
assert.equal(png.subarray(1, 4).toString(), "PNG");
const encoded = await sdk.images.generate({ prompt: "a", response_format: "b64_json", seed: 7 });
assert.equal(Buffer.from(encoded.data[0].b64_json, "base64").subarray(1, 4).toString(), "PNG");
await sdk.images.edit({ image: await file(image), mask: await file(mask), prompt: "a" });
await sdk.images.createVariation({ image: await file(image) });
const types = [];
const stream = await sdk.images.generate({ prompt: "a", stream: true, partial_images: 2 });
for await (const event of stream) types.push(event.type);
const partial = "image_generation.partial_image";
assert.deepEqual(types, [partial, partial, "image_generation.completed"]);
await assert.rejects(sdk.images.generate({ prompt: "a", n: 15 }), OpenAI.BadRequestError);
await assert.rejects(sdk.images.generate({ prompt: "a", model: "x" }), OpenAI.NotFoundError);
const wrong = new OpenAI({ baseURL, apiKey: "sk-wrong", maxRetries: 0 });
await assert.rejects(wrong.images.generate({ prompt: "a" }), OpenAI.AuthenticationError);
assert.equal((await sdk.models.list()).data[0].object, "model");
console.log("openai for Node: ok");
