// The last five minutes as lines. Knows the samples, kept by this page and gone when it is closed.

import { put } from "./elements.js";
import { count, known, rate } from "./format.js";
import { POLL_MS, TIMEOUT_MS } from "./service.js";

const HISTORY_MS = 5 * 60 * 1000;
// Samples further apart than the slowest answer explains were not taken (page hidden, service away):
// the line is broken there, because a straight line would claim to know what happened between.
const GAP_MS = 2 * (POLL_MS + TIMEOUT_MS);
const CHART_WIDTH = 300;
const CHART_HEIGHT = 60;

const samples = [];

for (const figure of document.querySelectorAll("[data-chart]")) {
  figure.append(document.getElementById("chart").content.cloneNode(true));
  put(figure, "title", figure.dataset.title);
  figure.querySelector("svg").setAttribute("aria-label", figure.dataset.label);
}

export function remember(stats) {
  const { texts_per_second, queue_depth, gpu } = stats;
  samples.push({
    at: Date.now(),
    "texts-per-second": texts_per_second,
    "queue-depth": queue_depth,
    "gpu-clock": gpu?.sm_clock_mhz,
    "gpu-temperature": gpu?.temperature_c,
  });
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

export function drawCharts(now) {
  forget(now);
  for (const figure of document.querySelectorAll("[data-chart]")) drawChart(figure, now);
}
