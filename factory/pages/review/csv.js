// CSV by RFC 4180, there and back without a change: commas, quotes, line ends, anything.
export function toCsv(rows) {
  const cell = (text) => (/[",\r\n]|^\s|\s$/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  return "\ufeff" + rows.map((row) => row.map(cell).join(",") + "\r\n").join(""); // spreadsheets want the mark
}

export function fromCsv(text) {
  const rows = [];
  let row = [], cell = "", quoted = false, i = text.startsWith("\ufeff") ? 1 : 0;
  const sep = text.slice(i).split(/\r?\n/, 1)[0].includes(";") && !text.split("\n", 1)[0].includes(",") ? ";" : ",";
  for (; i < text.length; i++) {
    const c = text[i];
    if (quoted && c === '"' && text[i + 1] === '"') { cell += '"'; i++; }
    else if (quoted && c === '"') quoted = false;
    else if (quoted) cell += c;
    else if (c === '"' && cell === "") quoted = true;
    else if (c === sep) { row.push(cell); cell = ""; }
    else if (c === "\n" || c === "\r") {
      if (c === "\r" && text[i + 1] === "\n") i++;
      rows.push([...row, cell]); row = []; cell = "";
    } else cell += c;
  }
  if (quoted) throw new Error("a quote is not closed");
  if (cell || row.length) rows.push([...row, cell]);
  return rows.filter((r) => r.length > 1 || r[0]);
}
