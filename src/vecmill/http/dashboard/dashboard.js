/*
 * Shows /health, /stats and /jobs, asked for once a second.
 *
 * Knows the field names of those three answers and how to draw them. Does not know how any number is
 * come by, and computes none that the service could state itself. Project names and errors come from
 * clients: text reaches the page through textContent alone.
 */

const POLL_MS = 1000;
const TIMEOUT_MS = 5000;
const HISTORY_MS = 5 * 60 * 1000;
// Samples further apart than the slowest answer explains were not taken (page hidden, service away):
// the line is broken there, because a straight line would claim to know what happened between.
const GAP_MS = 2 * (POLL_MS + TIMEOUT_MS);
const CHART_WIDTH = 300;
const CHART_HEIGHT = 60;

const UNKNOWN = "–"; // not available is not zero

/* Numbers as text */

const known = (value) => typeof value === "number" && Number.isFinite(value);
const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const tenths = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });

const count = (value) => (known(value) ? whole.format(value) : UNKNOWN);
const rate = (value) => (known(value) ? (value < 100 ? tenths : whole).format(value) : UNKNOWN);
// Rounded down: unfinished work must not read as 100 %.
const percent = (value) => (known(value) ? `${whole.format(Math.floor(value))} %` : UNKNOWN);
const plural = (value, noun) => `${count(value)} ${noun}${value === 1 ? "" : "s"}`;

function milliseconds(value) {
  if (!known(value)) return UNKNOWN;
  return value < 1000 ? `${rate(value)} ms` : `${tenths.format(value / 1000)} s`;
}

function memory(mebibytes) {
  if (!known(mebibytes)) return UNKNOWN;
  return mebibytes < 1024 ? `${count(mebibytes)} MiB` : `${tenths.format(mebibytes / 1024)} GiB`;
}

