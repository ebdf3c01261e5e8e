// The load section. Knows the field names of /stats; computes no number that the service could state itself.

import { bar, field, put } from "./elements.js";
import { UNKNOWN, count, known, memory, milliseconds, rate } from "./format.js";

export function showLoad(stats) {
  const texts = {
    "texts-per-second": rate(stats.texts_per_second),
    "texts-embedded": count(stats.texts_embedded),
    "tokens-per-second": rate(stats.tokens_per_second),
    "tokens-embedded": count(stats.tokens_embedded),
    "queue-depth": count(stats.queue_depth),
    "device-load": { true: "busy", false: "idle" }[stats.gpu_busy] ?? UNKNOWN,
    "latency-p50": milliseconds(stats.p50_latency_ms),
    "latency-p95": milliseconds(stats.p95_latency_ms),
    "waiting-interactive": count(stats.waiting?.interactive),
    "waiting-bulk": count(stats.waiting?.bulk),
    "latency-searches": milliseconds(stats.latency_ms?.interactive?.p95),
    "latency-average": milliseconds(stats.avg_latency_ms),
    requests: count(stats.requests),
    "queue-waits": count(stats.queue_waits),
    "texts-cached": count(stats.texts_cached),
    "cache-size": cacheSize(stats.cache),
    errors: count(stats.errors),
    "process-memory": memory(stats.process_memory_mb),
    swap: memory(stats.memory?.swap_used_mb),
  };
  for (const [name, text] of Object.entries(texts)) put(document, name, text);
  field(document, "errors").classList.toggle("bad", stats.errors > 0);
  showMemory(stats);
}

function cacheSize(cache) {
  if (cache === undefined) return UNKNOWN;
  if (cache === null) return "nothing is kept";
  if (cache.failing) return "cannot be used now";
  return `${count(cache.entries)} kept in ${memory(cache.bytes / 2 ** 20)}`;
}

function showMemory(stats) {
  const total = stats.memory_total_mb;
  const used = known(total) && known(stats.memory_available_mb) ? total - stats.memory_available_mb : null;
  const inUse = `${memory(used)} of ${memory(total)} in use`;
  put(document, "system-memory", known(total) ? inUse : UNKNOWN);
  bar(document, "system-memory-bar", used, total);
}
