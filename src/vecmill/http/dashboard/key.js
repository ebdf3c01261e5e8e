// The API key that a person typed in, kept while the tab is open. Knows nothing of what is asked with it.

import { field, put } from "./elements.js";

const STORED_AS = "vecmill-api-key";

let refused = false;

// Whether the last answer was that a key is missing or wrong. Until there is another, asking again only adds errors.
export const isRefused = () => refused;

// After a restart the service may want another key, or none.
export function forgetRefusal() {
  refused = false;
}

export async function fetchWithKey(path, options) {
  const key = sessionStorage.getItem(STORED_AS);
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const answer = await fetch(path, { ...options, headers });
  // The answer to an older key says nothing of the one that was typed in meanwhile.
  if (sessionStorage.getItem(STORED_AS) === key) show(answer.status === 401, key);
  return answer;
}

function show(isRefusal, key) {
  refused = isRefusal;
  if (refused && key) {
    sessionStorage.removeItem(STORED_AS);
    put(document, "key-problem", "The service does not know this key.");
  }
  const form = field(document, "key-form");
  if (!refused && form.contains(document.activeElement)) document.getElementById("load-heading").focus();
  form.hidden = !refused;
}

export function watchKeyForm(then) {
  field(document, "key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const input = field(document, "key");
    sessionStorage.setItem(STORED_AS, input.value.trim());
    input.value = "";
    input.focus();
    put(document, "key-problem", "");
    refused = false;
    then();
  });
}
