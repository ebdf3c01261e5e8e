// Load: six numbers of the last minute, each over its course. Knows `now` of a snapshot, the series of the history, and uPlot.

/** @import UPlot from "uplot" */
/** @import { History, Maybe, Now } from "./types" */

import { byId, h, setText } from "./elements.js";
import { UNKNOWN, bytes, compact, compactly, count, join, known, milliseconds, moment, rate, share, unit } from "./format.js";
import { call } from "./server.js";

const HEIGHT = 132; // pixels
const AGAIN_MS = { "15m": 10_000, "24h": 120_000 }; // the server's step; a 24 h chart has a point every 2 minutes
const SPAN_S = { "15m": 900, "24h": 86_400 };

/** @typedef {keyof typeof SPAN_S} Span */

/** @typedef {{ name: string, label: string, quiet?: boolean, scale?: number, constant?: (now: Now) => Maybe<number> }} Line */

/**
 * @typedef {object} Card
 * @property {string} title
 * @property {(now: Now) => [string, string]} numbers the one that counts, and what stands beside it
 * @property {(value: unknown) => string} show a value with its unit
 * @property {Line[]} lines
 * @property {number} [least] the scale's top, at least
 */

const texts = (/** @type {unknown} */ value) => compactly(value, "text");

/** @type {Card[]} */
const CARDS = [
  {
    title: "Throughput",
    numbers: (now) => [
      unit(rate(now.texts_per_second), "texts/s"),
      join([unit(compact(now.tokens_per_second), "tokens/s"), unit(rate(now.requests_per_second), "requests/s")]),
    ],
    show: (value) => unit(rate(value), "texts/s"),
    lines: [{ name: "texts_per_second", label: "computed and cached" }],
  },
  {
    title: "Searches",
    numbers: (now) => [
      `p95 ${milliseconds(now.latency_ms?.interactive.p95)}`,
      join([`p50 ${milliseconds(now.latency_ms?.interactive.p50)}`, unit(rate(now.searches_per_second), "searches/s")]),
    ],
    show: milliseconds,
    lines: [
      { name: "interactive_p95_ms", label: "p95" },
      { name: "interactive_p50_ms", label: "p50", quiet: true },
    ],
  },
  {
    title: "Bulk requests",
    numbers: (now) => [`p95 ${milliseconds(now.latency_ms?.bulk.p95)}`, `p50 ${milliseconds(now.latency_ms?.bulk.p50)}`],
    show: milliseconds,
    lines: [
      { name: "bulk_p95_ms", label: "p95" },
      { name: "bulk_p50_ms", label: "p50", quiet: true },
    ],
  },
  {
    title: "Waiting now",
    numbers: (now) => [
      texts(sumOf(now, "texts")),
      join([`searches ${count(now.queue?.interactive.texts)}`, `bulk ${count(now.queue?.bulk.texts)}`, compactly(sumOf(now, "tokens"), "token")]),
    ],
    show: texts,
    lines: [
      { name: "interactive_queue_texts", label: "searches" },
      { name: "bulk_queue_texts", label: "bulk", quiet: true },
    ],
  },
  {
    title: "Cache",
    numbers: (now) =>
      now.cache
        ? [
            `${share(now.cache.hit_ratio)} hits`,
            join([
              `${compactly(now.cache.tokens_saved, "token")} saved since the start`,
              `${compact(now.cache.entries)} kept in ${bytes(now.cache.bytes)}`,
            ]),
          ]
        : [UNKNOWN, "nothing is kept, or not shown to this key"],
    show: (value) => unit(rate(value), "%"),
    lines: [{ name: "cache_hit_ratio", label: "hits", scale: 100 }],
    least: 100,
  },
  {
    title: "Batch fill",
    numbers: (now) => [
      unit(compactly(now.batch_fill?.tokens_per_pass, "token"), "a pass"),
      join([fillOf(now.batch_fill), `device busy ${share(now.device_busy_ratio)}`]),
    ],
    show: (value) => compactly(value, "token"),
    lines: [
      { name: "tokens_per_pass", label: "a pass" },
      { name: "knee", label: "knee", quiet: true, constant: (now) => now.batch_fill?.knee_tokens },
    ],
  },
];

