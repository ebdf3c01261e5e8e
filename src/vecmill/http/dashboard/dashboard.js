// The page as a whole: its tabs, its head, its key, and to whom a snapshot is handed. Knows no list and no number itself.

/** @import { Snapshot } from "./types" */

import { batchesQuery, showBatches, watchBatches } from "./batches.js";
import { showLoad, watchLoad } from "./charts.js";
import { byId, field, h, put, refill, setBar, setOrHide, setText } from "./elements.js";
import { age, duration, known, percent, words } from "./format.js";
import { jobsQuery, showJobs, watchJobs } from "./jobs.js";
import { openMachine, showMachine, watchMachine } from "./machine.js";
import { showModels, watchModels } from "./models.js";
import { showRefusals, showWho } from "./now.js";
import { showPlayground, watchPlayground } from "./playground.js";
import { showReplicas } from "./replicas.js";
import { Feed, dropKey, hasKey, keepKey } from "./server.js";

const LOOK_MS = 1000;
const STALE_MS = 7000; // a snapshot comes every 2 s, or is polled every 5 s

const STATES = /** @type {Record<string, string>} */ ({
  ok: "Ready",
  loading: "Loading",
  draining: "Stopping",
  hung: "Hung",
  failed: "Failed",
  unreachable: "Not reachable, retrying",
  refused: "Refused, retrying",
  "signed-out": "Signed out",
});

/** @type {Snapshot | null} */
let latest = null;
let receivedAt = 0;
let askedSince = 0; // a tab that becomes visible has asked for nothing before

for (const heading of document.querySelectorAll("section h2")) heading.closest("section")?.setAttribute("aria-labelledby", heading.id);

// Tabs: links, so that each has an address of its own and the browser's way back.

const TABS = /** @type {Record<string, HTMLAnchorElement>} */ (
  Object.fromEntries([...document.querySelectorAll("nav a")].map((link) => [(link.getAttribute("href") ?? "").slice(1), link]))
);

const chosenTab = () => (location.hash.slice(1) in TABS ? location.hash.slice(1) : "now");

function showTab() {
  const chosen = chosenTab();
  for (const [name, link] of Object.entries(TABS)) {
    byId(`panel-${name}`).hidden = name !== chosen;
    if (name === chosen) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = chosen === "now" ? "vecmill" : `${TABS[chosen]?.textContent} · vecmill`;
  if (latest === null) return;
  showPanel(latest);
  if (chosen === "machine") openMachine();
}

/** Only what can be seen is drawn. @param {Snapshot} snapshot */
function showPanel(snapshot) {
  const panels = /** @type {Record<string, () => void>} */ ({
    now: () => {
      showJobs(snapshot.jobs);
      showLoad(snapshot.now);
      showBatches(snapshot.batches);
      showWho(snapshot.who);
      showRefusals(snapshot);
    },
    playground: () => showPlayground(snapshot),
    models: () => showModels(snapshot),
    machine: () => showMachine(snapshot.machine),
  });
  panels[chosenTab()]?.();
}

// The head

/** @param {string} state @param {string} message */
function showState(state, message) {
  document.body.dataset.state = state;
  put(document, "state", STATES[state] ?? words(state));
  put(document, "message", message);
}

/** @param {{ status: string, percent?: number | null, warnings?: (string | { text: string })[] }} facts */
function showHead(facts) {
  byId("loading").hidden = facts.status !== "loading" || !known(facts.percent);
  setBar(field(document, "loading-bar"), facts.percent, 100, "Loading");
  put(document, "loading-percent", percent(facts.percent));
  const texts = (facts.warnings ?? []).map((warning) => (typeof warning === "string" ? warning : warning.text));
  byId("warnings").hidden = texts.length === 0;
  refill(byId("warnings"), JSON.stringify(texts), () => texts.map((text) => h("li", text)));
}

/** @param {Snapshot} snapshot */
function showSnapshot(snapshot) {
  const isFirst = latest === null;
  latest = snapshot;
  receivedAt = Date.now();
  showState(snapshot.status, snapshot.status === "ok" ? "" : (snapshot.status_text ?? ""));
  showHead(snapshot);
  showReplicas(snapshot);
  put(document, "version", snapshot.version);
  put(document, "uptime", known(snapshot.uptime_seconds) ? `up ${duration(snapshot.uptime_seconds)}` : "");
  byId("stale").hidden = true;
  byId("sign-out").hidden = !hasKey();
  hideKeyForm();
  document.querySelector("main")?.removeAttribute("hidden");
  if (isFirst) showTab();
  else showPanel(snapshot);
}

/** How old what is shown is, once nothing newer comes. */
function showAge() {
  const old = Date.now() - receivedAt;
  const isWaitedFor = Math.min(old, Date.now() - askedSince) < STALE_MS;
  if (latest === null || document.hidden || isWaitedFor || !byId("key-form").hidden) return;
  const isRefused = document.body.dataset.state === "refused";
  setOrHide(byId("stale"), `What is shown is ${age(old / 1000)} old: the server ${isRefused ? "refuses" : "does not answer"}.`);
  if (!isRefused && document.body.dataset.state !== "unreachable") showState("unreachable", "");
}

// The key

/** @param {string} problem */
function showKeyForm(problem) {
  const form = byId("key-form");
  if (form.hidden) {
    form.hidden = false;
    document.querySelector("main")?.setAttribute("hidden", "");
    byId("stale").hidden = true;
    byId("sign-out").hidden = true;
    byId("warnings").hidden = true;
    byId("key").focus();
  }
  setText(byId("key-problem"), problem);
}

function hideKeyForm() {
  const form = byId("key-form");
  if (form.hidden) return;
  const hadFocus = form.contains(document.activeElement);
  form.hidden = true;
  setText(byId("key-problem"), "");
  document.querySelector("main")?.removeAttribute("hidden");
  if (hadFocus) TABS[chosenTab()]?.focus();
}

const feed = new Feed(
  {
    snapshot: showSnapshot,
    health: (health) => {
      showState(health.status, health.status === "ok" ? "" : (health.message ?? ""));
      showHead(health);
      put(document, "version", health.version ?? "");
    },
    lost: (state, reason) => {
      if (state === "signed-out") {
        latest = null;
        showState(state, "");
        showKeyForm(reason);
      } else {
        showState(state, reason);
        askedSince = 0;
        showAge();
      }
    },
  },
  () => ({ ...jobsQuery(), ...batchesQuery() }),
);

const again = () => feed.restart();

byId("key-form").addEventListener("submit", (/** @type {Event} */ event) => {
  event.preventDefault();
  const input = byId("key");
  keepKey(input.value.trim());
  input.value = "";
  input.focus();
  setText(byId("key-problem"), "");
  again();
});

byId("sign-out").addEventListener("click", () => {
  dropKey();
  again();
});

addEventListener("hashchange", () => {
  showTab();
  scrollTo(0, 0);
});
document.addEventListener("visibilitychange", () => (askedSince = Date.now()));
setInterval(showAge, LOOK_MS);
watchJobs(again);
watchBatches(again);
watchLoad();
watchPlayground();
watchModels(again);
watchMachine();
showTab();
again();
