/** The mask editor: a brush, an eraser, zoom and undo over an image. */

import { byId, chooseFile, toast } from "./ui.js";
import { canvasOf, checkered, maskPNG, paintedPart, squarePNG } from "./png.js";

const MAX_UNDO = 20;
const MAX_ZOOM = 16;

const dialog = byId("mask");
const canvas = byId("mask-canvas");
const screen = canvas.getContext("2d");
let image = null; // ImageBitmap
let painted = null; // canvas of the image's size, opaque where it is painted
let undone = []; // snapshots before each stroke
let view = { scale: 1, x: 0, y: 0 }; // canvas pixels = image pixels * scale + (x, y)
let cursor = null; // image pixels
let keyboard = false; // whether keys move the brush, which is then always visible
let pointers = new Map(); // id -> canvas pixels
let stroke = null; // the last point of the present stroke
let frame = 0; // that is requested
let finish = () => {};

/** Let the user paint. The uploaded form of the mask, or null if nothing is painted or changed. */
export async function editMask(imageBlob, maskBlob) {
  image = await createImageBitmap(imageBlob);
  painted =
    (maskBlob && (await paintedPart(maskBlob, image))) ??
    (await paintedPart(imageBlob, null, true)) ??
    canvasOf(null, image.width, image.height);
  undone = [];
  pointers.clear();
  stroke = cursor = null;
  keyboard = false;
  dialog.showModal();
  canvas.focus();
  fit();
  return new Promise((resolve) => (finish = resolve));
}

/** Ask for a mask file: its transparent part, or else its light part, is painted. */
export async function importMask(imageBlob) {
  const file = await chooseFile();
  if (!file) return null;
  const size = await createImageBitmap(imageBlob);
  const square = size.width === size.height; // and so cropped, unless it was
  const part = await paintedPart(square ? await squarePNG(file) : file, size);
  if (!part) throw new Error("This mask has no transparent or light part. Choose another file.");
  return maskPNG(part);
}

const tool = () => dialog.querySelector("[name=tool]:checked").value;
const longer = () => Math.max(image.width, image.height);
/** Radius in image pixels; the size is a percentage of half the image. */
const radius = () => Math.max(1, (byId("brush-size").value / 100) * (longer() / 4));

// -- drawing

function draw() {
  frame ||= requestAnimationFrame(() => {
    frame = 0;
    if (dialog.open) render();
  });
}

function render() {
  screen.setTransform(1, 0, 0, 1, 0, 0);
  screen.clearRect(0, 0, canvas.width, canvas.height);
  screen.setTransform(view.scale, 0, 0, view.scale, view.x, view.y);
  screen.imageSmoothingEnabled = view.scale < 4;
  screen.drawImage(image, 0, 0);
  screen.globalAlpha = 0.85;
  screen.drawImage(checkered(painted), 0, 0);
  screen.globalAlpha = 1;
  for (const width of cursor && tool() !== "pan" ? [3, 1.5] : []) { // black around white
    screen.strokeStyle = width === 3 ? "#000" : "#fff";
    screen.lineWidth = (width * devicePixelRatio) / view.scale;
    screen.beginPath();
    screen.arc(cursor.x, cursor.y, radius(), 0, 2 * Math.PI);
    screen.stroke();
  }
  byId("zoom-fit").textContent = `${Math.round((100 * view.scale) / fittingScale())} %`;
  byId("mask-undo").disabled = undone.length === 0;
}

function paint(from, to, erase) {
  const context = painted.getContext("2d");
  context.globalCompositeOperation = erase ? "destination-out" : "source-over";
  context.lineCap = context.lineJoin = "round";
  context.lineWidth = 2 * radius();
  context.beginPath();
  context.moveTo(from.x, from.y);
  context.lineTo(to.x, to.y + 1e-3); // a line without length is not drawn
  context.stroke();
}

const pixels = () => painted.getContext("2d").getImageData(0, 0, painted.width, painted.height);
const remember = () => (undone = [...undone.slice(1 - MAX_UNDO), pixels()]);

function undo() {
  if (undone.length) painted.getContext("2d").putImageData(undone.pop(), 0, 0);
  draw();
}

function fill(operation) {
  remember();
  const context = painted.getContext("2d");
  context.globalCompositeOperation = operation;
  context.fillRect(0, 0, painted.width, painted.height);
  draw();
}

// -- zoom

const fittingScale = () => Math.min(canvas.width / image.width, canvas.height / image.height);

function fit() {
  const box = canvas.getBoundingClientRect();
  canvas.width = Math.max(1, box.width * devicePixelRatio);
  canvas.height = Math.max(1, box.height * devicePixelRatio);
  const scale = fittingScale();
  const centre = (side) => (canvas[side] - image[side] * scale) / 2;
  view = { scale, x: centre("width"), y: centre("height") };
  draw();
}

