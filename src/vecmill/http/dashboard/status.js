// The page's head. Knows the field names of /health; states what the service is and whether it can be reached.

import { bar, field, put, putOrHide } from "./elements.js";
import { UNKNOWN, clock, count, duration, percent } from "./format.js";

const STATES = { ok: "Ready", loading: "Loading", draining: "Stopping", hung: "Hung", failed: "Failed" };

export function showStatus(health) {
  document.body.dataset.state = health.status;
  put(document, "state", STATES[health.status] ?? health.status);
  const ready = health.status === "ok";
  put(document, "message", ready ? "" : (health.message ?? ""));
  field(document, "loading").hidden = health.status !== "loading";
  bar(document, "loading-bar", health.percent, 100);
  put(document, "loading-percent", percent(health.percent));
  field(document, "last-answer").hidden = true;
  showWarnings(health.warnings ?? []);
}

// Left alone while nothing changes: a reader speaks a live list at every write.
function showWarnings(warnings) {
  const list = field(document, "warnings");
  list.hidden = warnings.length === 0;
  const shown = [...list.children].map((item) => item.textContent);
  if (shown.join("\n") === warnings.join("\n")) return;
  list.replaceChildren(...warnings.map(itemOf));
}

function itemOf(text) {
  const item = document.createElement("li");
  item.textContent = text;
  return item;
}

export function showUnreachable(lastAnswer) {
  document.body.dataset.state = "unreachable";
  put(document, "state", "Not reachable, retrying");
  put(document, "message", "");
  field(document, "loading").hidden = true;
  putOrHide(document, "last-answer", lastAnswer && `What follows is from ${clock(lastAnswer)}.`);
}

export function showFacts(health, stats) {
  put(document, "version", health.version ?? "");
  put(document, "embed-model", names(health.embedding_models) ?? health.model ?? UNKNOWN);
  put(document, "rerank-model", names(health.rerank_models) ?? health.models?.rerank ?? UNKNOWN);
  put(document, "dimensions", count(health.dimensions));
  put(document, "dtype", health.dtype ?? UNKNOWN);
  put(document, "dtype-reason", health.dtype_reason ?? "");
  put(document, "device", health.device ?? UNKNOWN);
  put(document, "uptime", duration(stats.uptime_seconds));
}

// The default first; null where there is none.
function names(models) {
  return models?.length ? models.join(", ") : null;
}
