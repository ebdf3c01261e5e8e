// A table of work that goes on: jobs or batches, a page of the server's at a time. Knows its rows, its pages and how one is
// cancelled; what a row says, `factsOf` tells.

/** @import { Page } from "./types" */

import { around, ask, attempt, byId, field, goTo, h, heads, named, put, refill, setBar, setName, setOrHide, setText, showRows, tell } from "./elements.js";
import { UNKNOWN, count, join, known, words } from "./format.js";
import { call } from "./server.js";

const ROWS = 25; // on a page

/**
 * @typedef {object} Facts
 * @property {string} name
 * @property {import("./elements.js").Content} about what stands below the name
 * @property {string} progress in words
 * @property {number | null} done of `total`, while it runs
 * @property {number} total
 * @property {string | null} warning
 * @property {string | null | undefined} problem
 * @property {string} rate
 * @property {string} left
 * @property {boolean} isOpen whether it can be cancelled
 */

/**
 * @template {{ id: string, status: string }} T
 * @typedef {object} Kind
 * @property {string} list its name, as in the ids of index.html
 * @property {string} noun
 * @property {string} first the head of the first column
 * @property {(item: T) => Facts} factsOf
 * @property {string} extra the element of the last column but one
 * @property {string} extraHead
 * @property {(cell: any, item: T, name: string) => void} fillExtra
 * @property {(kind: string) => any} empty what is shown in place of no rows: `unknown`, `none` or `none found`
 * @property {() => boolean} [isChosen] whether only some are asked for
 * @property {[string, (item: T) => string]} cancel method and path
 * @property {string} whatStays once it is cancelled
 * @property {(action: string, item: T) => unknown} act on a button of a row
 */

/** @template {{ id: string, status: string }} T */
export class WorkTable {
  page = 1;
  /** @type {Map<string, T>} */
  shown = new Map();
  /** @type {() => void} */
  askAgain = () => {};

  /** @param {Kind<T>} kind */
  constructor(kind) {
    this.kind = kind;
    const { list, first, extraHead } = kind;
    this.table = byId(`${list}-table`);
    const head = heads(first, "State", "Progress", "Rate.number.wide", "Time left.number.wide", extraHead, "");
    head.rows[0].lastChild.append(h("span.unseen", "Cancel"));
    this.table.prepend(head);
    this.table.addEventListener("click", (/** @type {Event} */ event) => {
      const button = around(event, "[data-action]");
      const item = this.shown.get(button?.closest("tr").dataset.key);
      if (item !== undefined) void (button.dataset.action === "cancel" ? this.#cancel(item) : kind.act(button.dataset.action, item));
    });
    this.text = h("span", { role: "status" });
    this.before = h("button", { type: "button", onclick: () => this.turnTo(this.page - 1), "aria-label": `Previous page of ${list}` }, "Previous");
    this.after = h("button", { type: "button", onclick: () => this.turnTo(this.page + 1), "aria-label": `Next page of ${list}` }, "Next");
    byId(`${list}-pager`).append(this.text, this.before, this.after);
  }

  /** @param {number} page */
  turnTo(page) {
    this.page = page;
    this.table.parentElement.scrollTo(0, 0);
    this.askAgain();
  }

  /** @param {Page<T> | null | undefined} answer */
  show(answer) {
    const { list, empty, isChosen } = this.kind;
    const items = answer?.items ?? [];
    this.shown = new Map(items.map((item) => [item.id, item]));
    showRows(this.table.tBodies[0], items, (item) => item.id, () => this.#newRow(), (row, item) => this.#fill(row, item));
    this.table.hidden = items.length === 0;
    const room = byId(`${list}-empty`);
    room.hidden = items.length > 0;
    const kind = !answer ? "unknown" : isChosen?.() ? "none found" : "none";
    refill(room, kind, () => (kind === "unknown" ? `The list of ${list} is not available.` : empty(kind)));
    this.#showPages(answer ?? { counts: null, page: 1, pages: 1, total: 0, items: [] });
  }

  /** @param {Page<T>} answer */
  #showPages({ page, pages, total, items, counts }) {
    this.page = page; // the server gives the last one where there are fewer
    const from = ROWS * (page - 1);
    const range = pages > 1 ? `${count(from + 1)}–${count(from + items.length)} of ` : "";
    setText(this.text, total > 0 ? `${range}${count(total)} ${total === 1 ? this.kind.noun : this.kind.list}` : "");
    this.before.hidden = this.after.hidden = pages <= 1;
    this.before.disabled = page <= 1;
    this.after.disabled = page >= pages;
    const open = OPEN.map((status) => counts?.[status] && `${count(counts[status])} ${words(status)}`);
    put(document, `${this.kind.list}-summary`, join(open.map((text) => text || null)));
  }

  #newRow() {
    const part = (/** @type {string} */ name) => h(name, { dir: "auto" });
    return h("tr",
      h("td.name", part("button.link@name"), part("bdi.quiet.line@about")),
      h("td", h("span.badge@status")),
      h("td.progress", h("progress"), h("span.quiet.line@progress"), h("span.warn.line@warning"), part("span.problem.line@problem"),
        h("span.quiet.line.narrow@pace")),
      h("td.number.wide@rate"),
      h("td.number.wide@left"),
      h(this.kind.extra),
      h("td.action", h("button", { type: "button", "data-action": "cancel" }, "Cancel")));
  }

  /** @param {any} row @param {T} item */
  #fill(row, item) {
    const facts = this.kind.factsOf(item);
    const name = named(facts.name);
    row.dataset.status = item.status;
    const button = field(row, "name");
    button.type = "button";
    button.dataset.action = "detail";
    setName(button, facts.name);
    refill(field(row, "about"), `${item.id}`, () => facts.about);
    setText(field(row, "status"), words(item.status));
    setText(field(row, "progress"), facts.progress);
    setOrHide(field(row, "warning"), facts.warning);
    setOrHide(field(row, "problem"), facts.problem);
    setText(field(row, "pace"), facts.left && join([facts.rate, facts.left !== UNKNOWN && `${facts.left} left`]));
    setText(field(row, "rate"), facts.rate);
    setText(field(row, "left"), facts.left);
    setBar(row.querySelector("progress"), facts.done, facts.total, `Progress of ${name}`);
    this.kind.fillExtra(row.cells[5], item, name);
    const cancel = row.querySelector("[data-action=cancel]");
    if (!facts.isOpen && cancel === document.activeElement) goTo(row);
    cancel.hidden = !facts.isOpen;
    cancel.setAttribute("aria-label", `Cancel ${name}`);
  }

  /** @param {T} item */
  async #cancel(item) {
    const { noun, cancel, whatStays, factsOf } = this.kind;
    const name = named(factsOf(item).name);
    if (!(await ask(`Cancel ${name}?`, whatStays, `Cancel the ${noun}`))) return;
    await attempt(`${name} was not cancelled`, async () => {
      await call(cancel[0], cancel[1](item));
      tell(`${name} is cancelled.`);
    });
    this.askAgain();
  }
}

const OPEN = ["active", "queued", "validating", "in_progress", "finalizing", "cancelling"];

/** @param {string} name @param {[string, any][]} facts those that are known are shown */
export function showDetail(name, facts) {
  const dialog = byId("detail");
  setName(byId("detail-title"), name);
  const shown = facts.filter(([, value]) => value || known(value));
  dialog.querySelector("dl").replaceChildren(...shown.map(([name, value]) => h("div", h("dt", name), h("dd", { dir: "auto" }, value))));
  if (!dialog.open) dialog.showModal();
}
