// The seeds as a table over the lines of the file: a line that nobody edits stays byte for byte.
import { $, dialog, el } from "./tools.js";
import { fromCsv, toCsv } from "./csv.js";

const KEYS = ["id", "instruction", "answer", "source", "licence"];
const COLUMNS = [...KEYS, "slots"];

function read(raw) {
  try {
    const value = JSON.parse(raw);
    return value && typeof value === "object" && !Array.isArray(value) ? value : null;
  } catch { return null; }
}

// As Python's json.dumps writes it, so that an edited line looks like its neighbours.
function written(value) {
  if (Array.isArray(value)) return `[${value.map(written).join(", ")}]`;
  if (!value || typeof value !== "object") return JSON.stringify(value);
  return `{${Object.entries(value).map(([k, v]) => `${JSON.stringify(k)}: ${written(v)}`).join(", ")}}`;
}

const text = (value) => (value === undefined ? "" : typeof value === "string" ? value : written(value));

// A long name may break after its underscores and hyphens.
const shown = (value) => (value || "\u2013").split(/(?<=[_-])/).flatMap((part) => [part, el("wbr")]);

export function makeSeeds(onChange, onChoose) {
  let lines = [], disk = new Set(), diskIds = [], expert = "", found = { problems: [], held: new Set(), answers: [] };
  let kept = null, chosen = "";

  const put = (seed, old = "") => ({ raw: written(seed) + (old.endsWith("\r") ? "\r" : ""), seed });
  const seeds = () => lines.filter((line) => line.seed);
  const at = (tr) => lines[Number(tr.dataset.line)];

  function free() {
    const numbers = [...seeds().map((l) => text(l.seed.id)), ...diskIds].map((id) => Number(/-(\d+)$/.exec(id)?.[1] ?? 0));
    return Math.max(0, ...numbers) + 1;
  }

  function set(content, onDisk, name) {
    lines = content.split("\n").map((raw) => ({ raw, seed: raw.trim() ? read(raw) : undefined }));
    disk = new Set(onDisk.split("\n"));
    diskIds = [...disk].map((raw) => text(read(raw)?.id));
    expert = name;
    render();
  }

  function add(questions, given = {}) {
    const last = seeds().at(-1)?.seed ?? {};
    let number = free();
    const end = lines.at(-1)?.raw === "" ? lines.pop() : { raw: "", seed: undefined };
    for (const instruction of questions) {
      const seed = { id: `${expert}-${String(number++).padStart(4, "0")}`, instruction };
      const answer = given.answer ?? last.answer;
      if (answer && found.answers.length !== 1) seed.answer = answer;
      seed.source = given.source ?? last.source ?? "hand-written";
      seed.licence = given.licence ?? last.licence ?? "CC0-1.0";
      lines.push(put(seed));
    }
    lines.push(end);
    changed();
  }

  function changed() { render(); onChange(); }

  function edit(line, key, value) {
    if (text(line.seed[key]) === value) return;
    const next = { ...line.seed };
    if (key === "slots" && value) next.slots = JSON.parse(value);
    else if (value === "" && (key === "answer" || key === "slots")) delete next[key];
    else next[key] = value;
    Object.assign(line, put(next, line.raw));
    onChange();
  }

  function shows(line, number) {
    const want = $("seed-find").value.toLowerCase(), only = $("seed-only").value, id = text(line.seed?.id);
    const wrong = found.problems.some((p) => p.line === number + 1);
    return (!want || line.raw.toLowerCase().includes(want)) && (!only || (only === "held" && found.held.has(id)) ||
      (only === "wrong" && wrong) || (only === "changed" && !disk.has(line.raw)) ||
      (only === "short" && kept && (kept.get(id) ?? 0) < found.per_seed));
  }

  function rowOf(line, number) {
    const problems = found.problems.filter((p) => p.line === number + 1), id = text(line.seed?.id);
    const told = problems.map((p) => el("span", { class: "said" }, p.key ? `${p.key}: ${p.message}` : p.message));
    const classes = [problems.length && "wrong", !disk.has(line.raw) && "changed", id && id === chosen && "chosen"];
    const rows = kept?.get(id) ?? 0, few = kept && rows < found.per_seed;
    const cell = (tag, key, ...more) => el(tag, { tabindex: 0, "data-key": key }, ...shown(text(line.seed[key])), ...more);
    const cells = line.seed
      ? [cell("td", "id", found.held.has(id) && el("span", { class: "pill held" }, "held out")),
        cell("td", "instruction", ...told, line.seed.slots &&
          el("span", { class: "said faint" }, Object.entries(line.seed.slots).map(([k, v]) => `${k}: ${v}`).join(", "))),
        cell("td", "answer"), el("td", {}, cell("div", "source"), cell("div", "licence"))]
      : [el("td", { class: "bad" }, `line ${number + 1}`), el("td", { colspan: 3, tabindex: 0, "data-key": "raw" }, line.raw, ...told)];
    return el("tr", { "data-line": number, class: classes.filter(Boolean).join(" ") }, ...cells,
      el("td", { class: `n ${few ? "few" : ""}` }, kept ? el("button", { class: "plain", title: "Show its rows",
        onclick: () => { choose(chosen === id ? "" : id); } }, few ? `${rows} of ${found.per_seed}` : `${rows}`) : ""),
      el("td", {}, el("button", { class: "plain", title: "Delete this seed", "aria-label": `Delete ${id}`,
        onclick: () => { lines.splice(lines.indexOf(line), 1); changed(); } }, "\u00d7")));
  }

  function render() {
    const held = seeds().filter((l) => found.held.has(text(l.seed.id))).length;
    $("seed-count").textContent = `${seeds().length}, ${held} held out`;
    const field = $("seed-rows").querySelector("textarea, input, select");
    if (field) { // somebody is writing in it: only say what is wrong there
      const number = Number(field.closest("tr").dataset.line) + 1;
      while (field.nextSibling) field.nextSibling.remove();
      field.after(...found.problems.filter((p) => p.line === number).map((p) => el("span", { class: "said" }, p.message)));
      return;
    }
    $("seed-rows").replaceChildren(...lines.flatMap((line, n) =>
      line.seed === undefined || !shows(line, n) ? [] : [rowOf(line, n)]));
  }

  function choose(id) { chosen = id; onChoose(id); render(); }

  // A cell becomes a field when it gets the focus, as in a spreadsheet.
  $("seed-rows").addEventListener("focusin", ({ target: cell }) => {
    const key = cell.dataset?.key;
    if (!key || cell.firstElementChild?.matches("textarea, input, select")) return;
    const line = at(cell.closest("tr")), before = key === "raw" ? line.raw : text(line.seed[key]);
    const field = key === "answer" && found.answers.length
      ? el("select", {}, ...[...new Set(["", ...found.answers, before])].map((a) => el("option", { value: a }, a || "\u2013")))
      : el(key === "instruction" || key === "raw" ? "textarea" : "input", {});
    field.setAttribute("aria-label", key);
    field.value = before;
    const take = () => {
      if (key === "raw") Object.assign(line, { raw: field.value, seed: read(field.value) }), onChange();
      else edit(line, key, field.value);
    };
    field.addEventListener("input", take);
    field.addEventListener("keydown", (e) => {
      if (e.key === "Escape") { field.value = before; take(); field.blur(); }
      if (e.key === "Enter" && !e.shiftKey) { e.preventDefault(); field.blur(); }
    });
    field.addEventListener("paste", (e) => {
      const pasted = e.clipboardData.getData("text").split(/\r?\n/).filter((l) => l.trim());
      if (key === "instruction" && pasted.length > 1) { e.preventDefault(); field.blur(); paste(pasted.join("\n")); }
    });
    field.addEventListener("blur", () => {
      field.remove();
      cell.replaceChildren(...shown(text(key === "raw" ? line.raw : line.seed?.[key])));
      setTimeout(() => $("seed-rows").contains(document.activeElement) ? 0 : render());
    });
    cell.replaceChildren(field);
    cell.tabIndex = -1;
    field.focus();
    $("seed-rows").querySelectorAll("[tabindex='-1']").forEach((c) => c !== cell && (c.tabIndex = 0));
  });

  function addOne() {
    $("seed-find").value = $("seed-only").value = "";
    add([""]);
    focus(seeds().at(-1));
  }

  function focus(line) {
    const row = $("seed-rows").querySelector(`tr[data-line="${lines.indexOf(line)}"]`);
    row?.scrollIntoView({ block: "center" });
    row?.querySelector("td[data-key=instruction], td[data-key=raw]")?.focus();
  }

  function paste(given = "") {
    const last = seeds().at(-1)?.seed ?? {};
    const area = el("textarea", { placeholder: "one question a line", "aria-label": "Questions, one a line" });
    area.value = given;
    const answer = el("select", {}, ...found.answers.map((a) => el("option", { value: a, selected: a === last.answer }, a)));
    const source = el("input", { value: last.source ?? "hand-written" }), licence = el("input", { value: last.licence ?? "CC0-1.0" });
    const take = () => add(area.value.split(/\r?\n/).map((l) => l.trim()).filter(Boolean),
      { answer: answer.value, source: source.value, licence: licence.value });
    dialog("Paste questions, one a line", [area, el("p", {}, el("label", {}, "answer ", answer), " ",
      el("label", {}, "source ", source), " ", el("label", {}, "licence ", licence))], [["Add them", take, "main"]]);
  }

  function csvOut() {
    const rows = seeds().map(({ seed }) => COLUMNS.map((key) => text(seed[key])));
    const link = el("a", { download: `${expert}.csv`,
      href: URL.createObjectURL(new Blob([toCsv([COLUMNS, ...rows])], { type: "text/csv" })) });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 5000);
  }

  async function csvIn(file) {
    let rows;
    try {
      rows = fromCsv(new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(await file.arrayBuffer()));
      const head = rows.shift() ?? [];
      if (!head.includes("instruction")) throw new Error(`the first line must name the columns ${COLUMNS.join(", ")}`);
      rows = rows.map((row) => Object.fromEntries(head.map((key, i) => [key, row[i] ?? ""])));
      rows.forEach((row) => row.slots && JSON.parse(row.slots));
    } catch (error) { dialog("This CSV file cannot be read", el("p", {}, error.message)); return; }
    const known = new Map(seeds().map((line) => [text(line.seed.id), line]));
    const fresh = rows.filter((r) => !known.has(r.id));
    const gone = [...known.keys()].filter((id) => !rows.some((r) => r.id === id));
    const differ = rows.filter((r) => known.has(r.id) && COLUMNS.some((k) => k in r && text(known.get(r.id).seed[k]) !== r[k]));
    const take = (dropping) => {
      for (const row of differ) for (const key of COLUMNS) if (key in row) edit(known.get(row.id), key, row[key]);
      for (const row of fresh) {
        add([row.instruction], Object.fromEntries(["answer", "source", "licence"].flatMap((k) => (row[k] ? [[k, row[k]]] : []))));
        if (row.id) edit(seeds().at(-1), "id", row.id);
        if (row.slots) edit(seeds().at(-1), "slots", row.slots);
      }
      if (dropping) lines = lines.filter((line) => !line.seed || !gone.includes(text(line.seed.id)));
      changed();
    };
    const buttons = [["Take changed and new", () => take(false), "main"]];
    if (gone.length) buttons.unshift([`Take, and remove the ${gone.length} missing`, () => take(true)]);
    dialog(`${file.name}: ${differ.length} changed, ${fresh.length} new, ${gone.length} missing`,
      el("p", {}, "Seeds that are the same stay as they are. Nothing is written before you save."), buttons);
  }

  $("seed-add").onclick = addOne;
  $("seed-paste").onclick = () => paste();
  $("csv-out").onclick = csvOut;
  $("csv-in").onclick = () => $("csv-file").click();
  $("csv-file").onchange = (e) => { if (e.target.files[0]) csvIn(e.target.files[0]); e.target.value = ""; };
  $("seed-find").oninput = $("seed-only").onchange = render;
  $("why-held").onclick = () => dialog("Which seeds are held out", el("p", {},
    "Of each answer's seeds, a quarter (three at least) is never trained on: they are the examination. The lowest hash of the id decides, so nobody can choose them, and editing a text never moves a seed. Adding or deleting seeds can move the line by one."));

  return {
    set, choose,
    text: () => lines.map((line) => line.raw).join("\n"),
    check(value) { found = { ...value, problems: value.problems.filter((p) => p.file === "seeds"), held: new Set(value.held) }; render(); },
    kept(counts) { kept = counts; render(); },
    jump(number) { $("seed-find").value = $("seed-only").value = ""; render(); focus(lines[number - 1]); },
    jumpTo(id) { $("seed-find").value = $("seed-only").value = ""; render(); focus(seeds().find((l) => l.seed.id === id)); },
  };
}
