// How the server is asked: the key of this tab, single calls, and the stream of snapshots. Draws nothing.
//
// The stream is read with `fetch`, because an EventSource cannot send the key. Where no stream gets through (a proxy that
// holds answers back, too many readers), snapshots are polled. Hidden tabs ask nothing.

/** @import { Query, Snapshot } from "./types" */

const STORED_AS = "vecmill-api-key";
const ANSWER_MS = 10_000; // an answer's head takes at most
const SILENCE_MS = 20_000; // the stream has a snapshot every 2 s
const POLL_MS = 5000;
const POLL_FOR_MS = 60_000; // then the stream is tried again
const WAITS_MS = [1000, 2000, 3000, 5000]; // between tries

export const hasKey = () => sessionStorage.getItem(STORED_AS) !== null;

/** @param {string} key */
export const keepKey = (key) => sessionStorage.setItem(STORED_AS, key);

export const dropKey = () => sessionStorage.removeItem(STORED_AS);

/** @param {string} path @param {RequestInit} [options] */
function fetchWithKey(path, options) {
  const key = sessionStorage.getItem(STORED_AS);
  const headers = new Headers(options?.headers);
  if (key) headers.set("Authorization", `Bearer ${key}`);
  return fetch(path, { cache: "no-store", ...options, headers });
}

/** An answer that is an error, or none at all; `message` is a sentence for people. */
export class CallFailed extends Error {
  /** @param {string} message @param {number} [status] */
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/**
 * @param {string} method
 * @param {string} path
 * @param {unknown} [body] sent as JSON, a form as it is
 * @param {number} [timeoutMs]
 * @returns {Promise<Response>} an answer that is no error
 */
export async function call(method, path, body, timeoutMs = ANSWER_MS) {
  /** @type {RequestInit} */
  const options = { method, signal: AbortSignal.timeout(timeoutMs) };
  if (body instanceof FormData) options.body = body;
  else if (body !== undefined) {
    options.body = JSON.stringify(body);
    options.headers = { "Content-Type": "application/json" };
  }
  let answer;
  try {
    answer = await fetchWithKey(path, options);
  } catch (error) {
    const late = error instanceof DOMException && error.name === "TimeoutError";
    throw new CallFailed(late ? "the server did not answer in time" : "the server cannot be reached");
  }
  if (!answer.ok) throw new CallFailed(await reasonOf(answer), answer.status);
  return answer;
}

/** The sentence in an error of any of the server's dialects. @param {Response} answer */
async function reasonOf(answer) {
  const text = await answer.text().catch(() => "");
  try {
    const body = JSON.parse(text);
    const reason = body.error?.message ?? body.message ?? body.detail ?? body.error;
    if (typeof reason === "string" && reason) return reason;
  } catch {
    // not JSON: something between the page and the server has answered
  }
  return `HTTP ${answer.status}`;
}

/**
 * What the page is told while it watches. `signed-out`: a key is missing or wrong.
 * @typedef {object} Watcher
 * @property {(snapshot: Snapshot) => void} snapshot
 * @property {(state: "unreachable" | "refused" | "signed-out", reason: string) => void} lost
 * @property {(health: any) => void} health while signed out
 */

/** The newest snapshots, for as long as the page is visible. */
export class Feed {
  /** @type {AbortController | null} */
  #running = null;
  #pollUntil = 0;

  /** @param {Watcher} watcher @param {() => Query} query */
  constructor(watcher, query) {
    this.watcher = watcher;
    this.query = query;
    document.addEventListener("visibilitychange", () => this.restart());
    addEventListener("online", () => this.restart());
    addEventListener("offline", () => this.restart());
    addEventListener("pagehide", () => this.#running?.abort());
    addEventListener("pageshow", (event) => event.persisted && this.restart());
  }

  /** Begin, or ask anew: with another key, about another page of jobs, now that the tab is visible. */
  restart() {
    this.#running?.abort();
    this.#running = null;
    if (document.hidden) return;
    this.#running = new AbortController();
    this.#run(this.#running.signal).catch((error) => {
      if (error?.name !== "AbortError") throw error;
    });
  }

