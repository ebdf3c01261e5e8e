// What is said of a job, which jobs are asked for, and how those that ended are forgotten. Knows the fields of a job.

/** @import { Job, Page, Query } from "./types" */

import { ask, attempt, byId, goTo, h, refill, setText, time } from "./elements.js";
import { count, duration, join, known, percent, plural, rate, unit, words } from "./format.js";
import { call } from "./server.js";
import { WorkTable, showDetail } from "./worktable.js";

const OPEN = new Set(["active", "queued"]);
const SILENT_FROM_S = 15; // a client that works reports more often
const SEARCH_AFTER_MS = 300;

const search = byId("jobs-q");
const state = byId("jobs-state");

/** @param {Job} job */
function progressOf(job) {
  if (job.status === "queued") {
    const start = known(job.estimated_wait) && `starts in about ${duration(job.estimated_wait)}`;
    return join([known(job.position) && `position ${count(job.position)}`, plural(job.total_chunks, "chunk"), start]);
  }
  const took = known(job.duration_seconds) && `${known(job.started_at) ? "took" : "waited"} ${duration(job.duration_seconds)}`;
  return join([`${count(job.current)} of ${plural(job.total_chunks, "chunk")}`, known(job.percent) && percent(job.percent), took]);
}

/** What is about to become of a job whose client does not report. @param {Job} job */
function silenceOf({ status, silent_seconds: silent, given_up_in_seconds: left }) {
  if (!OPEN.has(status) || !known(silent) || silent < SILENT_FROM_S) return null;
  return `silent for ${duration(silent)}${known(left) ? `, given up in ${duration(left)}` : ""}`;
}

/** @param {Job} job */
const factsOf = (job) => ({
  name: job.project,
  about: job.instance_id,
  progress: progressOf(job),
  done: job.status === "active" ? job.current : null,
  total: job.total_chunks,
  warning: silenceOf(job),
  problem: job.error,
  rate: job.status === "active" ? unit(rate(job.texts_per_second), "texts/s") : "",
  left: job.status === "active" ? duration(job.eta_seconds) : "",
  isOpen: OPEN.has(job.status),
});

/** Told of the job as it was when it was opened, and anew with each snapshot. @param {Job} job */
function detailsOf(job) {
  const { warning, rate, left } = factsOf(job);
  const waits = job.status === "queued" && known(job.chunks_ahead) && `for ${plural(job.chunks_ahead, "chunk")} of other jobs`;
  showDetail(job.project, [
    ["State", words(job.status)],
    ["Error", job.error],
    ["Client", job.instance_id],
    ["Key", job.key],
    ["Last seen at", job.replica],
    ["Progress", progressOf(job)],
    ["Silence", warning],
    ["Rate", rate],
    ["Time left", left],
    ["Waits", waits],
    ["Waited", known(job.waiting_seconds) && duration(job.waiting_seconds)],
    ["Registered", time(job.created_at)],
    ["Began", known(job.started_at) && time(job.started_at)],
    ["Ended", known(job.completed_at) && time(job.completed_at)],
    ["Id", h("code", job.id)],
  ]);
}

/** @type {string | null} */
let inDetail = null;

/** @param {string} kind */
function empty(kind) {
  if (kind === "none found") return [h("p", "No job is like this."), h("button", { type: "button", onclick: showAll }, "Show all jobs")];
  const how = h("a", { href: "#playground" }, "How to connect it");
  return [h("p", "No jobs."), h("p", "CodeCartographer registers one for each index it builds; it is shown here with its progress. ", how)];
}

/** @type {WorkTable<Job>} */
const table = new WorkTable({
  list: "jobs",
  noun: "job",
  factsOf,
  first: "Project",
  extraHead: "Began.wide.roomy",
  extra: "td.quiet.wide.roomy",
  fillExtra: (cell, job) => {
    const waits = job.status === "queued" && `waiting for ${duration(job.waiting_seconds)}`;
    refill(cell, waits || `${job.started_at}`, () => waits || time(job.started_at));
  },
  empty,
  isChosen: () => Boolean(search.value || state.value),
  cancel: ["DELETE", (job) => `jobs/${encodeURIComponent(job.id)}`],
  whatStays: "Its client finds it failed, with the error “cancelled”. What is computed stays in the cache.",
  act: (_, job) => {
    inDetail = job.id;
    detailsOf(job);
  },
});

/** @param {Page<Job> | null | undefined} jobs */
export function showJobs(jobs) {
  table.show(jobs);
  const counts = jobs?.counts ?? {};
  for (const option of state.options) {
    const all = (option.dataset.words ??= option.textContent);
    setText(option, known(counts[option.value]) ? `${all} (${count(counts[option.value])})` : all);
  }
  byId("clear-ended").disabled = !(counts.completed || counts.failed);
  const job = table.shown.get(inDetail ?? "");
  if (job !== undefined && byId("detail").open) detailsOf(job);
}

function showAll() {
  search.value = state.value = "";
  search.focus();
  table.turnTo(1);
}

/** @returns {Pick<Query, "jobs_q" | "jobs_state" | "jobs_page">} */
export const jobsQuery = () => ({ jobs_q: search.value.trim(), jobs_state: state.value, jobs_page: table.page });

async function clearEnded() {
  if (!(await ask("Forget the ended jobs?", "Completed and failed jobs leave the list for good.", "Forget them"))) return;
  await attempt("The ended jobs were not forgotten", () => call("DELETE", "jobs/recent"));
  goTo(state);
  table.turnTo(1);
}

/** @param {() => void} then called when something else is asked for, or has been done */
export function watchJobs(then) {
  table.askAgain = then;
  let typing = 0;
  search.addEventListener("input", () => {
    clearTimeout(typing);
    typing = setTimeout(() => table.turnTo(1), SEARCH_AFTER_MS);
  });
  state.addEventListener("change", () => table.turnTo(1));
  byId("clear-ended").addEventListener("click", clearEnded);
  byId("detail").addEventListener("close", () => (inDetail = null));
}
