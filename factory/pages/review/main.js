// The page: two texts, what is on disk, and everything that follows from them.
import { jump, makeEditor, setProblems } from "./editor.js";
import { $, call, dialog, diffBlock, el, latest, later } from "./tools.js";
import { makeRows } from "./rows.js";
import { makeSeeds } from "./seeds.js";

let expert = "", root = "", disk = null, view = null, problems = [], away = null, saving = false;
const base = {}; // the hash of each file that the texts started from
const NAMES = ["template", "seeds"];
const key = () => `dmoe-review:${root}:${expert}`;
const texts = () => ({ template: view.state.sliceDoc(), seeds: seeds.text() });
const unsaved = () => disk && NAMES.some((name) => texts()[name] !== disk[name].text);

const ask = latest();
const check = later(250, async () => {
  try {
    const found = await ask(`check/${expert}`, texts());
    problems = found.problems;
    setProblems(view, problems.filter((p) => p.file === "template"));
    seeds.check(found);
    state();
    rows.refresh();
  } catch (error) { if (error.name !== "AbortError") notice(error.message); }
});

function keep() {
  if (unsaved()) localStorage.setItem(key(), JSON.stringify({ texts: texts(), base }));
  else localStorage.removeItem(key());
}
const remember = later(300, keep);

function changed() { if (disk) { state(); remember(); check(); } }

const seeds = makeSeeds(changed, (id) => rows.only(id));
const rows = makeRows({ texts, expert: () => expert, apply, counted: (kept) => seeds.kept(kept),
  toSeed: (id, go) => { seeds.choose(id); if (go) { pane("seeds"); seeds.jumpTo(id); } } });

function state() {
  const dirty = unsaved(), errors = problems.filter((p) => p.severity === "error").length, others = problems.length - errors;
  $("state").textContent = saving ? "saving" : dirty ? "unsaved changes" : "saved";
  $("state").className = dirty ? "unsaved" : "saved";
  $("save").disabled = !dirty || saving;
  $("revert").hidden = !dirty;
  $("problems").hidden = !problems.length;
  $("problems").textContent = [errors && `${errors} error${errors > 1 ? "s" : ""}`, others && `${others} warning${others > 1 ? "s" : ""}`]
    .filter(Boolean).join(", ");
  document.title = `${dirty ? "\u2022 " : ""}${expert} \u2013 dmoe review`;
}

function notice(text, ...buttons) {
  $("notice").hidden = !text;
  $("notice").replaceChildren(text ?? "", ...buttons.map(([label, work]) => el("button", { onclick: work }, label)),
    el("button", { class: "plain", onclick: () => notice("") }, "dismiss"));
}

function show(value) {
  const old = view?.state.sliceDoc();
  if (old !== value.template) {
    const pairs = value.template.split("\r\n").length, ends = value.template.split("\n").length;
    const separator = pairs === ends && pairs > 1 ? "\r\n" : "\n"; // mixed ends stay as they are
    view?.destroy();
    view = makeEditor({ parent: $("editor"), text: value.template, separator, onChange: changed, complete,
      nonce: document.querySelector("meta[name=style-nonce]").content });
  }
  seeds.set(value.seeds, disk.seeds.text, expert);
}

function apply(value, title) {
  if (value.template !== view.state.sliceDoc()) { // as an edit, so that Ctrl-Z takes it back
    const top = view.scrollDOM.scrollTop;
    view.dispatch({ changes: { from: 0, to: view.state.doc.length, insert: value.template } });
    view.scrollDOM.scrollTop = top;
  }
  if (value.seeds !== seeds.text()) seeds.set(value.seeds, disk.seeds.text, expert);
  changed();
  notice(`Done, not yet saved: ${title}.`);
}

async function open(name) {
  if (disk) keep();
  expert = name;
  disk = null;
  rows.clear();
  notice("");
  const loaded = await call(`files/${expert}`);
  disk = loaded;
  $("path").textContent = disk.template.path;
  NAMES.forEach((n) => (base[n] = disk[n].sha));
  const draft = JSON.parse(localStorage.getItem(key()) ?? "null");
  const value = draft?.texts ?? { template: disk.template.text, seeds: disk.seeds.text };
  if (draft) Object.assign(base, draft.base);
  show(value);
  changed();
  if (draft) notice("Your unsaved changes of last time are here again.");
  if (NAMES.some((n) => base[n] !== disk[n].sha)) moved(disk);
}

async function save(event, sure = false) {
  event?.preventDefault?.();
  const errors = problems.filter((p) => p.severity === "error");
  if (!unsaved() || saving) return;
  if (errors.length && !sure) {
    dialog(`Save with ${errors.length} error${errors.length > 1 ? "s" : ""}?`, [el("p", {},
      "Nothing is lost, but no dataset can be built of it until they are mended."), ...errors.slice(0, 5).map((p) =>
      el("p", { class: "bad" }, `${p.file}:${p.line}: ${p.key}: ${p.message}`))], [["Save anyway", () => save(null, true), "main"]]);
    return;
  }
  saving = true;
  state();
  try {
    const sent = texts(), got = await call(`save/${expert}`, { ...sent, base });
    if (got.moved.length) moved(got.disk);
    else { took(got.disk); notice(""); }
  } catch (error) { notice(`Not saved: ${error.message}`); }
  saving = false;
  state();
  remember();
}

function took(found) {
  disk = found;
  NAMES.forEach((n) => (base[n] = disk[n].sha));
  away = null;
  seeds.set(seeds.text(), disk.seeds.text, expert);
}

