// The rows that the texts would become, each with its verdict; what is like a row; how to be rid of one.
import { $, call, dialog, diffBlock, el, latest, later } from "./tools.js";

const MOST = 150; // rows drawn at once

export function makeRows({ texts, expert, apply, toSeed, counted }) {
  let rows = [], whole = false, filter = "", seed = "";
  const ask = latest();
  const everything = later(1200, () => load(true));

  async function load(all) {
    try {
      const got = await ask(`rows/${expert()}`, { ...texts(), all });
      $("row-list").classList.toggle("stale", !got.rows);
      if (!got.rows) { $("row-count").textContent = "as before the errors"; return; }
      rows = got.rows; whole = got.all;
      const kept = new Map(rows.map((r) => [r.seed_id, 0]));
      rows.forEach((r) => r.verdict === "keep" && kept.set(r.seed_id, kept.get(r.seed_id) + 1));
      counted(whole ? kept : null);
      render();
      if (!all) everything();
    } catch (error) {
      if (error.name !== "AbortError") $("row-count").textContent = error.message;
    }
  }

  const kind = (row) => (row.verdict === "keep" ? "kept" : row.reasons[0] ?? row.verdict);

  function render() {
    const want = $("row-find").value.toLowerCase();
    const mine = rows.filter((r) => !seed || r.seed_id === seed);
    const counts = new Map();
    mine.forEach((r) => counts.set(kind(r), (counts.get(kind(r)) ?? 0) + 1));
    if (filter && !counts.has(filter)) filter = "";
    const shown = mine.filter((r) => (!filter || kind(r) === filter) &&
      (!want || `${r.instruction}\n${r.output}`.toLowerCase().includes(want)));
    $("row-count").textContent = `${rows.length} ${whole ? "in all" : "of a sample; the rest follows"}`;
    const chip = (name, label) => el("button", { "aria-pressed": filter === name, onclick: () => { filter = name; render(); } }, label);
    $("chips").replaceChildren(chip("", `all ${mine.length}`), ...[...counts].sort((a, b) => b[1] - a[1])
      .map(([name, n]) => chip(name, `${name} ${n}`)), seed && el("button", { onclick: () => toSeed("") }, `only ${seed} \u00d7`));
    $("row-list").replaceChildren(...shown.slice(0, MOST).map(card),
      shown.length > MOST && el("p", { class: "row faint" }, `and ${shown.length - MOST} more: filter or find to see them`) || "");
    if (!shown.length) $("row-list").replaceChildren(el("p", { class: "row faint" }, "No rows here."));
  }

  function card(row) {
    const made = el("div", { class: "row", "data-row": row.row_id },
      el("p", { class: "asked" }, row.instruction), el("p", {}, row.output),
      el("div", { class: "meta" }, el("span", { class: row.reasons[0] === "surplus" ? "surplus" : row.verdict }, row.verdict === "keep" ? "kept" : row.reasons.join(", ")),
        row.detail && el("span", {}, row.detail), row.likeness && el("span", {}, `${row.likeness} alike`),
        el("span", {}, `${row.tokens} tokens`), row.split === "holdout" && el("span", { class: "pill held" }, "held out"),
        el("button", { class: "plain", onclick: () => toSeed(row.seed_id), title: "Go to its seed" }, row.seed_id),
        el("span", { class: "actions" }, !row.likeness && el("button", { class: "plain similar", onclick: () => similar(row) }, "similar"),
        el("button", { class: "plain drop-row", onmousedown: (e) => e.preventDefault(), onclick: () => rid(row, picked(made)) }, "not this\u2026"))));
    return made;
  }

  function picked(card) {
    const selection = getSelection();
    return card.contains(selection.anchorNode) && card.contains(selection.focusNode) ? selection.toString().trim() : "";
  }

  async function similar(row) {
    dialog("Similar rows", el("p", { class: "faint" }, "comparing\u2026"));
    try {
      const got = await call(`similar/${expert()}`, { ...texts(), row_id: row.row_id });
      dialog("Similar rows", [el("p", { class: "asked" }, row.instruction), el("p", { class: "faint" },
        `The questions of the same answer that are most alike; from ${got.threshold} on, only one of two is kept.`), ...got.rows.map(card)]);
    } catch (error) { dialog("Similar rows", el("p", { class: "bad" }, error.message)); }
  }

  function rid(row, selected) {
    const phrase = el("input", { class: "wide", "aria-label": "Phrase", value: selected || row.slots[0]?.value || "" });
    const list = el("div", {}, el("p", { class: "faint" }, "working out what each would change\u2026"));
    const ask = latest();
    async function look() {
      try {
        const got = await ask(`choices/${expert()}`, { ...texts(), row_id: row.row_id, phrase: phrase.value });
        list.replaceChildren(...got.map(choice));
      } catch (error) { if (error.name !== "AbortError") list.replaceChildren(el("p", { class: "bad" }, error.message)); }
    }
    phrase.addEventListener("input", later(400, look));
    dialog("Not this row", [el("p", { class: "asked" }, row.instruction), el("p", {}, row.output),
      el("label", {}, "A phrase never to say (select text in a row to fill this in)", phrase), list,
      el("p", { class: "faint" }, "The question itself is the seed's wording with a voice around it: "),
      ], [["Reword the seed instead", () => toSeed(row.seed_id, true)]]);
    look();
  }

  function choice(c) {
    if (c.refused) return el("div", { class: "choice" }, el("strong", {}, c.title), el("p", { class: "faint" }, `Not possible: ${c.refused}.`));
    const rows = c.gone === 1 ? "1 kept row disappears" : `${c.gone} kept rows disappear`;
    return el("div", { class: "choice" }, el("strong", {}, c.title), el("p", {}, c.why),
      el("p", {}, rows, c.examples.length ? ", for example:" : "."), ...c.examples.map((e) => el("p", { class: "faint" }, `\u201c${e}\u201d`)),
      ...c.problems.map((p) => el("p", { class: "bad" }, `then wrong: ${p}`)),
      el("details", {}, el("summary", {}, "the edit"), diffBlock(c.diff)),
      el("div", { class: "end" }, el("button", { class: "main", onclick: () => { $("dialog").close(); apply(c.texts, c.title); } }, "Do this")));
  }

  $("row-find").oninput = render;
  return {
    refresh: () => load(false),
    only(id) { seed = id; render(); },
    clear() { rows = []; seed = ""; filter = ""; render(); },
  };
}
