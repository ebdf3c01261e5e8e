// How the service is asked. Knows the three paths, how often and how long; does not know what the answers say.

import { fetchWithKey, isRefused } from "./key.js";

export const POLL_MS = 1000;
export const TIMEOUT_MS = 5000;

// A service that is not ready answers /health with 503 and says why in the body; for the other two
// an error status means that their numbers are not available. It alone needs no key.
async function ask(path, signal) {
  const options = { signal, cache: "no-store" };
  if (path === "health") return (await fetch(path, options)).json();
  if (isRefused()) return null;
  const answer = await fetchWithKey(path, options);
  return answer.ok ? answer.json() : null;
}

// The three answers, or null when the service cannot be reached or something else answers in its place.
export async function askAll() {
  const round = new AbortController();
  const timeout = setTimeout(() => round.abort(), TIMEOUT_MS);
  try {
    const answers = await Promise.all(["health", "stats", "jobs"].map((path) => ask(path, round.signal)));
    return typeof answers[0]?.status === "string" ? answers : null;
  } catch {
    round.abort(); // the other two must not still be under way in the next round
    return null;
  } finally {
    clearTimeout(timeout);
  }
}
