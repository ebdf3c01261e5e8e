// What is said of a batch, its file's way up and its answers' way down. Knows the fields of /v1/batches and /v1/files.

/** @import { Batch, Page, Query } from "./types" */

import { attempt, byId, field, h, named, put, setText, tell, time } from "./elements.js";
import { bytes, count, duration, join, known, percent, plural, rate, unit, words } from "./format.js";
import { call } from "./server.js";
import { WorkTable, showDetail } from "./worktable.js";

const CANCELLABLE = new Set(["validating", "in_progress"]);
const RUNNING = new Set([...CANCELLABLE, "finalizing", "cancelling"]);
const TRANSFER_MS = 3_600_000; // a large file takes its time
const FIRST_LINE_BYTES = 65_536;

const nameOf = (/** @type {Batch} */ batch) => batch.name ?? batch.metadata?.name ?? batch.id;

/** @param {Batch} batch */
function factsOf(batch) {
  const { total, completed, failed } = batch.request_counts;
  const isRunning = RUNNING.has(batch.status);
  const done = completed + failed;
  const first = batch.errors?.data?.[0];
  return {
    name: nameOf(batch),
    about: [batch.endpoint, " · ", time(batch.created_at)],
    progress: join([
      total > 0 && `${count(done)} of ${plural(total, "line")}`,
      total > 0 && isRunning && percent((100 * done) / total),
      failed > 0 && `${count(failed)} failed`,
    ]),
    done: isRunning ? done : null,
    total,
    warning: null,
    problem: first && (first.line ? `line ${count(first.line)}: ` : "") + first.message,
    rate: isRunning ? unit(rate(batch.lines_per_second), "lines/s") : "",
    left: isRunning ? duration(batch.eta_seconds) : "",
    isOpen: CANCELLABLE.has(batch.status),
  };
}

/** @param {any} cell @param {Batch} batch @param {string} name */
function fillFiles(cell, batch, name) {
  if (!cell.firstChild) {
    const button = (/** @type {string} */ text) => h("button", { type: "button", "data-action": text.toLowerCase() }, text);
    cell.append(button("Output"), button("Errors"), h("span.quiet.line"));
  }
  const [output, errors, size] = cell.children;
  output.hidden = !batch.output_file_id;
  errors.hidden = !batch.error_file_id;
  output.setAttribute("aria-label", `Output of ${name}`);
  errors.setAttribute("aria-label", `Errors of ${name}`);
  setText(size, batch.output_file_id && known(batch.output_bytes) ? bytes(batch.output_bytes) : unit(bytes(batch.input_bytes), "in"));
}

/** @param {Batch} batch */
const showBatch = (batch) =>
  showDetail(nameOf(batch), [
    ["State", words(batch.status)],
    ["Errors", batch.errors && h("ul", batch.errors.data.slice(0, 20).map((error) => h("li", error.line ? `line ${count(error.line)}: ` : "", error.message)))],
    ["Endpoint", batch.endpoint],
    ["Model", batch.model],
    ["Key", batch.key],
    ["Progress", factsOf(batch).progress],
    ["Tokens", batch.usage && count(batch.usage.total_tokens)],
    ["Input", known(batch.input_bytes) && bytes(batch.input_bytes)],
    ["Output", known(batch.output_bytes) && bytes(batch.output_bytes)],
    ["Created", time(batch.created_at)],
    ["Completed", known(batch.completed_at) && time(batch.completed_at)],
    ["Id", h("code", batch.id)],
  ]);

/** @type {WorkTable<Batch>} */
const table = new WorkTable({
  list: "batches",
  noun: "batch",
  factsOf,
  first: "Name",
  extraHead: "Files",
  extra: "td.files",
  fillExtra: fillFiles,
  empty: () => [h("p", "No batches."), h("p", "Upload a JSONL file of requests: the server works through it while nobody waits for answers.")],
  cancel: ["POST", (batch) => `v1/batches/${encodeURIComponent(batch.id)}/cancel`],
  whatStays: "What is done stays and can be downloaded; the other lines are not worked on.",
  act: (action, batch) => (action === "detail" ? showBatch(batch) : download(batch, action)),
});

/** @param {Page<Batch> | null | undefined} batches */
export const showBatches = (batches) => table.show(batches);

/** @returns {Pick<Query, "batches_page">} */
export const batchesQuery = () => ({ batches_page: table.page });

/** A link cannot send the key: the file is fetched, and saved from here. @param {Batch} batch @param {string} kind */
async function download(batch, kind) {
  const id = kind === "output" ? batch.output_file_id : batch.error_file_id;
  await attempt(`The ${kind} of ${named(nameOf(batch))} did not come`, async () => {
    const answer = await call("GET", `v1/files/${encodeURIComponent(id ?? "")}/content`, undefined, TRANSFER_MS);
    const url = URL.createObjectURL(await answer.blob());
    h("a", { href: url, download: `${batch.id}-${kind}.jsonl` }).click();
    setTimeout(() => URL.revokeObjectURL(url), 60_000);
  });
}

// The upload

const dialog = byId("upload");
const form = dialog.querySelector("form");

/** The endpoint that the file's own first line names. */
async function lookAtFile() {
  const [file] = form.elements.file.files;
  if (!file) return;
  try {
    const head = await file.slice(0, FIRST_LINE_BYTES).text();
    const { url } = JSON.parse(head.split("\n", 1)[0]);
    if ([...form.elements.endpoint.options].some((option) => option.value === url)) form.elements.endpoint.value = url;
  } catch {
    // the server says what is wrong with it
  }
}

/** @param {File} file */
async function send(file) {
  const sent = new FormData();
  sent.append("purpose", "batch");
  sent.append("file", file);
  const { id } = await (await call("POST", "v1/files", sent, TRANSFER_MS)).json();
  const name = form.elements.name.value.trim() || file.name;
  await call("POST", "v1/batches", {
    input_file_id: id,
    endpoint: form.elements.endpoint.value,
    completion_window: "24h",
    metadata: { name: name.slice(0, 512) },
  });
  form.reset();
  dialog.close();
  tell(`${named(name)} is uploaded and begins.`);
  table.turnTo(1);
}

/** @param {Event} event */
async function upload(event) {
  event.preventDefault();
  const [file] = form.elements.file.files;
  const start = field(dialog, "upload-start");
  const problem = field(dialog, "upload-problem");
  start.disabled = true;
  problem.classList.remove("problem");
  put(dialog, "upload-problem", `Uploading ${bytes(file.size)}…`);
  try {
    await send(file);
    put(dialog, "upload-problem", "");
  } catch (error) {
    problem.classList.add("problem");
    put(dialog, "upload-problem", `This did not work: ${/** @type {Error} */ (error).message}`);
  } finally {
    start.disabled = false;
  }
}

/** @param {() => void} then called when something else is asked for, or has been done */
export function watchBatches(then) {
  table.askAgain = then;
  byId("upload-open").addEventListener("click", () => dialog.showModal());
  field(dialog, "upload-close").addEventListener("click", () => dialog.close());
  form.elements.file.addEventListener("change", lookAtFile);
  form.addEventListener("submit", upload);
}
