// The GPU section. Knows the field names of /stats' `gpu`; what a driver does not tell stays a dash.

import { bar, field, put } from "./elements.js";
import { UNKNOWN, count, known, memory, percent } from "./format.js";

const HOT_C = 80;
const unit = (value, name) => (known(value) ? `${count(value)} ${name}` : UNKNOWN);

export function showGpu(gpu) {
  field(document, "gpu").hidden = !gpu;
  if (!gpu) return;
  const texts = {
    "gpu-name": nameOf(gpu),
    "gpu-clock": unit(gpu.sm_clock_mhz, "MHz"),
    "gpu-clock-state": gpu.clock.state,
    "gpu-utilization": percent(gpu.utilization_percent),
    "gpu-state": stateOf(gpu),
    "gpu-temperature": unit(gpu.temperature_c, "°C"),
    "gpu-reasons": (gpu.clock_reasons ?? []).map((reason) => `(${reason.replaceAll("_", " ")})`).join(" "),
    "gpu-power": unit(gpu.power_watts, "W"),
    "gpu-power-limit": unit(gpu.power_limit_watts, "W"),
  };
  for (const [name, text] of Object.entries(texts)) put(document, name, text);
  field(document, "gpu-temperature").classList.toggle("warn", gpu.temperature_c >= HOT_C);
  const slow = gpu.clock.state === "throttled" || gpu.clock.state === "locked";
  field(document, "gpu-clock").classList.toggle("bad", slow);
  showMemory(gpu.memory);
}

function stateOf(gpu) {
  if (gpu.stale) return "the driver does not answer";
  return gpu.in_use ? (gpu.performance_state ?? UNKNOWN) : "not used by this server";
}

function nameOf(gpu) {
  const versions = [gpu.driver_version && `driver ${gpu.driver_version}`, gpu.cuda_version && `CUDA ${gpu.cuda_version}`];
  return [gpu.name, ...versions].filter(Boolean).join(", ");
}

function showMemory(found) {
  const { total_mb: total, available_mb: available } = found;
  put(document, "gpu-memory-title", found.unified ? "Memory, shared with the CPU" : "Memory");
  put(document, "gpu-memory", known(total) ? `${memory(available)} of ${memory(total)} available` : UNKNOWN);
  bar(document, "gpu-memory-bar", known(total) && known(available) ? total - available : null, total);
  put(document, "gpu-memory-own", memory(found.this_process_mb));
  put(document, "gpu-memory-others", memory(found.other_processes_mb));
  put(document, "gpu-memory-allocated", memory(found.allocated_mb));
  put(document, "gpu-memory-reserved", memory(found.reserved_mb));
}
