// The lists of jobs and their buttons. Knows the field names of /jobs and how a job is cancelled.

import { bar, field, put, putOrHide } from "./elements.js";
import { clock, count, duration, known, percent, plural, rate } from "./format.js";
import { call, keepPlace, showRows } from "./rows.js";

const join = (parts) => parts.filter(Boolean).join(" · ");
const chunks = (job) => `${count(job.current)} of ${plural(job.total_chunks, "chunk")}`;
const sentBy = (job) => job.instance_id && `from ${job.instance_id}`;

const DETAILS = {
  active: (job) =>
    join([
      chunks(job),
      `${rate(job.chunks_per_second)} chunks/s`,
      `${duration(job.elapsed_seconds)} so far`,
      `${duration(job.eta_seconds)} left`,
      sentBy(job),
    ]),
  queued: (job) =>
    join([
      `position ${count(job.position)}`,
      `${plural(job.chunks_ahead, "chunk")} ahead`,
      `starts in about ${duration(job.estimated_wait)}`,
      plural(job.total_chunks, "chunk"),
      sentBy(job),
    ]),
  recent: (job) =>
    join([
      chunks(job),
      `took ${duration(job.duration_seconds)}`,
      known(job.completed_at) && `ended ${clock(new Date(job.completed_at * 1000))}`,
      sentBy(job),
    ]),
};

function fillJob(row, job, kind) {
  row.dataset.status = job.status;
  put(row, "project", job.project);
  put(row, "status", job.status);
  put(row, "details", DETAILS[kind](job));
  putOrHide(row, "error", job.error);
  field(row, "progress-line").hidden = kind !== "active";
  bar(row, "progress", job.current, job.total_chunks).setAttribute("aria-label", `Progress of ${job.project}`);
  put(row, "percent", percent(job.percent));
  const cancel = row.querySelector("[data-action=cancel]");
  cancel.hidden = kind === "recent";
  cancel.setAttribute("aria-label", `Cancel ${job.project}`);
}

const keepOnPage = (leaving) => keepPlace(leaving, "jobs-heading");

function showList(kind, jobs) {
  const block = document.querySelector(`[data-jobs="${kind}"]`);
  showRows(block.querySelector("ul"), "job", jobs, (row, job) => fillJob(row, job, kind), keepOnPage);
  if (jobs.length === 0) keepOnPage(block);
  block.hidden = jobs.length === 0;
}

const NO_JOBS = "No jobs. A client that registers one with POST /jobs is shown here with its progress.";

export function showJobs(jobs) {
  const lists = ["active", "queued", "recent"].map((kind) => [kind, jobs?.[kind] ?? []]);
  for (const [kind, list] of lists) showList(kind, list);
  const empty = lists.every(([, list]) => list.length === 0);
  putOrHide(document, "no-jobs", empty ? (jobs ? NO_JOBS : "The list of jobs is not available.") : null);
  const workers = jobs?.workers;
  const past = jobs?.historical_rate;
  const busy = workers && `${count(workers.busy)} of ${count(workers.max)} places taken`;
  put(document, "workers", join([busy, known(past) && `${rate(past)} chunks/s lately`]));
}

const remove = (path, what, then) => call("DELETE", path, what, "job-problem", then);

// `then` is called once a request is over, whatever came of it.
export function watchButtons(then) {
  document.addEventListener("click", (event) => {
    const action = event.target.closest("[data-action]")?.dataset.action;
    if (action === "clear-recent") remove("jobs/recent", "Clearing the recent jobs", then);
    if (action === "cancel") {
      const row = event.target.closest("li");
      const project = field(row, "project").textContent;
      remove(`jobs/${encodeURIComponent(row.dataset.id)}`, `Cancelling ${project}`, then);
    }
  });
}
