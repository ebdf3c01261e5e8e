// Texts compared and documents ranked by the server's own routes, and the programs that would have asked the same.

/** @import { ListedModel, Snapshot } from "./types" */

import { byId, h, heads, put, refill } from "./elements.js";
import { count, join, known, milliseconds, plural } from "./format.js";
import { call, CallFailed } from "./server.js";
import { address, choice, clientsOf, codeBlock, programsOf } from "./snippets.js";

const MOST_TEXTS = 16; // of a matrix that can still be read
const MOST_DOCUMENTS = 50;
const WAIT_MS = 120_000;

const compareForm = byId("compare");
const rankForm = byId("rank");

let withKey = false;
/** @type {ListedModel[]} */
let models = [];
let listedFor = "";
let client = "CodeCartographer";

/** What can be chosen follows what is loaded. @param {Snapshot} snapshot */
export function showPlayground(snapshot) {
  withKey = snapshot.keys_in_use;
  put(document, "address", address());
  put(document, "key-needed", withKey ? "needed; the snippets read it from the environment" : "none needed");
  const loaded = `${snapshot.ready} ${(snapshot.models ?? []).map((model) => `${model.id} ${model.state}`)}`;
  if (loaded !== listedFor && !byId("panel-playground").hidden) {
    listedFor = loaded;
    void listModels();
  }
  showClient();
}

async function listModels() {
  try {
    models = (await (await call("GET", "v1/models")).json()).data;
  } catch {
    listedFor = ""; // asked again with the next snapshot
    return;
  }
  const of = (/** @type {string} */ task) => models.filter((model) => model.task === task).map((model) => model.id);
  options(compareForm.elements.model, of("embed"));
  options(rankForm.elements.model, [...of("rerank"), ...of("embed")]);
  showChoices();
  showClient();
}

/** @param {HTMLSelectElement} select @param {string[]} values @param {(value: string) => string} [label] */
function options(select, values, label = (value) => value) {
  const chosen = select.value;
  refill(select, JSON.stringify(values), () => values.map((value) => h("option", { value }, label(value))));
  if (values.includes(chosen)) select.value = chosen; // a model that comes or goes does not take away what is chosen
}

/** Prompts and dimensions of the model that is chosen. */
function showChoices() {
  const model = models.find((one) => one.id === compareForm.elements.model.value);
  const byDefault = model?.default_prompt_name;
  options(compareForm.elements.prompt, ["", ...Object.keys(model?.prompts ?? {})], (name) =>
    name || (byDefault ? `the model's default (${byDefault})` : "none"),
  );
  const sizes = model?.supported_dimensions;
  const list = Array.isArray(sizes) ? sizes : [];
  refill(byId("compare-sizes"), JSON.stringify(list), () => list.map((size) => h("option", { value: size })));
  const input = compareForm.elements.dimensions;
  input.max = String(Array.isArray(sizes) ? Math.max(...sizes, 1) : (sizes?.max ?? model?.dimensions ?? ""));
  input.min = String(Array.isArray(sizes) ? Math.min(...sizes) : (sizes?.min ?? 1));
  input.placeholder = known(model?.dimensions) ? `all ${model?.dimensions}` : "all";
}

function showClient() {
  const first = (/** @type {string} */ task) => models.find((model) => model.task === task)?.id;
  const embed = first("embed") ?? "default";
  const { code, note } = clientsOf({ withKey, embed, rerank: first("rerank") ?? embed })[client] ?? { code: "" };
  refill(byId("first-snippet"), code + note, () => [codeBlock(code, `the snippet for ${client}`), note ? h("p.quiet", note) : null]);
}

/** @param {string} text */
const linesOf = (text) => text.split("\n").map((line) => line.trim()).filter(Boolean);

/**
 * One call of a form: its button waits, and what came of it is shown in its place.
 * @param {HTMLFormElement} form @param {HTMLElement} outcome @param {string} path
 * @param {() => Record<string, unknown>} bodyOf raises CallFailed @param {(answer: any, body: any, note: string) => any} show
 */
async function run(form, outcome, path, bodyOf, show) {
  const button = /** @type {HTMLButtonElement} */ (form.querySelector("[type=submit]"));
  button.disabled = true;
  try {
    const body = bodyOf();
    const began = performance.now();
    const answer = await call("POST", path.slice(1), body, WAIT_MS);
    const parsed = await answer.json();
    const took = `${milliseconds(performance.now() - began)} to this page and back`;
    outcome.replaceChildren(...[show(parsed, body, took), programs({ path, body, withKey })].flat());
  } catch (error) {
    outcome.replaceChildren(h("p.problem", { role: "alert" }, sentence(/** @type {CallFailed} */ (error).message)));
  } finally {
    button.disabled = false;
  }
}

/** @param {string} text */
const sentence = (text) => (text ? text[0]?.toUpperCase() + text.slice(1) : "");