  /** @param {AbortSignal} stopped */
  async #run(stopped) {
    for (let failures = 0; ; ) {
      try {
        const received = Date.now() < this.#pollUntil ? await this.#poll(stopped) : await this.#stream(stopped);
        failures = received ? 0 : failures + 1;
      } catch (error) {
        if (stopped.aborted) throw error;
        failures += 1;
        await this.#onFailure(error, stopped);
      }
      const wait = Date.now() < this.#pollUntil && failures === 0 ? POLL_MS : WAITS_MS[Math.min(failures, WAITS_MS.length - 1)];
      await sleep(wait ?? POLL_MS, stopped);
    }
  }

  /** @param {unknown} error @param {AbortSignal} stopped */
  async #onFailure(error, stopped) {
    if (error instanceof CallFailed && error.status === 401) {
      const wrong = hasKey();
      dropKey();
      this.watcher.lost("signed-out", wrong ? "The server does not know this key." : "");
      await this.#untilRestarted(stopped);
    } else {
      this.watcher.lost(error instanceof CallFailed && error.status < 500 ? "refused" : "unreachable", error instanceof CallFailed ? error.message : "");
    }
  }

  /** Without a key only /health is asked, until the server is gone: after a restart it may want another key, or none. */
  async #untilRestarted(/** @type {AbortSignal} */ stopped) {
    for (;;) {
      try {
        const answer = await fetch("health", { cache: "no-store", signal: within(ANSWER_MS, stopped) });
        this.watcher.health(await answer.json());
      } catch (error) {
        if (stopped.aborted) throw error;
        return this.watcher.lost("unreachable", "");
      }
      await sleep(POLL_MS, stopped);
    }
  }

  #address(/** @type {string} */ path) {
    const query = Object.entries(this.query()).map(([name, value]) => [name, String(value)]);
    return `${path}?${new URLSearchParams(query)}`;
  }

  /** @param {AbortSignal} stopped */
  async #poll(stopped) {
    const answer = await fetchWithKey(this.#address("dashboard/snapshot"), { signal: within(ANSWER_MS, stopped) });
    if (!answer.ok) throw new CallFailed(await reasonOf(answer), answer.status);
    this.watcher.snapshot(await answer.json());
    return true;
  }

  /** Whether there was a snapshot before the stream ended. @param {AbortSignal} stopped */
  async #stream(stopped) {
    const silence = new AbortController();
    const signal = AbortSignal.any([stopped, silence.signal]);
    let timer = setTimeout(() => silence.abort(), ANSWER_MS);
    let received = false;
    try {
      const answer = await fetchWithKey(this.#address("dashboard/events"), { signal });
      if (!answer.ok) throw new CallFailed(await reasonOf(answer), answer.status);
      for await (const event of eventsOf(answer)) {
        clearTimeout(timer);
        timer = setTimeout(() => silence.abort(), SILENCE_MS);
        if (event.name !== "snapshot") continue;
        received = true;
        this.watcher.snapshot(JSON.parse(event.data));
      }
      if (!received) this.#pollUntil = Date.now() + POLL_FOR_MS;
      return received;
    } catch (error) {
      const refused = error instanceof CallFailed && error.status !== 401;
      // A server that answers, but not with a stream. One that cannot be reached is not asked twice.
      if (!stopped.aborted && !received && (refused || silence.signal.aborted)) this.#pollUntil = Date.now() + POLL_FOR_MS;
      throw error;
    } finally {
      clearTimeout(timer);
      silence.abort();
    }
  }
}

/**
 * Server-sent events; what is no event, such as "retry:", comes as one without a name.
 * @param {Response} answer
 */
async function* eventsOf(answer) {
  if (answer.body === null) return;
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop() ?? "";
    for (const part of parts) yield eventOf(part.split("\n"));
  }
}

/** @param {string[]} lines */
function eventOf(lines) {
  /** @param {string} field */
  const values = (field) =>
    lines.filter((line) => line.startsWith(`${field}:`)).map((line) => line.slice(field.length + 1).replace(/^ /, ""));
  return { name: values("event")[0] ?? "", data: values("data").join("\n") };
}

/** @param {number} ms @param {AbortSignal} stopped */
const within = (ms, stopped) => AbortSignal.any([stopped, AbortSignal.timeout(ms)]);

/** @param {number} ms @param {AbortSignal} stopped @returns {Promise<void>} */
function sleep(ms, stopped) {
  return new Promise((resolve, reject) => {
    const stop = () => {
      clearTimeout(timer);
      reject(stopped.reason);
    };
    const timer = setTimeout(() => {
      stopped.removeEventListener("abort", stop);
      resolve();
    }, ms);
    if (stopped.aborted) stop();
    else stopped.addEventListener("abort", stop, { once: true });
  });
}
