/** Small helpers for the document: elements, icons, messages, files. */

/** Return the element with this id. */
export const byId = (id) => document.getElementById(id);

const ICONS = {
  left: "M15 5l-7 7 7 7",
  right: "M9 5l7 7-7 7",
  close: "M6 6l12 12M18 6L6 18",
  plus: "M12 5v14M5 12h14",
  minus: "M5 12h14",
  undo: "M8 5L4 9l4 4M4 9h10a6 6 0 010 12h-3",
  trash: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13",
  reuse: "M4 12h12M11 6l6 6-6 6M20 5v14",
  image: "M4 5h16v14H4zM4 16l5-5 4 4 3-3 4 4M15.5 9h.01",
};

/** Draw an icon. */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

/**
 * Create an element.
 * @param {string} tag such as "button" or "button.quiet"
 * @param {...(Object|Node|string)} parts children, after properties to set if the first is a plain
 * object; properties with a dash in their name become attributes
 */
export function el(tag, ...parts) {
  const [name, ...classes] = tag.split(".");
  const properties = parts[0]?.constructor === Object ? parts.shift() : {};
  const element = document.createElement(name);
  element.classList.add(...classes);
  if (name === "button") element.type = "button";
  for (const [key, value] of Object.entries(properties)) {
    if (key.includes("-") || key === "role") element.setAttribute(key, value);
    else element[key] = value;
  }
  element.append(...parts);
  return element;
}

/** Create a button with an icon only. */
export const iconButton = (name, label, onclick) =>
  el("button.icon", { "aria-label": label, title: label, onclick }, icon(name));

/** Put icons into the buttons of the document, and close dialogs by their buttons and backdrops. */
export function prepareDocument() {
  for (const button of document.querySelectorAll("[data-icon]")) {
    button.append(icon(button.dataset.icon));
    button.title = button.getAttribute("aria-label");
  }
  for (const dialog of document.querySelectorAll("dialog")) {
    dialog.addEventListener("click", (event) => {
      if (event.target === dialog || event.target.closest("[data-close]")) dialog.close();
    });
  }
}

let toastTimer = 0;

/** Show a message for some seconds, with a button if there is something to undo. */
export function toast(message, action = null, onaction = null) {
  const box = byId("toast");
  const button = action && el("button.quiet", { onclick: () => (onaction(), hide()) }, action);
  const hide = () => box.hidePopover();
  hide();
  box.showPopover(); // above dialogs
  box.replaceChildren(message, ...(button ? [button] : []));
  clearTimeout(toastTimer);
  toastTimer = setTimeout(hide, action ? 8000 : 3000);
}

/** Show an error below a field; an empty message removes it. */
export function showError(field, message) {
  const place = byId(`${field}-error`) ?? byId("form-error");
  place.textContent = message;
  document.getElementById(field)?.toggleAttribute("aria-invalid", Boolean(message));
  if (message) place.closest("details")?.setAttribute("open", "");
}

/** Remove all errors of a form. */
export function clearErrors(form) {
  for (const place of form.querySelectorAll(".error")) place.textContent = "";
  for (const one of form.querySelectorAll("[aria-invalid]")) one.removeAttribute("aria-invalid");
}

const urls = new WeakMap();

/** Return the object URL of a blob, which is made once. */
export function blobURL(blob) {
  if (!urls.has(blob)) urls.set(blob, URL.createObjectURL(blob));
  return urls.get(blob);
}

/** Ask for an image file; null if there is none. */
export function chooseFile(accept = "image/png,image/jpeg,image/webp") {
  const input = el("input", { type: "file", accept });
  return new Promise((resolve) => {
    input.onchange = () => resolve(input.files[0] ?? null);
    input.oncancel = () => resolve(null);
    input.click();
  });
}

/** Save a blob as a file. */
export const download = (blob, name) => el("a", { href: blobURL(blob), download: name }).click();

export async function copy(text, what) {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // no secure context
    const area = el("textarea", { value: text });
    (document.querySelector("dialog[open]") ?? document.body).append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  toast(`Copied ${what}`);
}
