// The replicas: servers that share Redis, as each says of itself. Shown where there are several, or it is not known.

/** @import { Replica, Snapshot } from "./types" */

import { byId, h, heads, put, refill, setOrHide, setText, showRows, time } from "./elements.js";
import { bytes, compactly, count, duration, join, known, milliseconds, plural, rate, unit, words } from "./format.js";

/** What the page shows of the server that sends it alone. */
const OWN = ["load", "who", "refusals", "models", "memory", "device", "doctor", "pages"];
const STATES = /** @type {Record<string, string[]>} */ ({ ok: ["ok", "ready"], draining: ["warn"], hung: ["fail"], gone: ["fail"] });

byId("replicas-table").prepend(
  heads("Name", "State", "Waiting.number", "Texts/s.number", "Searches, p95.number.wide", "Memory.number.wide", "Version.number.wide"),
);

/** @param {Snapshot} snapshot */
export function showReplicas({ replicas, version }) {
  const { count: all = 1, items, totals, problem, unreadable } = replicas ?? {};
  for (const id of OWN) {
    const heading = byId(`${id}-heading`);
    setText(heading, (heading.dataset.words ??= heading.textContent) + (all > 1 ? ", this replica" : ""));
  }
  byId("replicas").hidden = !(items && (all > 1 || problem));
  showRows(byId("replicas-table").tBodies[0], items ?? [], keyOf, newRow, (row, item) => fillRow(row, item, version));
  setOrHide(byId("replicas-problem"), join([problem, (unreadable ?? 0) > 0 && `${plural(unreadable, "record")} in Redis cannot be read.`]));
  const { ready, queue, texts_per_second: texts } = totals ?? {};
  const numbers = [`${count(ready)} of ${count(all)} ready`, unit(rate(texts), "texts/s"), unit(compactly(queue?.texts, "text"), "waiting")];
  put(document, "replicas-summary", `together: ${join(numbers)}`);
}

/** One name may be given to several. @param {Replica} item */
const keyOf = (item) => `${item.replica} ${item.id}`;

const newRow = () =>
  h("tr", h("td.name", h("bdi"), h("bdi.quiet.line"), h("span.quiet.line.narrow")), h("td", h("span.badge"), h("span.quiet.line")),
    ["", "", ".wide", ".wide", ".wide"].map((kind) => h(`td.number${kind}`, h("span"), h("span.quiet.line"))));

/** @param {any} row @param {Replica} item @param {string} version of the server that sends the page */
function fillRow(row, item, version) {
  const [name, state, ...others] = row.cells;
  const { replica, url, status, gone_since: gone, queue, memory } = item;
  const [kind = status ?? "", word = words(status ?? "")] = STATES[status ?? ""] ?? [];
  row.dataset.status = kind;
  refill(name.children[0], `${replica} ${url}`, () => (url && !item.this ? h("a", { href: url, rel: "noreferrer" }, replica) : replica));
  setText(name.children[1], join([item.this && "this one", ...item.models.map((model) => model.id)]));
  setText(state.children[0], word);
  refill(state.children[1], `${gone ?? item.uptime_seconds}`, () => (known(gone) ? ["since ", time(gone)] : `up ${duration(item.uptime_seconds)}`));
  const isOther = item.version !== version;
  const numbers = [
    [compactly(queue.texts, "text"), compactly(queue.tokens, "token")],
    [rate(item.texts_per_second)],
    [milliseconds(item.searches_p95_ms)],
    [bytes(memory.ours_bytes), `of ${bytes(memory.total_bytes)}`],
    [item.version ?? "unknown", isOther ? "another version" : ""],
  ];
  numbers.forEach(([main = "", beside = ""], index) => {
    setText(others[index].children[0], main);
    setText(others[index].children[1], beside);
  });
  others[4].classList.toggle("warn", isOther);
  setText(name.children[2], join([`p95 ${numbers[2]}`, numbers[3]?.[0], isOther && `version ${numbers[4]?.[0]}`]));
}
