// The machine: its memory as one bar, its processors, what doctor finds, and the pages that programs read.

/** @import { Doctor, Machine, Maybe, Share } from "./types" */

import { attempt, byId, field, h, heads, refill, setText, time } from "./elements.js";
import { UNKNOWN, bytes, count, join, known, share, unit } from "./format.js";
import { call } from "./server.js";
import { choice, codeBlock } from "./snippets.js";

const HOT_C = 80;
const SLOW = new Set(["throttled", "locked"]);
const DOCTOR_AGAIN_MS = 2000; // while it runs
const LONGEST_PAGE = 200_000; // characters that are shown

/** @param {Maybe<Machine>} machine */
export function showMachine(machine) {
  const memory = machine?.memory;
  refill(byId("memory"), JSON.stringify(memory ?? null), () => {
    if (!memory) return h("p.empty", "The memory is shown to keys with the scope admin.");
    const title = memory.unified ? "Memory, shared by CPU and GPU" : "Main memory";
    const parts = [["ours", "this server", memory.ours_bytes], ["others", "others", memory.others_bytes], ["cache", "page cache", memory.page_cache_bytes], ["free", "free", memory.free_bytes]];
    const floor = known(memory.floor_bytes) && `New work is refused when less than ${bytes(memory.floor_bytes)} is left (the floor, marked).`;
    return [
      memoryBar(title, memory.total_bytes, parts, memory.floor_bytes),
      floor ? h("p.quiet", floor) : null,
      memory.gpu ? gpuBar(memory.gpu) : null,
    ];
  });
  refill(byId("device"), JSON.stringify([machine?.gpu ?? null, machine?.cpu ?? null]), () => tiles(machine));
}

/** @param {Share} gpu */
const gpuBar = (gpu) =>
  memoryBar("GPU memory", gpu.total_bytes, [["ours", "this server", gpu.ours_bytes], ["others", "others", gpu.others_bytes], ["free", "free", gpu.free_bytes]], null);

/**
 * One bar, its parts named with their numbers.
 * @param {string} title @param {Maybe<number>} total @param {any[][]} parts kind, words, bytes @param {Maybe<number>} floor
 */
function memoryBar(title, total, parts, floor) {
  const segments = parts.filter(([, , size]) => known(size) && known(total) && total > 0).map(([kind, , size]) => {
    const segment = h(`span.${kind}`);
    segment.style.flexGrow = String(size);
    return segment;
  });
  const bar = h("div.stack-bar", { "aria-hidden": "true" }, segments);
  if (known(floor) && known(total) && floor < total) {
    const mark = h("i");
    mark.style.left = `${100 * (1 - floor / total)}%`;
    bar.append(mark);
  }
  const legend = parts.map(([kind, words, size]) => h("div", h(`dt.key.${kind}`, words), h("dd", bytes(size))));
  return h("figure", h("figcaption", h("strong", title), " ", h("span.quiet", unit(bytes(total), "in all"))), bar, h("dl.legend", legend));
}

/** @param {Maybe<Machine>} machine */
function tiles(machine) {
  const { gpu, cpu } = machine ?? {};
  const of = [];
  if (gpu) {
    const isSlow = SLOW.has(gpu.clock_verdict ?? "");
    of.push(
      tile("GPU busy", share(gpu.utilization_ratio), join([gpu.name, gpu.stale && "its driver does not answer", gpu.in_use === false && "not used by this server"])),
      tile("GPU clock", unit(count(gpu.sm_clock_mhz), "MHz"), gpu.clock_text ?? gpu.clock_verdict ?? "", isSlow ? "bad" : ""),
      tile("GPU power", unit(count(gpu.power_watts), "W"), ""),
      tile("GPU temperature", unit(count(gpu.temperature_c), "°C"), `hot from ${HOT_C} °C on`, (gpu.temperature_c ?? 0) >= HOT_C ? "warn" : ""),
    );
  } else of.push(tile("GPU", "none in use", "models run on the CPU"));
  of.push(tile("CPU of this server", share(cpu?.process_ratio), `of ${known(cpu?.cores) ? `${count(cpu?.cores)} cores` : UNKNOWN}`));
  return of;
}