/** Above the knee there is nothing to gain from fuller passes: a share of it would read as too much. @param {Now["batch_fill"]} fill */
function fillOf(fill) {
  const { ratio, knee_tokens: tokens } = fill ?? {};
  const knee = `the knee${known(tokens) ? ` of ${compactly(tokens, "token")}` : ""}`;
  if (!known(ratio)) return known(tokens) && knee;
  return ratio < 1 ? `${share(ratio)} of ${knee}` : `full: ${rate(ratio)} times ${knee}`;
}

/** A number without its unit, where the other has the same. @param {string} text @param {string} other */
function without(text, other) {
  const unit = text.slice(text.lastIndexOf(" "));
  return other.endsWith(unit) ? text.slice(0, -unit.length) : text;
}

/** @param {Now} now @param {"texts" | "tokens"} what */
function sumOf({ queue }, what) {
  const searches = queue?.interactive[what];
  const bulk = queue?.bulk[what];
  return known(searches) && known(bulk) ? searches + bulk : null;
}

/** @type {Span} */
let span = "15m";
/** @type {History | null} */
let history = null;
let nextAt = 0;
let asking = false;

/** One card and its chart. */
class Chart {
  /** @type {UPlot | null} */
  #plot = null;
  #range = "";
  /** @type {Maybe<Now>} */
  #now = null;

  /** @param {Card} card */
  constructor(card) {
    this.card = card;
    this.main = h("strong", UNKNOWN);
    this.beside = h("span.quiet", "");
    this.legend = h("p.legend.quiet");
    this.room = h("div.plot", { role: "img", "aria-label": card.title });
    const key = card.lines.length > 1 && card.lines.map((line) => h(`span.key.${line.quiet ? "second" : "first"}`, line.label));
    this.root = h("article.chart", h("h3", card.title, h("span.keys", key || null)), h("p.numbers", this.main, this.beside), this.room, this.legend);
  }

  /** @param {Maybe<Now>} now */
  showNow(now) {
    this.#now = now;
    const [main, beside] = now ? this.card.numbers(now) : [UNKNOWN, ""];
    setText(this.main, main);
    setText(this.beside, beside);
  }

  /** @param {History} found */
  draw(found) {
    const series = this.card.lines.map(({ name, scale = 1, constant }) =>
      found.at.map((_, index) => {
        const value = constant ? this.#now && constant(this.#now) : found.series[name]?.[index];
        return known(value) ? value * scale : null;
      }),
    );
    const data = /** @type {UPlot.AlignedData} */ ([found.at, ...series]);
    if (this.#plot === null) {
      this.room.replaceChildren();
      this.#plot = new uPlot(this.#options(), data, this.room);
    } else this.#plot.setData(data);
    this.#describe(series);
  }

