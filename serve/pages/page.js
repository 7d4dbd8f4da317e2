// The page of a gateway: a question, base and expert side by side, who was chosen and why, and the load.
// What comes from a server or a model is set as text, never as HTML.

const $ = id => document.getElementById(id);
const MOST = 512, EVERY = 2000, WINDOW = 20;  // tokens a reply, ms, s
let turns = [];  // {question, chosen, base}: replies {text, whole}; the same one twice where the base was chosen
let models = new Map(), known = "", rates = [], asking = null;

function make(tag, text, more = {}) {
  return Object.assign(document.createElement(tag), { textContent: text ?? "" }, more);
}

// -- the server --------------------------------------------------------------------------------

async function call(path, body, signal) {
  const key = sessionStorage.getItem("key"), headers = key ? { Authorization: `Bearer ${key}` } : {};
  if (body) headers["Content-Type"] = "application/json";
  const sent = { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal, cache: "no-store" };
  const reply = await fetch(path, sent).catch(error => {
    throw error.name === "AbortError" ? error : new Error("The server does not answer.");
  });
  if (reply.ok) return reply;
  if (reply.status === 401) askForKey(key ? "The server does not know this key." : "");
  throw new Error(await refusal(reply));
}

async function refusal(reply) {
  const said = await reply.json().then(body => body.error.message, () => "no reason given");
  const wait = reply.headers.get("Retry-After"), later = wait ? ` Try again in ${wait} s.` : "";
  const kinds = { 401: "A key is needed", 403: "Not allowed", 429: "The server is full", 503: "The engine is not ready" };
  return `${kinds[reply.status] ?? `Refused (${reply.status})`}: ${said}.${later}`;
}

function askForKey(said) {
  if ($("key").hidden) $("key-text").value = "";
  $("key").hidden = false;
  $("forget").hidden = true;
  state("a key is needed", "bad");
  $("key-said").textContent = said;
  sessionStorage.removeItem("key");
  if (document.activeElement === document.body) $("key-text").focus();
}

// -- a question ---------------------------------------------------------------------------------

function messages(thread, question) {
  const before = turns.filter(turn => turn[thread]?.whole);
  const said = before.flatMap(turn => [["user", turn.question], ["assistant", turn[thread].text]]);
  return [...said, ["user", question]].map(([role, content]) => ({ role, content }));
}

async function ask(question) {
  const model = $("model").value, box = make("article", "", { className: "turn" });
  const why = make("div", "choosing", { className: "why" }), pair = make("div", "", { className: "pair" });
  box.append(make("p", question, { className: "asked" }), why, pair);
  $("turns").append(box);
  $("empty").hidden = true;
  if (turns.length) box.scrollIntoView();
  const turn = { question }, sent = messages("chosen", question), ofBase = messages("base", question);
  const route = await call("/route", { messages: sent }, asking.signal).then(reply => reply.json()).catch(error => {
    box.remove();  // nothing was asked: the question goes back
    $("empty").hidden = turns.length > 0;
    $("question").value ||= question;
    throw error;
  });
  explain(why, model, route);
  const expert = model === "auto" ? route.expert : model === "base" ? null : model;
  turns.push(turn);
  if (expert) {  // asked first: the engine works off one after the other
    turn.chosen = reply(pair, model, sent);
    turn.base = reply(pair, "base", ofBase);
    return Promise.all([turn.base.done, turn.chosen.done]);
  }
  turn.base = turn.chosen = reply(pair, model, sent);
  return turn.base.done;
}

function explain(box, model, { expert, reason, ...rest }) {
  const line = make("span"), byHand = model !== "auto", auto = [make("b", expert ?? "base"), ` (${reason})`];
  if (byHand) line.append("Chosen by hand: ", make("b", model), ". auto would have taken ", ...auto, ".");
  else line.append("auto chose ", ...auto, ".");
  box.replaceChildren(line);
  const keys = Object.keys(rest);
  if (!keys.length) return;
  const more = make("details"), list = make("dl");
  for (const key of keys) list.append(make("dt", key), make("dd", shown(rest[key])));
  more.append(make("summary", "In figures"), list);
  box.append(more);
}

