// How the service is asked. Knows the four paths, how often and how long; does not know what the answers say.

import { fetchWithKey, isRefused } from "./key.js";

export const POLL_MS = 1000;
export const TIMEOUT_MS = 5000;
const BATCHES = "v1/batches?limit=20";
// Where the service cannot keep batches, asking every second would only fill its log.
const UNAVAILABLE_MS = 60000;
let batchesAgainAt = 0;

// A service that is not ready answers /health with 503 and says why in the body; for the others
// an error status means that their numbers are not available. It alone needs no key.
async function ask(path, signal) {
  const options = { signal, cache: "no-store" };
  if (path === "health") return (await fetch(path, options)).json();
  if (isRefused() || (path === BATCHES && Date.now() < batchesAgainAt)) return null;
  const answer = await fetchWithKey(path, options);
  if (path === BATCHES && answer.status === 503) batchesAgainAt = Date.now() + UNAVAILABLE_MS;
  return answer.ok ? answer.json() : null;
}

// The four answers, or null when the service cannot be reached or something else answers in its place.
export async function askAll() {
  const round = new AbortController();
  const timeout = setTimeout(() => round.abort(), TIMEOUT_MS);
  try {
    const answers = await Promise.all(["health", "stats", "jobs", BATCHES].map((path) => ask(path, round.signal)));
    return typeof answers[0]?.status === "string" ? answers : null;
  } catch {
    round.abort(); // the others must not still be under way in the next round
    return null;
  } finally {
    clearTimeout(timeout);
  }
}