/** Zoom by a factor; the point of the canvas stays in place. */
function zoom(factor, x = canvas.width / 2, y = canvas.height / 2) {
  const fitting = fittingScale();
  const scale = Math.min(MAX_ZOOM * fitting, Math.max(fitting / 2, view.scale * factor));
  const ratio = scale / view.scale;
  view = { scale, x: x - (x - view.x) * ratio, y: y - (y - view.y) * ratio };
  draw();
}

// -- pointers

function onCanvas({ clientX, clientY }) {
  const { left, top } = canvas.getBoundingClientRect();
  return { x: (clientX - left) * devicePixelRatio, y: (clientY - top) * devicePixelRatio };
}

const onImage = ({ x, y }) => ({ x: (x - view.x) / view.scale, y: (y - view.y) / view.scale });

canvas.addEventListener("pointerdown", (event) => {
  canvas.setPointerCapture(event.pointerId);
  pointers.set(event.pointerId, onCanvas(event));
  keyboard = false;
  if (pointers.size > 1) { // a pinch; the stroke of the first finger was none
    if (stroke) undo();
    return (stroke = null);
  }
  if (tool() === "pan" || event.button === 1) return;
  remember();
  stroke = cursor = onImage(onCanvas(event));
  paint(stroke, stroke, tool() === "eraser" || event.button === 2);
  draw();
});

canvas.addEventListener("pointermove", (event) => {
  const point = onCanvas(event);
  const last = pointers.get(event.pointerId);
  cursor = onImage(point);
  if (stroke) {
    const moves = event.getCoalescedEvents?.() ?? [];
    for (const one of moves.length ? moves : [event]) {
      const next = onImage(onCanvas(one));
      paint(stroke, next, tool() === "eraser" || (event.buttons & 2) !== 0);
      stroke = next;
    }
  } else if (last && pointers.size === 2) {
    const [, other] = [...pointers].find(([id]) => id !== event.pointerId);
    const distance = (at) => Math.hypot(at.x - other.x, at.y - other.y) || 1;
    zoom(distance(point) / distance(last), (point.x + other.x) / 2, (point.y + other.y) / 2);
    view = { ...view, x: view.x + (point.x - last.x) / 2, y: view.y + (point.y - last.y) / 2 };
  } else if (last) {
    view = { ...view, x: view.x + point.x - last.x, y: view.y + point.y - last.y };
  }
  if (last) pointers.set(event.pointerId, point);
  draw();
});

for (const name of ["pointerup", "pointercancel", "pointerleave"]) {
  canvas.addEventListener(name, (event) => {
    if (name !== "pointerleave") pointers.delete(event.pointerId);
    if (pointers.size === 0) stroke = null;
    if (name === "pointerleave" && !keyboard) cursor = null;
    draw();
  });
}

canvas.addEventListener("contextmenu", (event) => event.preventDefault());
const onWheel = (event) => {
  event.preventDefault();
  const { x, y } = onCanvas(event);
  zoom(Math.exp(-event.deltaY / 400), x, y);
};
canvas.addEventListener("wheel", onWheel, { passive: false });

// -- keys and buttons

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const MOVES = { ...ARROWS, " ": [0, 0] };

canvas.addEventListener("keydown", (event) => {
  const move = MOVES[event.key];
  if (!move) return;
  event.preventDefault();
  keyboard = true;
  cursor ??= { x: image.width / 2, y: image.height / 2 };
  const step = longer() / (event.shiftKey ? 10 : 40);
  const moved = (value, by, end) => Math.min(end, Math.max(0, value + by * step));
  const { width, height } = image;
  cursor = { x: moved(cursor.x, move[0], width), y: moved(cursor.y, move[1], height) };
  if (event.key === " ") {
    remember();
    paint(cursor, cursor, tool() === "eraser");
  }
  draw();
});

dialog.addEventListener("keydown", (event) => {
  const size = byId("brush-size");
  const keys = {
    b: () => dialog.querySelector("[value=brush]").click(),
    e: () => dialog.querySelector("[value=eraser]").click(),
    "[": () => (size.valueAsNumber -= 5),
    "]": () => (size.valueAsNumber += 5),
    "+": () => zoom(1.5),
    "-": () => zoom(1 / 1.5),
    0: fit,
  };
  if ((event.ctrlKey || event.metaKey) && event.key === "z") undo();
  else if (!event.ctrlKey && !event.metaKey && keys[event.key]) keys[event.key]();
  else return;
  event.preventDefault();
  draw();
});

byId("zoom-in").onclick = () => zoom(1.5);
byId("zoom-out").onclick = () => zoom(1 / 1.5);
byId("zoom-fit").onclick = fit;
byId("mask-undo").onclick = undo;
byId("mask-invert").onclick = () => fill("source-out");
byId("mask-clear").onclick = () => fill("destination-out");
byId("brush-size").oninput = draw;
addEventListener("resize", () => dialog.open && fit());
dialog.addEventListener("close", () => finish(null));

byId("mask-done").onclick = async () => {
  if (!pixels().data.some((value, i) => i % 4 === 3 && value >= 128)) {
    return toast("Paint the part of the image that is to change");
  }
  finish(await maskPNG(painted));
  dialog.close();
};
