// The AI SDK, cohere-ai, @langchain/cohere, ollama, voyageai and @huggingface/inference.

import assert from "node:assert/strict";
import { test } from "node:test";
import { createCohere } from "@ai-sdk/cohere";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { InferenceClient } from "@huggingface/inference";
import { CohereEmbeddings, CohereRerank } from "@langchain/cohere";
import { embed, embedMany, rerank } from "ai";
import { CohereClient, CohereClientV2, CohereError } from "cohere-ai";
import { Ollama } from "ollama";
import { VoyageAIClient } from "voyageai";
import { DOCUMENTS, LOCKED_URL, MODEL, QUERY, TEXTS, TOKENS, URL, VECTORS, assertRanking, assertVectors } from "./given.js";

test("AI SDK, OpenAI-compatible", async () => {
  const provider = createOpenAICompatible({ name: "vecmill", baseURL: `${URL}/v1`, apiKey: "none" });
  const many = await embedMany({ model: provider.embeddingModel("m"), values: TEXTS });
  assertVectors(many.embeddings);
  assert.equal(many.usage.tokens, TOKENS);
  const one = await embed({ model: provider.embeddingModel("m"), value: TEXTS[2] });
  assertVectors([one.embedding], [VECTORS[2]]);
});

test("AI SDK, Cohere", async () => {
  const provider = createCohere({ baseURL: `${URL}/v2`, apiKey: "none" });
  const many = await embedMany({ model: provider.embeddingModel("m"), values: TEXTS });
  assertVectors(many.embeddings);
  assert.equal(many.usage.tokens, TOKENS);
  const { ranking } = await rerank({ model: provider.reranking("m"), query: QUERY, documents: DOCUMENTS, topN: 2 });
  assertRanking(ranking.map((found) => [found.originalIndex, found.score]), 2);
});

test("cohere-ai, both versions", async () => {
  const v2 = new CohereClientV2({ token: "none", environment: URL });
  const embedded = await v2.embed({ model: "m", texts: TEXTS, inputType: "search_query", embeddingTypes: ["float"] });
  assertVectors(embedded.embeddings.float);
  const ranked = await v2.rerank({ model: "m", query: QUERY, documents: DOCUMENTS, topN: 2 });
  assertRanking(ranked.results.map((found) => [found.index, found.relevanceScore]), 2);
  const v1 = new CohereClient({ token: "none", environment: URL });
  assertVectors((await v1.embed({ model: "m", texts: TEXTS, inputType: "search_query" })).embeddings);
});

test("cohere-ai with a wrong key", async () => {
  const client = new CohereClientV2({ token: "not-the-key", environment: LOCKED_URL });
  await assert.rejects(client.rerank({ model: MODEL, query: QUERY, documents: DOCUMENTS }), (error) => {
    assert.ok(error instanceof CohereError);
    assert.equal(error.statusCode, 401);
    return true;
  });
});

test("@langchain/cohere", async () => {
  const client = new CohereClient({ token: "none", environment: URL });
  assertVectors(await new CohereEmbeddings({ model: "m", client }).embedDocuments(TEXTS));
  const ranked = await new CohereRerank({ model: "m", client, topN: 2 }).rerank(DOCUMENTS, QUERY);
  assertRanking(ranked.map((found) => [found.index, found.relevanceScore]), 2);
});

test("ollama", async () => {
  const answer = await new Ollama({ host: URL }).embed({ model: "m", input: TEXTS });
  assertVectors(answer.embeddings);
  assert.equal(answer.prompt_eval_count, TOKENS);
});

test("voyageai", async () => {
  const client = new VoyageAIClient({ apiKey: "none", environment: `${URL}/v1` });
  const embedded = await client.embed({ model: "m", input: TEXTS, inputType: "query" });
  assertVectors(embedded.data.map((entry) => entry.embedding));
  const ranked = await client.rerank({ model: "m", query: QUERY, documents: DOCUMENTS, topK: 2 });
  assertRanking(ranked.data.map((found) => [found.index, found.relevanceScore]), 2);
});

test("@huggingface/inference", async () => {
  const client = new InferenceClient("none", { endpointUrl: URL });
  assertVectors(await client.featureExtraction({ inputs: TEXTS }));
});
