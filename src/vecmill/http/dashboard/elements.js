// Elements and their text. Knows what a write disturbs; does not know what the text says.

import { UNKNOWN, fullMoment, known, moment } from "./format.js";

/**
 * What is in an element: text, or other elements. Names and errors come from clients: they reach the page as text alone.
 * @typedef {string | Node | null | undefined | false | (string | Node | null | undefined | false)[]} Content
 */

/**
 * An element by its name, classes and field (`td.number@rate`), then its attributes if it has others (`onclick` is a
 * listener, true an attribute without a value), then what is in it.
 * @param {string} name
 * @param {...(Content | Record<string, unknown>)} rest
 * @returns {any}
 */
export function h(name, ...rest) {
  const [selector = "", fieldName] = name.split("@");
  const [tag = "", ...classes] = selector.split(".");
  const element = document.createElement(tag);
  if (classes.length > 0) element.className = classes.join(" ");
  if (fieldName) element.dataset.field = fieldName;
  for (const [key, value] of Object.entries(rest[0]?.constructor === Object ? (rest.shift() ?? {}) : {})) {
    if (key === "onclick" || key === "onchange") element.addEventListener(key.slice(2), value);
    else if (value === true || known(value) || typeof value === "string") element.setAttribute(key, value === true ? "" : `${value}`);
  }
  element.append(...nodes(/** @type {Content[]} */ (rest)));
  return element;
}

/** The head of a table, a column's words and classes as `Rate.number.wide`. @param {...string} columns */
export const heads = (...columns) => h("thead", h("tr", columns.map((column) => {
  const [words = "", ...classes] = column.split(".");
  return h(["th", ...classes].join("."), { scope: "col" }, words);
})));

/** @param {Content[]} content */
const nodes = (content) => /** @type {(string | Node)[]} */ (content.flat(2).filter((part) => typeof part === "object" ? part !== null : part));

/** @param {string} id @returns {any} typed by whoever knows it */
export function byId(id) {
  const element = document.getElementById(id);
  if (element === null) throw new Error(`index.html has no #${id}`);
  return element;
}

/** @param {ParentNode} root @param {string} name @returns {any} */
export function field(root, name) {
  const element = root.querySelector(`[data-field="${name}"]`);
  if (element === null) throw new Error(`no field ${name}`);
  return element;
}

/**
 * Unchanged text is left alone: a live region speaks, and a selection is lost, at every write.
 * @param {Element} element @param {string} text
 */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** @param {ParentNode} root @param {string} name @param {string} text */
export const put = (root, name, text) => setText(field(root, name), text);

/** Shown if there is something to show. @param {Element & { hidden: boolean }} element @param {string | null | undefined | false} text */
export function setOrHide(element, text) {
  setText(element, text || "");
  element.hidden = !text;
}

/**
 * What is in an element, anew only if it differs: `key` tells one content from another.
 * @param {Element} element @param {string} key @param {() => Content} make
 */
export function refill(element, key, make) {
  if (contents.get(element) === key) return;
  contents.set(element, key);
  element.replaceChildren(...nodes([make()]));
}

/** @type {WeakMap<Element, string>} */
const contents = new WeakMap();

/** A point in time, for eyes and for programs. @param {unknown} seconds since 1970 */
export function time(seconds) {
  if (!known(seconds)) return UNKNOWN;
  const iso = new Date(seconds * 1000).toISOString();
  return h("time", { datetime: iso, title: fullMoment(seconds) }, moment(seconds));
}

/**
 * A list that follows the server's. Rows are kept, not made anew: a new button has lost the focus and swallows clicks.
 * @template T
 * @param {Element} list
 * @param {T[]} items
 * @param {(item: T) => string} keyOf
 * @param {() => Element} make a row without content
 * @param {(row: any, item: T) => void} fill
 */
export function showRows(list, items, keyOf, make, fill) {
  const rows = new Map([...list.children].map((row) => [/** @type {HTMLElement} */ (row).dataset.key, row]));
  const keys = new Set(items.map(keyOf));
  for (const [key, row] of rows) if (key === undefined || !keys.has(key)) leave(list, row);
  items.forEach((item, index) => {
    const key = keyOf(item);
    const row = rows.get(key) ?? make();
    /** @type {HTMLElement} */ (row).dataset.key = key;
    fill(row, item);
    if (list.children[index] !== row) list.insertBefore(row, list.children[index] ?? null);
  });
}

