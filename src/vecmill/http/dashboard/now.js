// Who uses the server, and whom it refused. Knows `who`, `refusals` and the counts of errors in a snapshot.

/** @import { Maybe, Refusal, Snapshot, User } from "./types" */

import { byId, h, heads, named, put, refill, setText, showRows, time } from "./elements.js";
import { UNKNOWN, compact, count, join, known, plural, rate, words } from "./format.js";

byId("who-table").prepend(heads("Client", "Job", "Texts/s.number", "Tokens/s.number.wide", "Requests.number.wide", "Last seen"));
byId("refusals-table").prepend(heads("When", "Why", "Who.wide"));

/** @param {Maybe<User[]>} users */
export function showWho(users) {
  const table = byId("who-table");
  const items = users ?? [];
  showRows(table.tBodies[0], items, (user) => JSON.stringify([user.key, user.client, user.job]), newUser, fillUser);
  show(table, "who-empty", items.length, users ? "Nobody has asked for anything in the last 5 minutes." : null);
}

const newUser = () =>
  h("tr", h("td.name", h("bdi"), h("bdi.quiet.line")), h("td", h("bdi")), h("td.number"),
    h("td.number.wide"), h("td.number.wide"), h("td.quiet"));

/** @param {any} row @param {User} user */
function fillUser(row, user) {
  const [who, job, texts, tokens, requests, seen] = row.cells;
  fillName(who, user);
  setText(job.firstChild, user.job ? named(user.job_name ?? user.job) : UNKNOWN);
  setText(texts, rate(user.texts_per_second));
  setText(tokens, compact(user.tokens_per_second));
  setText(requests, count(user.requests));
  refill(seen, `${user.last_seen}`, () => time(user.last_seen));
}

/** @param {Snapshot} snapshot */
export function showRefusals({ refusals, now }) {
  const table = byId("refusals-table");
  const items = refusals ?? [];
  showRows(table.tBodies[0], items, (refusal) => `${refusal.request_id} ${refusal.at}`, newRefusal, fillRefusal);
  const none = "Nothing has been refused and nothing has failed since the start.";
  show(table, "refusals-empty", items.length, refusals ? none : null);
  const failed = known(now?.errors) && `${plural(now?.errors, "error")} of the server's own`;
  const refused = known(now?.refused) && `${count(now?.refused)} refused for the load`;
  const since = (failed || refused) && "since the start";
  put(document, "refusals-summary", join([failed, refused, since]));
}

const newRefusal = () =>
  h("tr", h("td.quiet"), h("td.name", h("span.badge"), " ", h("bdi"), h("span.quiet.line", h("code"), " ", h("code"))),
    h("td.wide", h("bdi"), h("bdi.quiet.line")));

/** They do not change: filled once. @param {any} row @param {Refusal} refusal */
function fillRefusal(row, refusal) {
  const [when, why, who] = row.cells;
  refill(when, `${refusal.at}`, () => time(refusal.at));
  row.dataset.status = refusal.status >= 500 ? "failed" : "refused";
  setText(why.querySelector(".badge"), `${refusal.status} ${words(refusal.error)}`);
  setText(why.querySelector("bdi"), refusal.reason ?? "");
  const [path, id] = why.querySelectorAll("code");
  setText(path, refusal.path ?? "no route");
  setText(id, refusal.request_id);
  fillName(who, refusal);
}

/** @param {any} cell @param {User | Refusal} who */
function fillName(cell, { key, client }) {
  setText(cell.children[0], key ?? client ?? "unknown");
  setText(cell.children[1], (key ?? null) === null ? "" : (client ?? ""));
}

/** @param {HTMLElement} table @param {string} id @param {number} rows @param {string | null} none if it is known that there is none */
function show(table, id, rows, none) {
  table.hidden = rows === 0;
  byId(id).hidden = rows > 0;
  setText(byId(id), none ?? "This is shown to keys with the scope admin.");
}
