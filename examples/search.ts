#!/usr/bin/env node
/**
 * Search in TypeScript without a package: embed texts, take the nearest by cosine, rerank them.
 *
 * Node.js runs this file as it stands from 22.18 on; Deno and Bun do, too. Texts are the lines of a file, and the vectors
 * are computed anew at each run: the server's cache answers what it has computed before.
 *
 *     vecmill serve &
 *     node examples/search.ts notes.txt "where are the keys kept?"
 *     VECMILL_URL=http://spark:8080 API_KEY=... node examples/search.ts notes.txt "where are the keys kept?"
 */

import { readFile } from "node:fs/promises";

const url = (process.env.VECMILL_URL ?? "http://127.0.0.1:8080").replace(/\/+$/, "");
const batch = 64; // texts per request
const candidates = 30; // texts by cosine that the reranker sees
const tries = 5; // of a request that a busy server refuses

interface Embeddings {
  data: { index: number; embedding: number[] }[];
}

interface Ranking {
  results: { index: number; relevance_score: number }[];
}

async function post<Answer>(path: string, body: unknown): Promise<Answer> {
  const headers: Record<string, string> = { "Content-Type": "application/json" };
  if (process.env.API_KEY) headers.Authorization = `Bearer ${process.env.API_KEY}`;
  for (let attempt = 1; ; attempt++) {
    const response = await fetch(url + path, { method: "POST", headers, body: JSON.stringify(body) });
    if (response.ok) return (await response.json()) as Answer;
    const seconds = Number(response.headers.get("retry-after") ?? NaN);
    if (![429, 503].includes(response.status) || Number.isNaN(seconds) || attempt === tries) {
      throw new Error(`POST ${path} was answered with status ${response.status}: ${await response.text()}`);
    }
    await new Promise((resolve) => setTimeout(resolve, 1000 * seconds));
  }
}

/** Unit vectors in the texts' order. `inputType` gives them the model's prompt: query or passage. */
async function embed(texts: string[], inputType: "query" | "passage"): Promise<Float32Array[]> {
  const vectors: Float32Array[] = [];
  for (let start = 0; start < texts.length; start += batch) {
    const input = texts.slice(start, start + batch);
    const answer = await post<Embeddings>("/v1/embeddings", { input, input_type: inputType });
    for (const entry of answer.data) vectors[start + entry.index] = normalised(entry.embedding);
  }
  return vectors;
}

function normalised(values: number[]): Float32Array {
  const length = Math.hypot(...values);
  return Float32Array.from(values, (value) => value / length);
}

function dot(left: Float32Array, right: Float32Array): number {
  return left.reduce((sum, value, index) => sum + value * right[index], 0);
}

async function search(texts: string[], query: string, top: number): Promise<[number, string][]> {
  const vectors = await embed(texts, "passage");
  const [queryVector] = await embed([query], "query");
  const scores = vectors.map((vector) => dot(vector, queryVector));
  const nearest = [...texts.keys()].sort((left, right) => scores[right] - scores[left]).slice(0, candidates);
  const documents = nearest.map((index) => texts[index]);
  const ranking = await post<Ranking>("/v1/rerank", { query, documents, top_n: Math.min(top, documents.length) });
  return ranking.results.map((result) => [result.relevance_score, documents[result.index]]);
}

async function main(): Promise<void> {
  const [path, query] = process.argv.slice(2);
  if (!path || !query) throw new Error("usage: search.ts FILE QUERY");
  const texts = (await readFile(path, "utf8")).split("\n").filter((line) => line.trim());
  if (!texts.length) throw new Error(`There is no text in ${path}.`);
  for (const [score, text] of await search(texts, query, 5)) console.log(`${score.toFixed(3)}  ${text}`);
}

main().catch((error: Error) => {
  const refused = error instanceof TypeError && error.cause; // fetch's error where nothing answers
  console.error(refused ? `No server answers at ${url} (${error.cause}); start \`vecmill serve\` or set VECMILL_URL.` : error.message);
  process.exitCode = 1;
});
