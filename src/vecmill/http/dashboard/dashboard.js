// Polls the service and hands its answers to the parts of the page. Knows when to ask; draws nothing itself.

import { showBatches, watchBatchButtons } from "./batches.js";
import { drawCharts, remember } from "./charts.js";
import { showJobs, watchButtons } from "./jobs.js";
import { showGpu } from "./gpu.js";
import { forgetRefusal, watchKeyForm } from "./key.js";
import { showLoad } from "./load.js";
import { POLL_MS, askAll } from "./service.js";
import { showFacts, showStatus, showUnreachable } from "./status.js";

let lastAnswer = null;

function show(answers) {
  if (answers === null) {
    showUnreachable(lastAnswer);
    forgetRefusal();
  } else {
    const [health, stats, jobs, batches] = answers;
    lastAnswer = new Date();
    showStatus(health);
    showFacts(health, stats ?? {});
    showLoad(stats ?? {});
    showGpu(stats?.gpu);
    remember(stats ?? {});
    showJobs(jobs);
    showBatches(batches);
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
watchButtons(poll);
watchBatchButtons(poll);
watchKeyForm(poll);
poll();