// A file is no longer what the texts started from.
function moved(found) {
  const names = NAMES.filter((n) => base[n] !== found[n].sha);
  away = names.map((n) => found[n].sha).join();
  const paths = names.map((n) => found[n].path).join(" and ");
  const mine = texts(), clean = names.every((n) => mine[n] === disk[n].text && disk[n].sha === base[n]);
  const reload = () => {
    const next = { ...texts(), ...Object.fromEntries(names.map((n) => [n, found[n].text])) };
    took(found);
    show(next);
    changed();
    notice("");
  };
  if (clean) { reload(); notice(`${paths} changed on disk and was read again.`); return; }
  const both = async () => {
    const { disk: text } = await call(`diff/${expert}`, texts());
    dialog("What is on disk (-) and what you have here (+)", diffBlock(text), [
      ["Keep mine: saving overwrites the disk", () => { took(found); changed(); notice(""); }], ["Reload from disk", reload]]);
  };
  notice(`${paths} changed on disk while you were editing.`, ["Show both", both], ["Reload from disk, drop mine", reload]);
}

async function poll() {
  if (!document.hidden && disk && !saving) {
    try {
      const name = expert, found = await call(`hashes/${name}`);
      if (name === expert && disk && !saving) {
        const names = NAMES.filter((n) => base[n] !== found[n]);
        if (names.length && away !== names.map((n) => found[n]).join()) {
          const files = await call(`files/${name}`);
          if (name === expert && !saving) moved(files);
        } else if (!names.length && away) { away = null; notice(""); }
      }
      if ($("state").className === "gone") state();
    } catch { $("state").textContent = "the server is gone: run dmoe review again; your draft stays in this browser"; $("state").className = "gone"; }
  }
  setTimeout(poll, 2000);
}

async function showDiff() {
  const got = await call(`diff/${expert}`, texts());
  const dirty = unsaved();
  dialog("The diff to commit", [
    got.new.length && el("p", { class: "faint" }, `Not in the last commit, or there is no git here: ${got.new.join(", ")}.`),
    el("h3", {}, "Since the last commit"), diffBlock(got.head),
    ...(!dirty ? [] : got.head === got.disk ? [el("p", {}, "Nothing of it is saved yet.")]
      : [el("h3", {}, "Of that, not saved yet"), diffBlock(got.disk)]),
    got.commands.length && el("p", {}, dirty ? "Save, then run in a terminal:" : "To commit, run in a terminal:"),
    got.commands.length && el("pre", { class: "diff" }, got.commands.join("\n")),
  ].filter(Boolean));
}

function showProblems() {
  const go = (p) => { $("dialog").close(); pane(p.file); if (p.file === "template") jump(view, p.line, p.column); else seeds.jump(p.line); };
  dialog("What is wrong", problems.map((p) => el("p", {}, el("button", { onclick: () => go(p) }, `${p.file} line ${p.line}`),
    ` ${p.key ? p.key + ": " : ""}${p.message}`)));
}

function pane(name) {
  $("panes").dataset.pane = name;
  document.querySelectorAll("nav button").forEach((b) => b.setAttribute("aria-pressed", b.dataset.pane === name));
}

// The keys that may stand here, by indentation, from the template's JSON schema where there is one.
let schema = null;
function complete(context) {
  const word = context.matchBefore(/^\s*[\w]*/);
  if (!schema || !word || (!context.explicit && !word.text.trim())) return null;
  let indent = /^\s*/.exec(word.text)[0].length, node = schema;
  const path = [];
  for (let n = context.state.doc.lineAt(context.pos).number - 1; n > 0 && indent > 0; n--) {
    const found = /^(\s*)(\w+):/.exec(context.state.doc.line(n).text);
    if (found && found[1].length < indent) { path.unshift(found[2]); indent = found[1].length; }
  }
  const known = (s) => s?.$ref ? schema.$defs[s.$ref.split("/").pop()] : s?.anyOf ? known(s.anyOf.find((o) => o.$ref || o.type === "object")) : s;
  for (const part of path) node = known(node?.properties?.[part] ?? node?.additionalProperties);
  const options = Object.entries(node?.properties ?? {}).map(([label, s]) => ({ label, apply: `${label}: `, info: s.description }));
  return { from: word.from + /^\s*/.exec(word.text)[0].length, options };
}

$("expert").onchange = () => { location.hash = `${location.hash.slice(1).split("/")[0]}/${$("expert").value}`; };
addEventListener("hashchange", () => { const [, name] = location.hash.slice(1).split("/"); if (name !== expert) open(name); });
$("save").onclick = save;
$("diff").onclick = showDiff;
$("problems").onclick = showProblems;
$("revert").onclick = () => dialog("Discard all unsaved changes?", el("p", {}, "The texts become what is on disk."),
  [["Discard", () => { const found = disk; took(found); show({ template: found.template.text, seeds: found.seeds.text }); changed(); }]]);
document.querySelectorAll("nav button").forEach((b) => (b.onclick = () => pane(b.dataset.pane)));
addEventListener("keydown", (e) => { if ((e.ctrlKey || e.metaKey) && e.key === "s") save(e); });
addEventListener("beforeunload", (e) => { if (unsaved()) e.preventDefault(); });

try {
  const known = await call("experts");
  root = known.root;
  schema = known.schema;
  const [, named] = location.hash.slice(1).split("/");
  const first = known.experts.includes(named) ? named : known.experts[0];
  $("expert").append(...known.experts.map((name) => el("option", { value: name, selected: name === first }, name)));
  await open(first);
  poll();
} catch (error) { notice(error.message); $("state").textContent = "not open"; }
