// Calls as programs that can be copied. The key is read from the environment; it is never in the text.

import { copyButton, h } from "./elements.js";

const KEY = "VECMILL_API_KEY";
export const address = () => new URL(".", location.href).href.replace(/\/$/, "");

const json = (/** @type {unknown} */ value) => JSON.stringify(value);
const shell = (/** @type {string} */ text) => `'${text.replaceAll("'", "'\\''")}'`;

/** JSON's strings, numbers and lists are Python's and TypeScript's, too. @param {Record<string, unknown>} body @param {string} between */
const fieldsOf = (body, between) =>
  Object.entries(body).map(([name, value]) => `${between === ": " ? json(name) : name}${between}${literal(value)}`);

/** @param {unknown} value */
function literal(value) {
  if (!Array.isArray(value)) return json(value);
  return `[\n${value.map((entry) => `        ${json(entry)},\n`).join("")}    ]`;
}

/** @typedef {{ path: string, body: Record<string, unknown>, withKey: boolean }} Call */

/** @param {Call} asked */
function curl({ path, body, withKey }) {
  const key = withKey ? ` \\\n  -H "Authorization: Bearer $${KEY}"` : "";
  return `curl ${address()}${path}${key} \\\n  -H 'Content-Type: application/json' \\\n  -d ${shell(json(body))}`;
}

/** The client of OpenAI's, in Python. @param {boolean} withKey */
const openai = (withKey) => [
  withKey && "import os\n",
  "from openai import OpenAI\n",
  `client = OpenAI(base_url="${address()}/v1", api_key=${withKey ? `os.environ["${KEY}"]` : '"none"'})`,
];

/** @param {(string | false)[]} parts */
const lines = (parts) => parts.filter((part) => part !== false).join("\n");

// What OpenAI's client has no argument for goes into its `extra_body`.
const ARGUMENTS = new Set(["model", "input", "dimensions", "encoding_format"]);

/** @param {Call} asked */
function pythonOfOpenAI({ body, withKey }) {
  const [known, own] = [true, false].map((is) => Object.fromEntries(Object.entries(body).filter(([name]) => ARGUMENTS.has(name) === is)));
  const fields = fieldsOf(known ?? {}, "=");
  if (Object.keys(own ?? {}).length > 0) fields.push(`extra_body=${json(own)}`);
  return lines([
    ...openai(withKey),
    "answer = client.embeddings.create(",
    ...fields.map((line) => `    ${line},`),
    ")",
    'print(len(answer.data), "vectors of", len(answer.data[0].embedding))',
  ]);
}

/** @param {Call} asked */
const pythonOfRequests = ({ path, body, withKey }) =>
  lines([
    withKey && "import os\n",
    "import requests\n",
    withKey && `headers = {"Authorization": f"Bearer {os.environ['${KEY}']}"}`,
    "body = {",
    ...fieldsOf(body, ": ").map((line) => `    ${line},`),
    "}",
    `answer = requests.post("${address()}${path}", json=body${withKey ? ", headers=headers" : ""}, timeout=60)`,
    "answer.raise_for_status()",
    'for result in answer.json()["results"]:',
    '    print(result["relevance_score"], body["documents"][result["index"]])',
  ]);

/** @param {Call} asked */
const typescript = ({ path, body, withKey }) =>
  lines([
    `const answer = await fetch("${address()}${path}", {`,
    '  method: "POST",',
    `  headers: { "Content-Type": "application/json"${withKey ? `, Authorization: \`Bearer \${process.env.${KEY}}\`` : ""} },`,
    `  body: JSON.stringify(${JSON.stringify(body, null, 2).replaceAll("\n", "\n  ")}),`,
    "});",
    "if (!answer.ok) throw new Error(await answer.text());",
    "console.log(JSON.stringify(await answer.json()));",
  ]);

/** What was just done, in three languages. @param {Call} asked @returns {Record<string, string>} */
export const programsOf = (asked) => ({
  curl: curl(asked),
  Python: asked.path === "/v1/embeddings" ? pythonOfOpenAI(asked) : pythonOfRequests(asked),
  TypeScript: typescript(asked),
});

/** @param {{ withKey: boolean, embed: string, rerank: string }} known @returns {Record<string, { code: string, note?: string }>} */
export const clientsOf = ({ withKey, embed, rerank }) => ({
  CodeCartographer: {
    code: `set_project(path: "/path/to/project", provider: "dgx", dgx_endpoint: "${address()}/embed")`,
    ...(withKey && { note: "CodeCartographer sends no key, and this server needs one: give it a server without keys, on localhost or a tailnet." }),
  },
  QMD: {
    code: lines([
      "# ~/.config/qmd/index.yml",
      "remote:",
      `  url: ${address()}`,
      withKey && "  api_key: ${QMD_REMOTE_API_KEY}",
      "  models:",
      `    embed: ${embed}`,
      `    rerank: ${rerank}`,
    ]),
    note: "For the QMD that has a remote: section. Query expansion needs GENERATION_URL on this server.",
  },
  "OpenAI SDK": {
    code: lines([
      ...openai(withKey),
      `answer = client.embeddings.create(model="${embed}", input=["hello"])`,
      "print(len(answer.data[0].embedding))",
    ]),
    note: "Any client of OpenAI's embeddings works with this base URL: LangChain, LlamaIndex, LiteLLM, Open WebUI.",
  },
});

/** A text to be copied. @param {string} code @param {string} label */
export const codeBlock = (code, label) =>
  h("div.code", h("pre", { tabindex: "0", role: "region", "aria-label": label }, h("code", code)), copyButton(() => code, `Copy ${label}`));

/**
 * One of several, by radio buttons.
 * @param {string} name of the group @param {string[]} choices @param {(choice: string) => void} choose
 */
export function choice(name, choices, choose) {
  return choices.map((value, index) =>
    h("label", h("input", { type: "radio", name, value, checked: index === 0, onchange: () => choose(value) }), ` ${value}`),
  );
}
