// Where the servers are and what they must answer, from the file that VECMILL_CLIENTS_GIVEN names.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";

const given = JSON.parse(readFileSync(process.env.VECMILL_CLIENTS_GIVEN, "utf-8"));

export const URL = given.url;
export const LOCKED_URL = given.locked_url; // wants KEY and knows models by their names only
export const KEY = given.key;
export const MODEL = given.model;
export const TEXTS = given.texts;
export const VECTORS = given.vectors;
export const TOKENS = given.tokens;
export const LONG_TEXT = given.long_text;
export const QUERY = given.query;
export const DOCUMENTS = given.documents;
export const SCORES = given.cosines.map((cosine) => (1 + cosine) / 2);
export const RANKING = [...SCORES.keys()].sort((one, other) => SCORES[other] - SCORES[one]);

const dot = (one, other) => one.reduce((sum, value, index) => sum + value * other[index], 0);

/** As many, in this order, of this direction and of length 1. */
export function assertVectors(answered, right = VECTORS) {
  assert.equal(answered.length, right.length);
  answered.forEach((vector, index) => {
    assert.equal(vector.length, right[index].length);
    assert.ok(Math.abs(Math.hypot(...vector) - 1) < 1e-3, `length of vector ${index}`);
    const cosine = dot(vector, right[index]) / (Math.hypot(...vector) * Math.hypot(...right[index]));
    assert.ok(cosine > 0.9999, `vector ${index}`);
  });
}

/** [index, score] of the best `topN`, best first. */
export function assertRanking(pairs, topN) {
  assert.deepEqual(pairs.map(([index]) => index), RANKING.slice(0, topN));
  for (const [index, score] of pairs) {
    assert.ok(Math.abs(score - SCORES[index]) < 1e-4, `document ${index}`);
  }
}