function duration(seconds) {
  if (!known(seconds)) return UNKNOWN;
  if (seconds < 10) return `${tenths.format(seconds)} s`;
  const s = Math.round(seconds);
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${s % 60} s`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
}

const clock = (date) => date.toLocaleTimeString();

/* Putting text and bars on the page */

const field = (root, name) => root.querySelector(`[data-field="${name}"]`);

function put(root, name, text) {
  const element = field(root, name);
  // Unchanged text is left alone: a live region speaks, and a selection is lost, at every write.
  if (element.textContent !== text) element.textContent = text;
  return element;
}

function putOrHide(root, name, text) {
  put(root, name, text ?? "").hidden = !text;
}

function bar(root, name, value, max) {
  const element = field(root, name);
  // A progress element without a value claims that something is under way; unknown is no bar.
  element.hidden = !(known(value) && known(max) && max > 0);
  if (element.hidden) return element;
  element.max = max;
  element.value = value;
  return element;
}

/* Status and facts */

const STATES = { ok: "Ready", loading: "Loading", failed: "Failed" };

function showStatus(health) {
  document.body.dataset.state = health.status;
  put(document, "state", STATES[health.status] ?? health.status);
  const ready = health.status === "ok";
  put(document, "message", ready ? "" : (health.message ?? ""));
  field(document, "loading").hidden = health.status !== "loading";
  bar(document, "loading-bar", health.percent, 100);
  put(document, "loading-percent", percent(health.percent));
  field(document, "last-answer").hidden = true;
}

function showUnreachable(lastAnswer) {
  document.body.dataset.state = "unreachable";
  put(document, "state", "Not reachable, retrying");
  put(document, "message", "");
  field(document, "loading").hidden = true;
  putOrHide(document, "last-answer", lastAnswer && `What follows is from ${clock(lastAnswer)}.`);
}

function showFacts(health, stats) {
  put(document, "version", health.version ?? "");
  put(document, "embed-model", health.models?.embed ?? health.model ?? UNKNOWN);
  put(document, "rerank-model", health.models?.rerank ?? UNKNOWN);
  put(document, "dimensions", count(health.dimensions));
  put(document, "dtype", health.dtype ?? UNKNOWN);
  put(document, "dtype-reason", health.dtype_reason ?? "");
  put(document, "device", health.device ?? UNKNOWN);
  put(document, "uptime", duration(stats.uptime_seconds));
}

/* Load */

function showLoad(stats) {
  const texts = {
    "texts-per-second": rate(stats.texts_per_second),
    "texts-embedded": count(stats.texts_embedded),
    "tokens-per-second": rate(stats.tokens_per_second),
    "tokens-embedded": count(stats.tokens_embedded),
    "queue-depth": count(stats.queue_depth),
    "device-load": { true: "busy", false: "idle" }[stats.gpu_busy] ?? UNKNOWN,
    "latency-p50": milliseconds(stats.p50_latency_ms),
    "latency-p95": milliseconds(stats.p95_latency_ms),
    "latency-average": milliseconds(stats.avg_latency_ms),
    requests: count(stats.requests),
    "queue-waits": count(stats.queue_waits),
    errors: count(stats.errors),
    "process-memory": memory(stats.process_memory_mb),
  };
  for (const [name, text] of Object.entries(texts)) put(document, name, text);
  field(document, "errors").classList.toggle("bad", stats.errors > 0);
  showMemory(stats);
}

function showMemory(stats) {
  const total = stats.memory_total_mb;
  const used = known(total) && known(stats.memory_available_mb) ? total - stats.memory_available_mb : null;
  const inUse = `${memory(used)} of ${memory(total)} in use`;
  put(document, "system-memory", known(total) ? inUse : UNKNOWN);
  bar(document, "system-memory-bar", used, total);

  const { gpu_memory_allocated_mb: allocated, gpu_memory_reserved_mb: reserved } = stats;
  const onGpu = known(allocated) || known(reserved);
  const held = `${memory(allocated)} allocated of ${memory(reserved)} reserved`;
  put(document, "gpu-memory", onGpu ? held : UNKNOWN);
  bar(document, "gpu-memory-bar", allocated, reserved);
}

/* History: kept by this page, gone when it is closed */

const samples = [];

function remember(stats) {
  const { texts_per_second, queue_depth } = stats;
  samples.push({ at: Date.now(), "texts-per-second": texts_per_second, "queue-depth": queue_depth });
}

// Also while nothing is reachable: the old line moves on and out, under the label "5 min ago".
function forget(now) {
  while (samples.length > 0 && now - samples[0].at > HISTORY_MS) samples.shift();
}

// The next 1, 2 or 5 times a power of ten, so that the scale's label is short and rarely moves.
function scaleTop(values) {
  const largest = Math.max(1, ...values.filter(known));
  const power = 10 ** Math.floor(Math.log10(largest));
  return [1, 2, 5, 10].map((step) => step * power).find((top) => top >= largest);
}

// The runs of samples that belong together, each as its points' [x, y] in the chart.
function runsOf(name, top, now) {
  const runs = [];
  let before = null;
  for (const sample of samples) {
    const value = sample[name];
    if (known(value)) {
      if (before === null || sample.at - before > GAP_MS) runs.push([]);
      const x = CHART_WIDTH * (1 - (now - sample.at) / HISTORY_MS);
      const y = CHART_HEIGHT * (1 - value / top);
      runs.at(-1).push([x.toFixed(1), y.toFixed(1)]);
    }
    before = known(value) ? sample.at : null;
  }
  return runs;
}

// A lone sample gets a stroke of no length, which round caps turn into a dot.
const lineOf = (run) => `M${run.join("L")}h0`;
const areaOf = (run) => `M${run[0][0]},${CHART_HEIGHT}L${run.join("L")}L${run.at(-1)[0]},${CHART_HEIGHT}Z`;

function drawChart(figure, now) {
  const name = figure.dataset.chart;
  const top = scaleTop(samples.map((sample) => sample[name]));
  const runs = runsOf(name, top, now);
  figure.querySelector(".line").setAttribute("d", runs.map(lineOf).join(""));
  figure.querySelector(".area").setAttribute("d", runs.map(areaOf).join(""));
  put(figure, "top", count(top));
  put(figure, "last", rate(samples.at(-1)?.[name]));
}

function drawCharts(now) {
  forget(now);
  for (const figure of document.querySelectorAll("[data-chart]")) drawChart(figure, now);
}

/* Jobs */

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

function newRow(id) {
  const row = document.getElementById("job").content.firstElementChild.cloneNode(true);
  row.dataset.id = id;
  return row;
}

// Whoever has just pressed a button that now goes away must not be thrown back to the top of the page.
function keepPlace(leaving) {
  if (leaving.contains(document.activeElement)) document.getElementById("jobs-heading").focus();
}

// Rows are kept from poll to poll, not rebuilt: a rebuilt button loses its focus and swallows clicks.
function showList(kind, jobs) {
  const block = document.querySelector(`[data-jobs="${kind}"]`);
  const list = block.querySelector("ul");
  const ids = new Set(jobs.map((job) => job.id));
  for (const row of [...list.children].filter((row) => !ids.has(row.dataset.id))) {
    keepPlace(row);
    row.remove();
  }
  const rows = new Map([...list.children].map((row) => [row.dataset.id, row]));
  jobs.forEach((job, index) => {
    const row = rows.get(job.id) ?? newRow(job.id);
    fillJob(row, job, kind);
    if (list.children[index] !== row) list.insertBefore(row, list.children[index] ?? null);
  });
  if (jobs.length === 0) keepPlace(block);
  block.hidden = jobs.length === 0;
}

const NO_JOBS = "No jobs. A client that registers one with POST /jobs is shown here with its progress.";

function showJobs(jobs) {
  const lists = ["active", "queued", "recent"].map((kind) => [kind, jobs?.[kind] ?? []]);
  for (const [kind, list] of lists) showList(kind, list);
  const empty = lists.every(([, list]) => list.length === 0);
  putOrHide(document, "no-jobs", empty ? (jobs ? NO_JOBS : "The list of jobs is not available.") : null);
  const workers = jobs?.workers;
  const past = jobs?.historical_rate;
  const busy = workers && `${count(workers.busy)} of ${count(workers.max)} places taken`;
  put(document, "workers", join([busy, known(past) && `${rate(past)} chunks/s in past jobs`]));
}

const underWay = new Set();

async function remove(path, what) {
  if (underWay.has(path)) return;
  underWay.add(path);
  putOrHide(document, "job-problem", null);
  try {
    const answer = await fetch(path, { method: "DELETE", signal: AbortSignal.timeout(TIMEOUT_MS) });
    if (!answer.ok) putOrHide(document, "job-problem", `${what} was refused (HTTP ${answer.status}).`);
  } catch {
    putOrHide(document, "job-problem", `${what} did not get through: the service is not reachable.`);
  } finally {
    underWay.delete(path);
  }
  poll();
}

document.addEventListener("click", (event) => {
  const action = event.target.closest("[data-action]")?.dataset.action;
  if (action === "clear-recent") remove("jobs/recent", "Clearing the recent jobs");
  if (action === "cancel") {
    const row = event.target.closest("li");
    const project = field(row, "project").textContent;
    remove(`jobs/${encodeURIComponent(row.dataset.id)}`, `Cancelling ${project}`);
  }
});

/* Polling */

// A service that is not ready answers /health with 503 and says why in the body; for the other two
// an error status means that their numbers are not available.
async function ask(path, signal) {
  const answer = await fetch(path, { signal, cache: "no-store" });
  return path === "health" || answer.ok ? answer.json() : null;
}

// The three answers, or null when the service cannot be reached or something else answers in its place.
async function askAll() {
  const round = new AbortController();
  const timeout = setTimeout(() => round.abort(), TIMEOUT_MS);
  try {
    const answers = await Promise.all(["health", "stats", "jobs"].map((path) => ask(path, round.signal)));
    return typeof answers[0]?.status === "string" ? answers : null;
  } catch {
    round.abort(); // the other two must not still be under way in the next round
    return null;
  } finally {
    clearTimeout(timeout);
  }
}

let lastAnswer = null;

function show(answers) {
  if (answers === null) {
    showUnreachable(lastAnswer);
  } else {
    const [health, stats, jobs] = answers;
    lastAnswer = new Date();
    showStatus(health);
    showFacts(health, stats ?? {});
    showLoad(stats ?? {});
    remember(stats ?? {});
    showJobs(jobs);
  }
  drawCharts(Date.now());
}

let asking = false;
let askAgain = false;
let timer;

async function poll() {
  clearTimeout(timer);
  askAgain = asking; // what is under way may have been answered before the change we are to show
  if (asking || document.hidden) return;
  asking = true;
  try {
    show(await askAll());
  } finally {
    asking = false;
    timer = setTimeout(poll, askAgain ? 0 : POLL_MS);
  }
}

document.addEventListener("visibilitychange", poll);
poll();
