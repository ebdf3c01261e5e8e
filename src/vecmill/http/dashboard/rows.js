// A list of rows that follows what the service says, and the calls of their buttons. Knows neither jobs nor batches.

import { putOrHide } from "./elements.js";
import { fetchWithKey } from "./key.js";
import { TIMEOUT_MS } from "./service.js";

function newRow(template, id) {
  const row = document.getElementById(template).content.firstElementChild.cloneNode(true);
  row.dataset.id = id;
  return row;
}

// Rows are kept from poll to poll, not rebuilt: a rebuilt button loses its focus and swallows clicks. `leaving` is told
// of each row before it goes.
export function showRows(list, template, items, fill, leaving) {
  const ids = new Set(items.map((item) => item.id));
  for (const row of [...list.children].filter((row) => !ids.has(row.dataset.id))) {
    leaving(row);
    row.remove();
  }
  const rows = new Map([...list.children].map((row) => [row.dataset.id, row]));
  items.forEach((item, index) => {
    const row = rows.get(item.id) ?? newRow(template, item.id);
    fill(row, item);
    if (list.children[index] !== row) list.insertBefore(row, list.children[index] ?? null);
  });
}

// Whoever has just pressed a button that now goes away must not be thrown back to the top of the page.
export function keepPlace(leaving, heading) {
  if (leaving.contains(document.activeElement)) document.getElementById(heading).focus();
}

const underWay = new Set();

// A call that is not made again while it is under way; what goes wrong is told in the field `problem`. `then` is called
// once it is over, whatever came of it.
export async function call(method, path, what, problem, then) {
  if (underWay.has(path)) return;
  underWay.add(path);
  putOrHide(document, problem, null);
  try {
    const answer = await fetchWithKey(path, { method, signal: AbortSignal.timeout(TIMEOUT_MS) });
    if (!answer.ok) putOrHide(document, problem, `${what} was refused (HTTP ${answer.status}).`);
  } catch {
    putOrHide(document, problem, `${what} did not get through: the service is not reachable.`);
  } finally {
    underWay.delete(path);
  }
  then();
}
