// What the panes share: elements, the server, dialogs, diffs.
export const $ = (id) => document.getElementById(id);

export function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== false && value != null) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child != null && child !== false));
  return made;
}

export async function call(path, body = {}, signal) {
  const headers = { "content-type": "application/json", "x-dmoe-token": location.hash.slice(1).split("/")[0] };
  const answer = await fetch(`/api/${path}`, { method: "POST", headers, body: JSON.stringify(body), signal });
  const value = await answer.json();
  if (!answer.ok) throw new Error(value.error);
  return value;
}

// The last call alone counts: an earlier one is given up, and its answer never comes.
export function latest() {
  let current = null;
  return async (path, body) => {
    current?.abort();
    const mine = (current = new AbortController());
    const value = await call(path, body, mine.signal);
    if (mine !== current) throw new DOMException("stale", "AbortError");
    return value;
  };
}

export function later(wait, work) {
  let timer = 0;
  return (...args) => { clearTimeout(timer); timer = setTimeout(() => work(...args), wait); };
}

export function dialog(title, content, buttons = []) {
  const box = $("dialog");
  const close = () => box.close();
  const end = el("div", { class: "end" }, ...buttons.map(([text, work, kind]) =>
    el("button", { class: kind, onclick: () => { close(); work(); } }, text)), el("button", { onclick: close }, "Close"));
  box.replaceChildren(el("h3", {}, title), ...[content].flat(), end);
  if (!box.open) box.showModal();
  return box;
}

export function diffBlock(text) {
  if (!text) return el("p", { class: "faint" }, "No difference.");
  const kind = (line) => (/^\+(?!\+\+ )/.test(line) ? "plus" : /^-(?!-- )/.test(line) ? "minus" : "same");
  return el("pre", { class: "diff" }, ...text.split("\n").map((line) => el("span", { class: kind(line) }, line || " ")));
}
