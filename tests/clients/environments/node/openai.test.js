// openai and @langchain/openai ask for base64 by default and decode it without a look at what came.

import assert from "node:assert/strict";
import { test } from "node:test";
import { OpenAIEmbeddings } from "@langchain/openai";
import OpenAI from "openai";
import { KEY, LOCKED_URL, LONG_TEXT, MODEL, TEXTS, TOKENS, URL, VECTORS, assertVectors } from "./given.js";

const client = new OpenAI({ baseURL: `${URL}/v1`, apiKey: "none", maxRetries: 0 });
const locked = new OpenAI({ baseURL: `${LOCKED_URL}/v1`, apiKey: KEY, maxRetries: 0 });

test("base64, the default", async () => {
  const answer = await client.embeddings.create({ model: "m", input: TEXTS });
  assertVectors(answer.data.map((entry) => entry.embedding));
  assert.equal(answer.usage.prompt_tokens, TOKENS);
  assert.equal(answer.usage.total_tokens, TOKENS);
});

test("floats and one text", async () => {
  const floats = await client.embeddings.create({ model: "m", input: TEXTS, encoding_format: "float" });
  assertVectors(floats.data.map((entry) => entry.embedding));
  const one = await client.embeddings.create({ model: "m", input: TEXTS[1] });
  assertVectors(one.data.map((entry) => entry.embedding), [VECTORS[1]]);
});

test("models", async () => {
  const ids = [];
  for await (const model of client.models.list()) ids.push(model.id);
  assert.deepEqual(ids, [MODEL]);
});

test("errors are the client's own", async () => {
  assertVectors((await locked.embeddings.create({ model: MODEL, input: TEXTS })).data.map((entry) => entry.embedding));
  await assert.rejects(locked.embeddings.create({ model: "nope", input: TEXTS }), (error) => {
    assert.ok(error instanceof OpenAI.NotFoundError);
    assert.equal(error.code, "model_not_found");
    return true;
  });
  await assert.rejects(
    locked.withOptions({ apiKey: "not-the-key" }).embeddings.create({ model: MODEL, input: TEXTS }),
    OpenAI.AuthenticationError,
  );
  await assert.rejects(client.embeddings.create({ model: "m", input: LONG_TEXT, truncate: "NONE" }), (error) => {
    assert.ok(error instanceof OpenAI.BadRequestError);
    assert.match(error.message, /maximum context length/);
    return true;
  });
});

test("@langchain/openai", async () => {
  const embeddings = new OpenAIEmbeddings({ model: "m", apiKey: "none", configuration: { baseURL: `${URL}/v1` } });
  assertVectors(await embeddings.embedDocuments(TEXTS));
  assertVectors([await embeddings.embedQuery(TEXTS[2])], [VECTORS[2]]);
});