  /** In words, for everyone. @param {Maybe<number>[][]} series */
  #describe(series) {
    const { lines, show, title } = this.card;
    const ranges = lines.map((line, index) => {
      const values = (series[index] ?? []).filter(known);
      const [least, most] = [Math.min(...values), Math.max(...values)].map(show);
      const range = values.length === 0 ? "not known" : least === most ? most : `${without(least ?? "", most ?? "")} to ${most}`;
      return lines.length > 1 ? `${line.label} ${range}` : range;
    });
    this.#range = ranges.join(", ");
    this.room.setAttribute("aria-label", `${title} over the last ${span === "15m" ? "15 minutes" : "24 hours"}: ${this.#range}`);
    this.#hover(this.#plot?.cursor.idx);
  }

  /** The values under the pointer, where there is one. @param {Maybe<number>} index */
  #hover(index) {
    const data = this.#plot?.data;
    if (data === undefined) return;
    if (index === null || index === undefined) return setText(this.legend, this.#range);
    const values = this.card.lines.map((line, at) => {
      const value = this.card.show(data[at + 1]?.[index]);
      return this.card.lines.length > 1 ? `${line.label} ${value}` : value;
    });
    setText(this.legend, `${moment(data[0]?.[index])}: ${values.join(", ")}`);
  }

  resize() {
    if (this.room.clientWidth > 0) this.#plot?.setSize({ width: this.room.clientWidth, height: HEIGHT });
  }

  /** With other colours, or another span. */
  reset() {
    this.#plot?.destroy();
    this.#plot = null;
  }

  /** @returns {UPlot.Options} */
  #options() {
    const style = getComputedStyle(document.documentElement);
    const colour = (/** @type {string} */ name) => style.getPropertyValue(name).trim();
    const axis = {
      stroke: colour("--quiet"),
      font: "11px system-ui, sans-serif",
      grid: { stroke: colour("--border"), width: 1 },
      ticks: { show: false },
    };
    return {
      width: this.room.clientWidth,
      height: HEIGHT,
      padding: [8, 8, 0, 0],
      legend: { show: false },
      cursor: { sync: { key: "load" }, drag: { x: false, y: false }, points: { size: 6 } },
      scales: {
        x: { time: true, range: () => [end() - SPAN_S[span], end()] },
        y: { range: (_, __, top) => [0, Math.max(this.card.least ?? 1, (top ?? 0) * 1.05)] },
      },
      axes: [
        { ...axis, size: 22, space: 70, values: (_, at) => at.map(clockOf) },
        { ...axis, size: 46, space: 34, values: (_, at) => at.map((value) => this.#tick(value)) },
      ],
      series: [
        {},
        ...this.card.lines.map((line) => ({
          stroke: colour(line.quiet ? "--second" : "--accent"),
          width: 1.5,
          points: { show: true, size: 4, fill: colour(line.quiet ? "--second" : "--accent"), filter: alone },
          spanGaps: false,
          ...(line.quiet ? {} : { fill: colour("--accent-area") }),
        })),
      ],
      hooks: { setCursor: [(plot) => this.#hover(plot.cursor.idx)] },
    };
  }

  #tick(/** @type {number} */ value) {
    if (this.card.show === milliseconds) return milliseconds(value);
    if (this.card.least === 100) return `${count(value)} %`;
    return value < 100 ? rate(value) : compact(value); // beside 1, a half is not 1 too
  }
}

/** A value between two unknown ones is no line: it is drawn as a dot. @param {UPlot} plot @param {number} row */
function alone(plot, row) {
  const values = /** @type {Maybe<number>[]} */ (plot.data[row] ?? []);
  return values.flatMap((value, index) => (known(value) && !known(values[index - 1]) && !known(values[index + 1]) ? [index] : []));
}

const clocks = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit" });
const clockOf = (/** @type {number} */ at) => clocks.format(new Date(at * 1000));

/** By the server's clock. */
const end = () => (history?.at.at(-1) ?? Date.now() / 1000) + (history?.step_seconds ?? 0);

const charts = CARDS.map((card) => new Chart(card));

/** @param {Maybe<Now>} now */
export function showLoad(now) {
  for (const chart of charts) chart.showNow(now);
  if (Date.now() >= nextAt && byId("charts").offsetParent !== null) void refresh();
}

async function refresh() {
  if (asking) return;
  asking = true;
  const asked = span;
  try {
    history = await (await call("GET", `dashboard/history?span=${asked}`)).json();
    nextAt = Date.now() + AGAIN_MS[asked];
  } catch {
    nextAt = Date.now() + AGAIN_MS["15m"]; // the page's head says that nothing answers
  } finally {
    asking = false;
  }
  if (asked !== span) return void refresh();
  if (history !== null) for (const chart of charts) chart.draw(history);
}

function redraw() {
  for (const chart of charts) chart.reset();
  if (history !== null) for (const chart of charts) chart.draw(history);
}

export function watchLoad() {
  const room = byId("charts");
  room.append(...charts.map((chart) => chart.root));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  new ResizeObserver(() => {
    for (const chart of charts) chart.resize();
  }).observe(room);
  for (const radio of document.getElementsByName("span")) {
    radio.addEventListener("change", () => {
      span = /** @type {Span} */ (/** @type {HTMLInputElement} */ (radio).value);
      nextAt = 0;
      void refresh();
    });
  }
}