/** Whoever was at a row that goes must not be thrown back to the top of the page. @param {Element} list @param {Element} row */
function leave(list, row) {
  if (row.contains(document.activeElement)) goTo(list);
  row.remove();
}

/** Keep the place of whoever was in a section: at its heading. @param {Element} inside */
export function goTo(inside) {
  const heading = inside.closest("section")?.querySelector("h2");
  if (heading) heading.tabIndex = -1;
  heading?.focus();
}

/**
 * A progress bar. Without a value it would claim that something is under way; unknown is no bar.
 * @param {HTMLProgressElement} bar @param {unknown} value @param {unknown} max @param {string} label
 */
export function setBar(bar, value, max, label) {
  bar.hidden = !(known(value) && known(max) && max > 0);
  if (bar.hidden) return;
  bar.max = /** @type {number} */ (max);
  bar.value = /** @type {number} */ (value);
  if (bar.getAttribute("aria-label") !== label) bar.setAttribute("aria-label", label);
}

const NO_NAME = "(no name)";

/** A name, or that there is none: also if nothing of it can be seen. @param {string | null | undefined} name */
export const named = (name) => (isVisible(name) ? /** @type {string} */ (name) : NO_NAME);

/** Controls, zero-width characters and blanks cannot be seen. @param {string | null | undefined} name */
const isVisible = (name) => /[^\s\p{C}\p{Zl}\p{Zp}\u115f\u1160\u2800\u3164\uffa0]/u.test(name ?? "");

/** @param {Element} element @param {string | null | undefined} name */
export function setName(element, name) {
  setText(element, named(name));
  element.classList.toggle("nameless", !isVisible(name));
}

/** The nearest element around what an event is about. @param {Event} event @param {string} selector @returns {any} */
export const around = (event, selector) => /** @type {Element} */ (event.target).closest(selector);

// What has just happened, for everyone who cannot see the row that changed.

/** @param {string} text */
export function tell(text) {
  note(text, "note");
}

/** What went wrong stays until it is closed. @param {string} text */
function complain(text) {
  note(text, "note.problem");
}

const TOLD_MS = 8000;

/**
 * Does what may fail; if it does, people are told.
 * @template T
 * @param {string} failed what it means, as the beginning of a sentence
 * @param {() => Promise<T>} work
 * @returns {Promise<T | undefined>}
 */
export async function attempt(failed, work) {
  try {
    return await work();
  } catch (error) {
    complain(`${failed}: ${/** @type {Error} */ (error).message}`);
    return undefined;
  }
}

/** @param {string} text @param {string} kind */
function note(text, kind) {
  const close = h("button.plain", { type: "button", "aria-label": "Close this message", onclick: () => line.remove() }, "×");
  const line = h(`p.${kind}`, h("span", { dir: "auto" }, text), close);
  const notes = byId("notes");
  while (notes.children.length > 2) notes.firstElementChild?.remove();
  notes.append(line);
  if (kind === "note") setTimeout(() => line.remove(), TOLD_MS);
}

/**
 * Asks before something is done that cannot be undone.
 * @param {string} title @param {string} text @param {string} action the button's words
 * @returns {Promise<boolean>}
 */
export function ask(title, text, action) {
  const dialog = byId("confirm");
  put(dialog, "confirm-title", title);
  put(dialog, "confirm-text", text);
  put(dialog, "confirm-action", action);
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) =>
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true }),
  );
}

/**
 * A button that copies what `text` gives at that moment.
 * @param {() => string} text @param {string} label
 */
export function copyButton(text, label) {
  const button = h("button", { type: "button", "aria-label": label }, "Copy");
  button.addEventListener("click", async () => {
    const done = await copy(text());
    setText(button, done ? "Copied" : "Not copied");
    if (!done) complain("The browser did not let the page copy. Select the text and copy it.");
    setTimeout(() => setText(button, "Copy"), 2000);
  });
  return button;
}

/** @param {string} text */
async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copyBySelection(text); // over plain HTTP a browser gives no clipboard but to localhost
  }
}

/** @param {string} text */
function copyBySelection(text) {
  const before = /** @type {HTMLElement | null} */ (document.activeElement);
  const area = h("textarea.offscreen", { "aria-hidden": "true" });
  area.value = text;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  before?.focus();
  return done;
}