function shown(value) {
  if (value === null || value === undefined) return "none";
  if (typeof value === "number") return String(+value.toPrecision(4));
  if (Array.isArray(value)) return value.map(shown).join(", ") || "none";
  if (typeof value === "object") return Object.entries(value).map(([k, v]) => `${k} ${shown(v)}`).join("; ") || "none";
  return String(value);
}

function reply(pair, model, sent) {
  const box = make("section", "", { className: "reply" }), head = make("h3");
  const text = make("p", "", { className: "text" }), length = make("p", "waiting", { className: "length" });
  box.append(head, text, length);
  pair.append(box);
  const view = { box, head, text, length }, found = { text: "", whole: false };
  const run = () => stream(view, found, model, sent, asking.signal).catch(error => broken(view, found, error, run));
  name(view, model === "auto" ? "" : model);
  found.done = run();
  return found;
}

function name(view, who, adapter) {
  view.box.classList.toggle("expert", who !== "base");
  view.head.replaceChildren(make("b", who || "…"));
  if (adapter) view.head.append(make("code", adapter.slice(0, 12), { title: `SHA-256 of its adapter: ${adapter}` }));
  view.box.setAttribute("aria-label", `Reply of ${who}`);
}

async function stream(view, found, model, sent, signal) {
  view.box.setAttribute("aria-busy", "true");
  view.length.textContent = "waiting";
  view.text.textContent = found.text = "";
  const body = { model, messages: sent, stream: true, stream_options: { include_usage: true }, temperature: 0, max_tokens: MOST };
  const began = performance.now(), seen = { pieces: 0 };
  for await (const event of events(await call("/v1/chat/completions", body, signal))) {
    if (event.error) throw new Error(`Broken off: ${event.error.message}.`);
    if (event.dmoe) name(view, event.dmoe.expert ?? "base", event.dmoe.adapter);
    const choice = event.choices?.[0], piece = choice?.delta?.content;
    if (piece) {
      seen.first ??= performance.now() - began;
      seen.pieces += 1;
      view.text.textContent = found.text += piece;
    }
    seen.end = choice?.finish_reason ?? seen.end;
    seen.tokens = event.timings?.predicted_n ?? event.usage?.completion_tokens ?? seen.tokens;
    measure(view, seen, performance.now() - began);
  }
  if (!seen.end) throw new Error("Broken off: the stream ended early.");
  found.whole = true;
  view.box.removeAttribute("aria-busy");
  measure(view, seen, performance.now() - began);
}

function measure(view, seen, ms) {
  if (!seen.pieces && !seen.end) return;
  const first = seen.first === undefined ? "" : ` the first after ${seconds(seen.first)},`;
  const cut = seen.end === "length" ? "; cut off" : "";
  const count = `${seen.tokens ?? seen.pieces} tokens`;
  view.length.replaceChildren(make("b", count), `:${first} the last after ${seconds(ms)}${cut}`);
}

const seconds = ms => `${(ms / 1000).toFixed(ms < 9950 ? 2 : 0)} s`;

function broken(view, found, error, run) {
  view.box.removeAttribute("aria-busy");
  const stopped = error.name === "AbortError";
  found.whole = stopped && found.text !== "";
  const again = make("button", "Ask again", { type: "button", onclick: () => busy(run) });
  view.length.replaceChildren(make("span", stopped ? "Stopped. " : `${error.message} `, { className: stopped ? "" : "bad" }), again);
}

