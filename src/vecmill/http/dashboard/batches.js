// The list of batches and their buttons. Knows the field names of /v1/batches and how a batch is cancelled.

import { bar, field, put, putOrHide } from "./elements.js";
import { clock, count, percent, plural } from "./format.js";
import { call, keepPlace, showRows } from "./rows.js";

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

const keepOnPage = (leaving) => keepPlace(leaving, "batches-heading");

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
  if (hide) keepOnPage(cancel);
  cancel.hidden = hide;
  cancel.setAttribute("aria-label", `Cancel ${nameOf(batch)}`);
}

const NO_BATCHES = "No batches. A client that creates one with POST /v1/batches is shown here with its progress.";

export function showBatches(answer) {
  const batches = answer?.data ?? [];
  const list = document.querySelector("[data-batches]");
  showRows(list, "batch", batches, fillBatch, keepOnPage);
  list.hidden = batches.length === 0;
  const none = answer ? NO_BATCHES : "The list of batches is not available.";
  putOrHide(document, "no-batches", batches.length === 0 ? none : null);
}

// `then` is called once a request is over, whatever came of it.
export function watchBatchButtons(then) {
  document.addEventListener("click", (event) => {
    const button = event.target.closest("[data-action=cancel-batch]");
    if (!button) return;
    const row = button.closest("li");
    const path = `v1/batches/${encodeURIComponent(row.dataset.id)}/cancel`;
    call("POST", path, `Cancelling ${field(row, "name").textContent}`, "batch-problem", then);
  });
}
