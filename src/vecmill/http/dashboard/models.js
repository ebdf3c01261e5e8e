// The models: what each is, holds and was last asked, and how one is loaded, unloaded and pulled.

/** @import { Model, Snapshot } from "./types" */

import { ask, attempt, byId, h, put, refill, setBar, setOrHide, setText, showRows, tell, time } from "./elements.js";
import { bytes, count, join, known, milliseconds, plural, rate, unit, words } from "./format.js";
import { call } from "./server.js";

const UNDER_WAY = new Set(["loading", "pulling", "unloading"]);
const CALL_MS = 30_000;

/** @type {[string, (model: Model) => any][]} */
const FACTS = [
  ["Dimensions", (model) => sizes(model.dimensions)],
  ["Precision", (model) => join([model.dtype, model.dtype_reason])],
  ["Longest text", (model) => known(model.max_tokens) && plural(model.max_tokens, "token")],
  ["Memory held", (model) => (known(model.memory_bytes) ? bytes(model.memory_bytes) : null)],
  ["Sleeps in", (model) => known(model.sleeping_bytes) && `${bytes(model.sleeping_bytes)} of the machine's memory`],
  ["Last used", (model) => (known(model.last_used) ? time(model.last_used) : model.state === "loaded" && "not yet")],
  ["Loaded", (model) => known(model.loaded_at) && time(model.loaded_at)],
  ["Budget", (model) => model.budget && `${count(model.budget.tokens)} tokens and ${count(model.budget.rows)} rows a pass`],
  ["Fit", fitOf],
  ["Aliases", (model) => model.aliases?.length && model.aliases.join(", ")],
  ["Prompts", promptsOf],
  ["Revision", (model) => model.revision && h("code", model.revision)],
  ["License", (model) => model.license],
];

/** @param {Model["dimensions"]} dimensions */
function sizes(dimensions) {
  if (known(dimensions)) return count(dimensions);
  if (Array.isArray(dimensions)) return dimensions.map(count).join(", ");
  return dimensions ? `${count(dimensions.min)} to ${count(dimensions.max)}` : null;
}

/** How long a pass takes, as it was measured. @param {Model} model */
function fitOf({ fit }) {
  if (!fit) return null;
  const line = `${milliseconds(fit.a_ms)} a pass + ${rate(fit.b_us_per_token)} µs a token`;
  return known(fit.changed_at) ? [line, ", as of ", time(fit.changed_at)] : line;
}

/** @param {Model} model */
function promptsOf({ prompts, default_prompt: byDefault }) {
  const entries = Object.entries(prompts ?? {});
  if (entries.length === 0) return null;
  const item = (/** @type {[string, string]} */ [name, text]) =>
    h("li", h("strong", name), name === byDefault ? " (default)" : "", text ? [" ", h("code", text)] : " (nothing before the text)");
  return h("ul", entries.map(item));
}

let mayChange = false;

/** @param {Snapshot} snapshot */
export function showModels(snapshot) {
  const models = snapshot.models;
  mayChange = snapshot.is_admin && (models ?? []).length > 0; // while the server starts there are none
  byId("pull").hidden = !mayChange;
  showRows(byId("models"), models ?? [], (model) => `${model.task} ${model.id}`, newCard, fillCard);
  const empty = byId("models-empty");
  empty.hidden = (models ?? []).length > 0;
  setText(empty, models ? "No model is loaded yet." : "The list of models is not available.");
  const loaded = (models ?? []).filter((model) => model.state === "loaded");
  const held = loaded.map((model) => model.memory_bytes).filter(known);
  const sum = held.length > 0 && held.length === loaded.length && `${bytes(held.reduce((all, one) => all + one, 0))} held`;
  put(document, "models-summary", join([models && `${count(loaded.length)} loaded`, sum]));
}

function newCard() {
  return h("article.card",
    h("div.heading", h("h3", h("bdi")), h("span.badge@state"), h("span.quiet@task"),
      h("div.tools", h("button", { type: "button", "data-action": "load" }, "Load"), h("button", { type: "button", "data-action": "unload" }, "Unload"))),
    h("div.loading", h("progress"), h("span.quiet@message")),
    h("dl.details"));
}

/** @param {any} card @param {Model} model */
function fillCard(card, model) {
  card.dataset.status = model.state;
  setText(card.querySelector("bdi"), model.id);
  setText(card.querySelector("[data-field=state]"), words(model.state) + (model.pinned ? ", pinned" : ""));
  setText(card.querySelector("[data-field=task]"), model.task === "rerank" ? "reranks" : model.task === "embed" ? "embeds" : "");
  const isUnderWay = UNDER_WAY.has(model.state);
  setBar(card.querySelector("progress"), isUnderWay ? model.progress : null, 100, `Progress of ${model.id}`);
  const message = join([isUnderWay && known(model.progress) && unit(count(model.progress), "%"), model.message]);
  setOrHide(card.querySelector("[data-field=message]"), message);
  card.querySelector("[data-field=message]").classList.toggle("problem", model.state === "failed");
  refill(card.querySelector("dl"), JSON.stringify(model), () =>
    FACTS.map(([name, read]) => [name, read(model)])
      .filter(([, value]) => value)
      .map(([name, value]) => h("div", h("dt", name), h("dd", value))),
  );
  const [load, unload] = card.querySelectorAll("button");
  load.hidden = !mayChange || !["unloaded", "sleeping", "failed"].includes(model.state);
  unload.hidden = !mayChange || !["loaded", "sleeping"].includes(model.state);
  const isNotHere = model.task === null; // its pull has failed: there is nothing to load
  setText(load, isNotHere ? "Pull again" : "Load");
  load.onclick = () => (isNotHere ? pull(model.id, model.revision) : change("load", named(model), `${model.id} is being loaded.`));
  unload.onclick = () => unloadModel(model);
  load.setAttribute("aria-label", `${load.textContent} ${model.id}`);
  unload.setAttribute("aria-label", `Unload ${model.id}`);
}

/** An embedding model and a reranker may have the same name. @param {Model} model */
const named = ({ id, task }) => ({ model: id, ...(task && { task }) });

/** @param {Model} model */
async function unloadModel(model) {
  const text = "Its memory is given back. The next request that names it has it loaded again.";
  if (await ask(`Unload ${model.id}?`, text, "Unload it")) await change("unload", named(model), `${model.id} is being unloaded.`);
}

/** @type {() => void} */
let askAgain = () => {};

/** @param {string} action @param {Record<string, string>} body @param {string} done */
async function change(action, body, done) {
  const answer = await attempt(body.model ?? "", () => call("POST", `models/${action}`, body, CALL_MS));
  if (answer !== undefined) tell(done);
  askAgain();
  return answer !== undefined;
}

/** @param {string} model @param {string | null | undefined} revision */
const pull = (model, revision) => change("pull", { model, ...(revision && { revision }) }, `${model} is being pulled.`);

/** @param {() => void} then called when something was done */
export function watchModels(then) {
  askAgain = then;
  const form = byId("pull");
  form.addEventListener("submit", async (/** @type {Event} */ event) => {
    event.preventDefault();
    const model = form.elements.model.value.trim();
    const revision = form.elements.revision.value.trim();
    if (await pull(model, revision)) form.reset();
  });
}