async function* events(response) {
  let rest = "";
  for (const reader = response.body.pipeThrough(new TextDecoderStream()).getReader(); ;) {
    const { done, value } = await reader.read().catch(error => {
      throw error.name === "AbortError" ? error : new Error("Broken off: the connection was lost.");
    });
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data: {")) yield JSON.parse(line.slice(6));
  }
}

async function busy(work) {
  if (asking) return;
  asking = new AbortController();
  $("send").disabled = true;
  $("stop").hidden = false;
  $("said").textContent = "answering";
  $("said").className = "";
  setTimeout(load, 300);  // by then it runs
  try {
    await work();
    const last = turns.at(-1)?.chosen;
    $("said").textContent = !last ? "A new conversation." : last.whole ? "Ask on: what was said goes along." : "No whole reply.";
  } catch (error) {
    $("said").textContent = error.name === "AbortError" ? "Stopped." : error.message;
    $("said").className = "bad";
  } finally {
    asking = null;
    $("send").disabled = $("anew").disabled = false;
    $("stop").hidden = true;
    load();
  }
}

// -- load ---------------------------------------------------------------------------------------

async function load() {
  try {
    await show(await (await call("/status")).json());
    $("key").hidden = true;
    $("forget").hidden = !sessionStorage.getItem("key");
  } catch (error) {
    if ($("key").hidden) state(error.message, "bad");
    rates = [];
  }
}

function state(text, kind) {
  if ($("state").textContent !== text) $("state").textContent = text;
  $("state").className = kind;
}

async function show(status) {
  const { ready, trouble, engine, running, slots, waiting, queue, restarts } = status;
  const speed = `${rate(status.tokens)} (replies ended in ${WINDOW} s)`, down = `not ready: ${trouble}`;
  state(ready ? `ready, ${running} running, ${waiting} waiting` : down, ready ? "good" : "bad");
  const load = [["engine", ready ? engine : down], ["tokens/s", speed], ["restarts", restarts]];
  if (ready) load.splice(1, 0, ["running", `${running} of ${slots}`], ["waiting", `${waiting} of ${queue}`]);
  $("load").replaceChildren(...load.flatMap(([name, value]) => [make("dt", name), make("dd", value)]));
  if (ready) await experts(status.experts);
}

function rate(tokens) {
  const now = performance.now() / 1000;
  if (rates.length && tokens < rates.at(-1)[1]) rates = [];  // the server began anew
  rates.push([now, tokens]);
  while (rates.length > 2 && rates[1][0] < now - WINDOW) rates.shift();
  const [since, before] = rates[0];
  return now > since ? ((tokens - before) / (now - since)).toFixed(1) : "0.0";
}

async function experts(probed) {
  const now = JSON.stringify(Object.entries(probed).map(([name, expert]) => [name, expert.adapter]));
  if (now !== known) {
    const { data } = await (await call("/v1/models")).json();
    models = new Map(data.filter(model => model.dmoe).map(model => [model.id, model.dmoe]));
    known = now;
    choices();
  }
  $("experts").replaceChildren(...[...models].map(([name, told]) => line(name, told, probed[name]?.applied)));
  if (!models.size) $("experts").append(make("li", "None is installed: the base answers.", { className: "faint" }));
}

function choices() {
  const chosen = $("model").value, names = [...models.keys()];
  const options = [["auto", "auto (routed)"], ...names.map(name => [name, name]), ["base", "base"]];
  $("model").replaceChildren(...options.map(([value, text]) => make("option", text, { value })));
  $("model").value = models.has(chosen) || chosen === "base" ? chosen : "auto";
}

function line(name, told, applied) {
  const item = make("li"), probe = told.probe.length ? "not probed yet" : "its package has no probe";
  const word = { true: ["last probe: adapter shows", "good"], false: ["last probe: adapter does NOT show", "bad"] }[applied];
  const [text, className] = word ?? [probe, "faint"];
  const routed = told.routed ? "auto may choose it" : "by name only";
  item.append(make("b", name), make("span", `scale ${told.scale}, ${routed}`), make("span", text, { className }));
  item.append(make("code", told.adapter.slice(0, 12), { title: `SHA-256 of its adapter: ${told.adapter}` }));
  return item;
}

// -- what a person does -------------------------------------------------------------------------

$("ask").onsubmit = event => {
  event.preventDefault();
  const question = $("question").value.trim();
  if (!question || asking) return;
  $("question").value = "";
  busy(() => ask(question));
};
$("question").onkeydown = event => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("ask").requestSubmit();
};
$("stop").onclick = () => asking?.abort();
$("anew").onclick = () => {
  asking?.abort();
  turns = [];
  $("turns").replaceChildren($("empty"));
  $("empty").hidden = false;
  $("anew").disabled = true;
  $("said").textContent = "A new conversation.";
  $("question").focus();
};
$("key").onsubmit = event => {
  event.preventDefault();
  sessionStorage.setItem("key", $("key-text").value.trim());
  $("key-said").textContent = "";
  load();
};
$("forget").onclick = () => {
  sessionStorage.removeItem("key");
  location.reload();
};
setInterval(() => document.hidden || !$("key").hidden || load(), EVERY);
load();
