// Text and bars in elements. Knows `data-field` and what a write disturbs; does not know what the text says.

import { known } from "./format.js";

export const field = (root, name) => root.querySelector(`[data-field="${name}"]`);

// Project names and errors come from clients: text reaches the page through textContent alone.
export function put(root, name, text) {
  const element = field(root, name);
  // Unchanged text is left alone: a live region speaks, and a selection is lost, at every write.
  if (element.textContent !== text) element.textContent = text;
  return element;
}

export function putOrHide(root, name, text) {
  put(root, name, text ?? "").hidden = !text;
}

export function bar(root, name, value, max) {
  const element = field(root, name);
  // A progress element without a value claims that something is under way; unknown is no bar.
  element.hidden = !(known(value) && known(max) && max > 0);
  if (element.hidden) return element;
  element.max = max;
  element.value = value;
  return element;
}