/** @param {string} name @param {string} value @param {string} beside @param {string} [kind] */
const tile = (name, value, beside, kind = "") =>
  h("div", h("dt", name), h("dd", h(kind ? `strong.${kind}` : "strong", value), h("span.quiet", beside)));

// Doctor

let timer = 0;

/** The last result; again while it runs. */
async function showDoctor() {
  clearTimeout(timer);
  /** @type {Doctor} */
  let doctor;
  try {
    doctor = await (await call("GET", "dashboard/doctor")).json();
  } catch (error) {
    const { status, message } = /** @type {import("./server.js").CallFailed} */ (error);
    const text = status === 403 ? "Doctor is for keys with the scope admin." : `Doctor's result did not come: ${message}`;
    byId("doctor-run").hidden = status === 403 || status === 404;
    refill(byId("doctor"), text, () => h("p.empty", text));
    return;
  }
  const button = byId("doctor-run");
  button.hidden = false;
  button.disabled = doctor.running;
  setText(button, doctor.running ? "Running…" : doctor.result ? "Run again" : "Run");
  const checks = doctor.result?.checks ?? [];
  const bad = checks.filter((check) => check.status !== "ok").length;
  const verdict = checks.length > 0 && (bad === 0 ? `${count(checks.length)} checks, all well` : `${count(bad)} of ${count(checks.length)} checks found something`);
  refill(field(document, "doctor-summary"), JSON.stringify([verdict, doctor.ended_at]), () =>
    verdict ? [verdict, ", ", time(doctor.ended_at)] : "looks at GPU, driver, memory, disk and settings",
  );
  refill(byId("doctor"), JSON.stringify([checks, doctor.error ?? null, doctor.running]), () => shownChecks(doctor));
  if (doctor.running && !byId("panel-machine").hidden && !document.hidden) timer = setTimeout(showDoctor, DOCTOR_AGAIN_MS);
}

/** @param {Doctor} doctor */
function shownChecks(doctor) {
  const checks = doctor.result?.checks ?? [];
  if (doctor.error && !doctor.running) return h("p.problem", doctor.error);
  if (checks.length === 0) return h("p.empty", doctor.running ? "It is looking. That may take some minutes; searches go first." : "It has not been run since the start: Run has it look at the machine.");
  const order = ["fail", "warn", "ok"];
  const sorted = [...checks].sort((one, other) => order.indexOf(one.status) - order.indexOf(other.status));
  return h("table.checks", heads("Check", "Verdict", "Seen", "Cure"),
    h("tbody", sorted.map((check) =>
      h("tr", { "data-status": check.status }, h("th", { scope: "row" }, check.name), h("td", h("span.badge", check.status)),
        h("td", check.seen), h("td", check.cure ? h("code", check.cure) : "")))));
}

async function runDoctor() {
  const button = byId("doctor-run");
  button.disabled = true;
  await attempt("Doctor was not started", () => call("POST", "dashboard/doctor"));
  await showDoctor();
}

// Pages of programs, which a browser could not open itself: it does not send the key.

/** @type {Record<string, string>} */
const PAGES = { Metrics: "metrics", Models: "v1/models", Health: "health", Statistics: "stats", Capabilities: "capabilities" };

/** @param {string} name */
async function showPage(name) {
  const path = PAGES[name] ?? "";
  const room = byId("page-shown");
  try {
    const text = await (await call("GET", path)).text();
    const shown = text.startsWith("{") ? JSON.stringify(JSON.parse(text), null, 2) : text;
    const cut = shown.length > LONGEST_PAGE ? `${shown.slice(0, LONGEST_PAGE)}\n…` : shown;
    room.replaceChildren(codeBlock(cut, `the page /${path}`), h("p.quiet", join([`GET /${path}`, bytes(text.length)])));
  } catch (error) {
    room.replaceChildren(h("p.problem", `/${path} did not come: ${/** @type {Error} */ (error).message}`));
  }
}

/** Whoever comes to the tab sees what is so now. */
export function openMachine() {
  void showDoctor();
  const chosen = /** @type {HTMLInputElement | null} */ (document.querySelector("#pages input:checked"));
  void showPage(chosen?.value ?? "Metrics");
}

export function watchMachine() {
  byId("pages").append(...choice("page", Object.keys(PAGES), showPage));
  byId("doctor-run").addEventListener("click", runDoctor);
}