/** @param {Parameters<typeof programsOf>[0]} asked */
function programs(asked) {
  const texts = programsOf(asked);
  const room = h("div");
  const show = (/** @type {string} */ language) => room.replaceChildren(codeBlock(texts[language] ?? "", `the call of ${asked.path} in ${language}`));
  const name = `language-${asked.path}`;
  show("curl");
  return h("div", h("fieldset.switch", h("legend.quiet", "The same call"), choice(name, Object.keys(texts), show)), room);
}

/** @returns {Record<string, unknown>} */
function compareBody() {
  const input = linesOf(byId("compare-texts").value);
  if (input.length < 2 || input.length > MOST_TEXTS) {
    throw new CallFailed(`${plural(input.length, "text")}: write 2 to ${MOST_TEXTS}, one on each line.`);
  }
  const { model, prompt, dimensions } = compareForm.elements;
  return {
    model: model.value,
    input,
    ...(prompt.value && { prompt_name: prompt.value }),
    ...(dimensions.value && { dimensions: Number(dimensions.value) }),
  };
}

/** @param {{ data: { embedding: number[] }[], usage?: { prompt_tokens?: number } }} answer @param {{ input: string[], model: string }} body @param {string} took */
function showMatrix(answer, body, took) {
  const vectors = answer.data.map((entry) => entry.embedding);
  const rows = vectors.map((row, index) =>
    h("tr", h("th.text", { scope: "row", title: body.input[index] }, `${index + 1} `, h("bdi", body.input[index])),
      vectors.map((column) => cell(cosine(row, column)))),
  );
  const facts = [plural(vectors.length, "text"), plural(answer.usage?.prompt_tokens, "token"), plural(vectors[0]?.length, "dimension"), took];
  return [
    // Above the table, not in it: a table that is scrolled would take half of it along.
    h("p.quiet", "Cosine similarity of each text to each other: 1 is the same direction, 0 nothing in common."),
    h("div.scroll", { tabindex: "0", role: "region", "aria-label": "Similarity of the texts" },
      h("table.matrix", { "aria-label": "Cosine similarity" },
        heads("Text", ...vectors.map((_, index) => `${index + 1}.number`)), h("tbody", rows))),
    h("p.quiet", join(facts)),
  ];
}

/** Darker is more alike. The number says it too. @param {number} value */
function cell(value) {
  const element = h("td.number", value.toFixed(2).replace("-0.00", "0.00"));
  element.style.setProperty("--share", Math.max(0, Math.min(1, value)).toFixed(3));
  return element;
}

/** @param {number[]} one @param {number[]} other */
function cosine(one, other) {
  let product = 0;
  let ones = 0;
  let others = 0;
  one.forEach((value, index) => {
    const beside = other[index] ?? 0;
    product += value * beside;
    ones += value * value;
    others += beside * beside;
  });
  return product / Math.sqrt(ones * others || 1);
}

/** @returns {Record<string, unknown>} */
function rankBody() {
  const documents = linesOf(byId("rank-documents").value);
  if (documents.length < 1 || documents.length > MOST_DOCUMENTS) {
    throw new CallFailed(`${plural(documents.length, "document")}: write 1 to ${MOST_DOCUMENTS}, one on each line.`);
  }
  return { model: rankForm.elements.model.value, query: byId("rank-query").value, documents };
}

/** @param {any} answer @param {{ documents: string[], model: string }} body @param {string} took */
function showRanking(answer, body, took) {
  const rows = answer.results.map((/** @type {{ index: number, relevance_score: number }} */ result, /** @type {number} */ place) => {
    const bar = h("progress", { max: 1, value: result.relevance_score, "aria-hidden": "true" });
    return h("tr", h("td.number", count(place + 1)), h("td.number", result.relevance_score.toFixed(4), bar),
      h("td.text", h("bdi", body.documents[result.index])));
  });
  const method = answer.meta?.method ?? "";
  const isReranker = models.find((model) => model.id === answer.model)?.task === "rerank";
  const how = isReranker
    ? `Scored by the reranker ${answer.model}.`
    : `No reranker has scored this: the score is the ${method || "cosine"} of the embeddings of ${answer.model}, brought to 0 to 1${method === "cosine" ? " (0.5: nothing in common)" : ""}.`;
  return [
    h("div.scroll", { tabindex: "0", role: "region", "aria-label": "Ranking" },
      h("table", h("caption", how), heads("Place.number", "Score, 0 to 1.number", "Document"), h("tbody", rows))),
    h("p.quiet", join([plural(body.documents.length, "document"), plural(answer.meta?.tokens?.input_tokens, "token"), took])),
  ];
}

export function watchPlayground() {
  byId("first-choice").append(...choice("client", ["CodeCartographer", "QMD", "OpenAI SDK"], (chosen) => {
    client = chosen;
    showClient();
  }));
  compareForm.elements.model.addEventListener("change", showChoices);
  compareForm.addEventListener("submit", (/** @type {Event} */ event) => {
    event.preventDefault();
    void run(compareForm, byId("compare-outcome"), "/v1/embeddings", compareBody, showMatrix);
  });
  rankForm.addEventListener("submit", (/** @type {Event} */ event) => {
    event.preventDefault();
    void run(rankForm, byId("rank-outcome"), "/v1/rerank", rankBody, showRanking);
  });
}
