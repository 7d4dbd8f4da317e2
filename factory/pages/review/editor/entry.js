// The template's editor: CodeMirror 6 with YAML, marks in the gutter, search and completion of keys.
import { basicSetup } from "codemirror";
import { EditorState, Prec } from "@codemirror/state";
import { EditorView, keymap } from "@codemirror/view";
import { indentWithTab } from "@codemirror/commands";
import { HighlightStyle, syntaxHighlighting } from "@codemirror/language";
import { yaml, yamlLanguage } from "@codemirror/lang-yaml";
import { lintGutter, setDiagnostics } from "@codemirror/lint";
import { tags } from "@lezer/highlight";

const colours = HighlightStyle.define([
  { tag: tags.definition(tags.propertyName), color: "var(--one)" },
  { tag: [tags.lineComment, tags.comment], color: "var(--faint)", fontStyle: "italic" },
  { tag: [tags.string, tags.special(tags.string)], color: "var(--good)" },
  { tag: [tags.keyword, tags.labelName, tags.typeName], color: "var(--two)" },
]);

export function makeEditor({ parent, text, separator, nonce, complete, onChange }) {
  const extensions = [
    basicSetup, yaml(), yamlLanguage.data.of({ autocomplete: complete }), lintGutter(), keymap.of([indentWithTab]),
    Prec.highest(syntaxHighlighting(colours)), EditorState.lineSeparator.of(separator), EditorView.cspNonce.of(nonce),
    EditorView.lineWrapping, EditorView.contentAttributes.of({ "aria-label": "The template", spellcheck: "false" }),
    EditorView.updateListener.of((update) => update.docChanged && onChange()),
  ];
  return new EditorView({ parent, state: EditorState.create({ doc: text, extensions }) });
}

export function setProblems(view, problems) {
  const doc = view.state.doc;
  const marks = problems.map((p) => {
    const line = doc.line(Math.min(Math.max(p.line, 1), doc.lines));
    const from = Math.min(line.to, line.from + (p.column ? p.column - 1 : line.text.search(/\S|$/)));
    return { from, to: line.to, severity: p.severity, message: p.key ? `${p.key}: ${p.message}` : p.message };
  });
  view.dispatch(setDiagnostics(view.state, marks.sort((a, b) => a.from - b.from)));
}

export function jump(view, number, column = 0) {
  const line = view.state.doc.line(Math.min(Math.max(number, 1), view.state.doc.lines));
  const at = Math.min(line.to, line.from + Math.max(column - 1, 0));
  view.dispatch({ selection: { anchor: at }, effects: EditorView.scrollIntoView(at, { y: "center" }) });
  view.focus();
}
