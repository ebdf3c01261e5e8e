// The list of batches and their buttons. Knows the field names of /v1/batches and how a batch is cancelled.

import { bar, field, put, putOrHide } from "./elements.js";
import { clock, count, percent, plural } from "./format.js";
import { fetchWithKey } from "./key.js";
import { TIMEOUT_MS } from "./service.js";

const CANCELLABLE = new Set(["validating", "in_progress"]);
const RUNNING = new Set(["validating", "in_progress", "finalizing", "cancelling"]);

const nameOf = (batch) => batch.metadata?.name || batch.id;

function details(batch) {
  const { total, completed, failed } = batch.request_counts;
  const done = total > 0 && `${count(completed + failed)} of ${plural(total, "line")}`;
  const wrong = failed > 0 && `${count(failed)} failed`;
  const created = `created ${clock(new Date(batch.created_at * 1000))}`;
  const id = nameOf(batch) !== batch.id && batch.id;
  return [batch.endpoint, done, wrong, created, id].filter(Boolean).join(" · ");
}

function problem(batch) {
  const first = batch.errors?.data?.[0];
  if (!first) return null;
  return (first.line ? `line ${count(first.line)}: ` : "") + first.message;
}

function fillBatch(row, batch) {
  const { total, completed, failed } = batch.request_counts;
  row.dataset.status = batch.status;
  put(row, "name", nameOf(batch));
  put(row, "status", batch.status.replace("_", " "));
  put(row, "details", details(batch));
  putOrHide(row, "error", problem(batch));
  field(row, "progress-line").hidden = !RUNNING.has(batch.status) || total === 0;
  bar(row, "progress", completed + failed, total).setAttribute("aria-label", `Progress of ${nameOf(batch)}`);
  put(row, "percent", percent((100 * (completed + failed)) / total));
  const cancel = row.querySelector("[data-action=cancel-batch]");
  const hide = !CANCELLABLE.has(batch.status);
  // Whoever has just pressed a button that now goes away must not be thrown back to the top of the page.
  if (hide && cancel === document.activeElement) document.getElementById("batches-heading").focus();
  cancel.hidden = hide;
  cancel.setAttribute("aria-label", `Cancel ${nameOf(batch)}`);
}

function newRow(id) {
  const row = document.getElementById("batch").content.firstElementChild.cloneNode(true);
  row.dataset.id = id;
  return row;
}

const NO_BATCHES = "No batches. A client that creates one with POST /v1/batches is shown here with its progress.";

// Rows are kept from poll to poll, not rebuilt: a rebuilt button loses its focus and swallows clicks.
export function showBatches(answer) {
  const batches = answer?.data ?? [];
  const list = document.querySelector("[data-batches]");
  const ids = new Set(batches.map((batch) => batch.id));
  for (const row of [...list.children].filter((row) => !ids.has(row.dataset.id))) row.remove();
  const rows = new Map([...list.children].map((row) => [row.dataset.id, row]));
  batches.forEach((batch, index) => {
    const row = rows.get(batch.id) ?? newRow(batch.id);
    fillBatch(row, batch);
    if (list.children[index] !== row) list.insertBefore(row, list.children[index] ?? null);
  });
  list.hidden = batches.length === 0;
  const none = answer ? NO_BATCHES : "The list of batches is not available.";
  putOrHide(document, "no-batches", batches.length === 0 ? none : null);
}

const underWay = new Set();

async function cancel(id, name) {
  if (underWay.has(id)) return;
  underWay.add(id);
  putOrHide(document, "batch-problem", null);
  try {
    const options = { method: "POST", signal: AbortSignal.timeout(TIMEOUT_MS) };
    const answer = await fetchWithKey(`v1/batches/${encodeURIComponent(id)}/cancel`, options);
    if (!answer.ok) putOrHide(document, "batch-problem", `Cancelling ${name} was refused (HTTP ${answer.status}).`);
  } catch {
    putOrHide(document, "batch-problem", `Cancelling ${name} did not get through: the service is not reachable.`);
  } finally {
    underWay.delete(id);
  }
}

// `then` is called once a request is over, whatever came of it.
export function watchBatchButtons(then) {
  document.addEventListener("click", async (event) => {
    const button = event.target.closest("[data-action=cancel-batch]");
    if (!button) return;
    const row = button.closest("li");
    await cancel(row.dataset.id, field(row, "name").textContent);
    then();
  });
}
