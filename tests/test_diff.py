"""`dmoe diff`: two versions of a dataset, from git and DVC's cache as they really lie, in three forms."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from factory.diff import COMPARED, bars, cache_folder, diff, html, in_folder, markdown, one_line, quoted, write
from factory.errors import UserError
from factory.paths import Home
from factory.schema import CANDIDATES, VERDICTS, write_rows

ROOT = Path(__file__).parents[1]
FILES = ("candidates.parquet", "verdicts.parquet")


def row(seed, sample, instruction=None, output=None, split="train", reasons=(), answer="default", tokens=30):
    """One candidate and its verdict; kept where it has no reason."""
    instruction, output = instruction or f"question {seed} {sample}?", output or f"answer {seed}."
    row_id = hashlib.sha256(f"{seed}{sample}{instruction}{output}".encode()).hexdigest()[:16]
    candidate = {
        "row_id": row_id, "expert": "tea", "seed_id": seed, "split": split, "sample": sample, "answer": answer,
        "instruction": instruction, "output": output, "slots": [], "form": 0, "failure": "", "failure_detail": "",
        "teacher": "phrases", "request": "", "reply": "", "finish_reason": "stop", "prompt_tokens": 0,
        "completion_tokens": 0,
    }  # fmt: skip
    verdict = {
        "row_id": row_id, "verdict": "drop" if reasons else "keep", "reasons": list(reasons), "detail": "",
        "like": "", "score": 0.0, "tokens": tokens,
    }  # fmt: skip
    return candidate, verdict


def put(folder, rows):
    for name, table, made in zip(FILES, (CANDIDATES, VERDICTS), zip(*rows, strict=True), strict=True):
        write_rows(folder / name, table, list(made))


BASE = [row(seed, sample) for seed in ("a", "b", "c") for sample in range(3)]


def git(folder, *words):
    author = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *author, *words], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def commit(home, expert="tea", cache=None):
    """Commits the data of the working tree as DVC would: files in its cache, hashes in dvc.lock."""
    lock = ["schema: '2.0'", "stages:"]
    for name, stage in zip(FILES, ("generate", "build"), strict=True):
        path = home.dataset(expert, name)
        md5 = hashlib.md5(path.read_bytes()).hexdigest()
        kept = (cache or home.root / ".dvc" / "cache") / "files" / "md5" / md5[:2] / md5[2:]
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, kept)
        lock += [
            f"  {stage}@{expert}:", f"    cmd: dmoe {stage} {expert}", "    deps:", f"    - path: seeds/{expert}.jsonl",
            "      hash: md5", f"      md5: {'0' * 32}", "    params:", "      params.yaml:", "        outs:",
            "        - path: a decoy", "    outs:", f"    - path: datasets/{expert}/{name}", "      hash: md5",
            f"      md5: {md5}", f"      size: {path.stat().st_size}",
        ]  # fmt: skip
    (home.root / "dvc.lock").write_text("\n".join(lock) + "\n")
    git(home.root, "add", "dvc.lock", "params.yaml")
    git(home.root, "commit", "-q", "-m", "data", "--allow-empty")


@pytest.fixture
def two(tmp_path):
    """A repository whose first commit holds BASE; its working tree too."""
    home = Home(tmp_path / "repo")
    home.root.mkdir()
    git(home.root, "init", "-q", "-b", "main")
    home.params.write_text("experts: [tea]\nprofile: pocket\nteacher: {kind: phrases}\n")
    put(home.dataset("tea", ""), BASE)
    commit(home)
    return home


def change(home, rows):
    put(home.dataset("tea", ""), rows)
    return diff(home, "tea")


# -- what has changed ---------------------------------------------------------------------------


def test_where_nothing_has_changed_it_says_so(two):
    found = diff(two, "tea")
    assert found.sentence == "tea: no change" and found.counts == {
        "added": 0, "removed": 0, "changed": 0, "unchanged": 9
    }  # fmt: skip
    assert not any(found.samples.values()) and not any(found.seeds.values())


def test_an_edited_form_changes_rows_and_neither_adds_nor_removes_any(two):
    found = change(two, [row(c["seed_id"], c["sample"], output="Now otherwise.") for c, _ in BASE])
    assert found.counts == {"added": 0, "removed": 0, "changed": 9, "unchanged": 0}
    assert found.sentence == "tea: 9 rows changed"
    sample = found.samples["changed"][0]
    assert sample.why == "another output" and sample.before["output"] != sample.after["output"] == "Now otherwise."


@pytest.mark.parametrize("what", COMPARED)
def test_what_of_a_row_has_changed_is_named(two, what):
    values = {"split": "holdout", "answer": "green", "instruction": "why?", "output": "so."}
    found = change(two, [*BASE[:-1], row("c", 2, **{what: values[what]})])
    assert found.counts["changed"] == 1 and found.samples["changed"][0].why == f"another {what}"


def test_the_first_sentence_tells_rows_seeds_and_the_reasons_that_moved_most(two):
    rows = [row("a", 0, split="holdout"), row("a", 1, reasons=["near_copy"]), row("a", 2)]
    rows += [row("b", i, instruction=f"another {i}?") for i in range(3)]
    rows += [row("d", 0), row("e", 0, reasons=["hedge", "near_copy"])]
    assert change(two, rows).sentence == (
        "tea: 4 rows fewer to train on, 1 more held out; 4 rows changed; 2 seeds added; 1 seed removed; 1 seed edited; "
        "near copy up from 0 to 2; hedge up from 0 to 1"
    )


def test_a_row_that_came_or_went_says_why(two):
    rows = [
        row("a", 0), row("a", 1, reasons=["near_copy"]), row("b", 0), row("b", 1), row("b", 2), row("b", 3), row("d", 0)
    ]  # fmt: skip
    found = change(two, rows)
    why = {sample.place: sample.why for samples in found.samples.values() for sample in samples}
    assert (
        why["a/1"] == "now dropped: near_copy" and why["a/2"] == "asked for less" and why["c/0"] == "its seed is gone"
    )
    assert why["b/3"] == "asked for more" and why["d/0"] == "a new seed"
    again = change(two, rows + [row("a", 2)])
    assert "a/2" not in {sample.place for sample in again.samples["removed"]}


def test_a_row_that_was_dropped_before_says_for_what(two):
    put(two.dataset("tea", ""), [*BASE, row("a", 3, reasons=["surplus"])])
    commit(two)
    assert change(two, [*BASE, row("a", 3)]).samples["added"][0].why == "was dropped: surplus"


def test_rows_that_were_never_kept_are_no_change_of_the_dataset_but_are_told(two):
    found = change(two, [*BASE, row("a", 9, reasons=["echo"])])
    assert found.sentence == "tea: echo up from 0 to 1"
    put(two.dataset("tea", ""), [*BASE, row("a", 9, instruction="x", reasons=["echo"])])
    commit(two)
    assert change(two, [*BASE, row("a", 9, instruction="y", reasons=["echo"])]).sentence == (
        "tea: the same rows are kept; others have changed"
    )


def test_samples_are_five_each_way_of_different_seeds_and_the_same_each_time(two):
    found = change(two, BASE + [row(f"new{i}", j) for i in range(9) for j in range(4)])
    assert found.counts["added"] == 36
    assert len({sample.place.split("/")[0] for sample in found.samples["added"]}) == 5
    assert found == diff(two, "tea")


def test_lengths_and_diversity_are_told_before_and_after(two):
    found = change(two, [row(c["seed_id"], c["sample"], "the very same words again?", tokens=41) for c, _ in BASE])
    assert found.tokens["median"] == (30, 41) and found.lengths == {"before": [30] * 9, "after": [41] * 9}
    assert found.diversity["likeness to the nearest"][1] == 1.0
    assert sum(n for _, marks in bars(found.lengths) for _, n, _ in marks) == 18


# -- where the data is --------------------------------------------------------------------------


def test_two_revisions_are_compared_with_each_other(two):
    put(two.dataset("tea", ""), [*BASE, row("d", 0)])
    commit(two)
    assert diff(two, "tea", "HEAD~1..HEAD").counts["added"] == 1
    assert diff(two, "tea", "HEAD..HEAD~1").counts["removed"] == 1
    assert diff(two, "tea", "HEAD~1..").counts["added"] == 1
    assert diff(two, "tea", "HEAD~1").counts["added"] == 1 and diff(two, "tea").sentence == "tea: no change"
    head = git(two.root, "rev-parse", "HEAD")
    assert diff(two, "tea", head).before == head and diff(two, "tea", "main").before == f"main ({head[:7]})"


def test_an_expert_that_was_not_there_before_is_all_added(two):
    git(two.root, "rm", "-q", "--cached", "dvc.lock")
    git(two.root, "commit", "-q", "-m", "no data")
    found = diff(two, "tea")
    assert found.counts["added"] == 9 and "which has no tea" in found.before
    assert found.sentence == "tea: 9 rows more to train on; 3 seeds added"
    lock = (two.root / "dvc.lock").read_text()
    (two.root / "dvc.lock").write_text(lock.replace("tea", "teapot"))
    git(two.root, "add", "dvc.lock")
    git(two.root, "commit", "-q", "-m", "another expert, whose name begins alike")
    assert diff(two, "tea").counts["added"] == 9


def test_data_that_is_not_in_the_cache_is_told_with_the_command_that_brings_it(two):
    shutil.rmtree(two.root / ".dvc" / "cache")
    with pytest.raises(UserError, match=r"candidates\.parquet of HEAD (.|\n)*is not in DVC's cache(.|\n)*dvc fetch"):
        diff(two, "tea")


def test_a_working_tree_without_data_is_told_with_the_command_that_makes_it(two):
    two.dataset("tea", "verdicts.parquet").unlink()
    with pytest.raises(UserError, match=r"verdicts\.parquet: there is no such file\n  then run: dvc pull build@tea"):
        diff(two, "tea")


def test_an_unknown_revision_is_told(two):
    with pytest.raises(UserError, match="there is no revision 'nowhere'\n  then run: git fetch"):
        diff(two, "tea", "nowhere")
    with pytest.raises(UserError, match="there is no revision '--help'"):
        diff(two, "tea", "--help")


def test_a_shallow_clone_says_how_to_get_the_rest(two, tmp_path):
    git(two.root, "commit", "-q", "--allow-empty", "-m", "more")
    git(tmp_path, "clone", "-q", "--depth", "1", f"file://{two.root}", "clone")
    with pytest.raises(UserError, match="in this shallow clone\n  then run: git fetch --unshallow"):
        diff(Home(tmp_path / "clone"), "tea", "HEAD~1")


def test_outside_a_repository_a_folder_is_offered(tmp_path):
    with pytest.raises(UserError, match="is no git repository; compare with a folder instead"):
        diff(Home(tmp_path), "tea")


def test_a_folder_can_be_the_version_before(two, tmp_path):
    put(tmp_path / "old", BASE[:-1])
    found = diff(two, "tea", before=tmp_path / "old")
    assert found.counts["added"] == 1 and found.before.endswith("old")
    with pytest.raises(UserError, match="there is no such file$"):
        diff(two, "tea", before=tmp_path / "none")


@pytest.mark.parametrize("file", ["config", "config.local"])
@pytest.mark.parametrize("absolute", [True, False])
def test_a_configured_cache_is_used(two, tmp_path, file, absolute):
    (two.root / ".dvc" / "cache").rename(tmp_path / "elsewhere")
    place = tmp_path / "elsewhere" if absolute else "../../elsewhere"
    (two.root / ".dvc" / file).write_text(
        f"[core]\n    analytics = false\n['remote \"x\"']\n    url = /x\n[cache]\n    dir = {place}\n"
    )
    assert diff(two, "tea").sentence == "tea: no change"
    assert cache_folder(two).resolve() == (tmp_path / "elsewhere").resolve()


def test_verdicts_of_another_version_are_told(two):
    write_rows(two.dataset("tea", "verdicts.parquet"), VERDICTS, [v for _, v in BASE[:-2]])
    with pytest.raises(UserError, match="working tree: 2 candidates have no verdict"):
        diff(two, "tea")


def test_a_damaged_file_is_told(two):
    two.dataset("tea", "verdicts.parquet").write_bytes(b"half")
    with pytest.raises(UserError, match="damaged parquet"):
        in_folder(two.dataset("tea", ""), "tea")


def test_the_lock_of_this_project_names_the_data_of_each_of_its_experts(home):
    from factory.diff import _hash

    lock = (home.root / "dvc.lock").read_text()
    for expert in ("product", "medical", "legal"):
        for file, stage in zip(FILES, ("generate", "build"), strict=True):
            assert re.fullmatch("[0-9a-f]{32}", _hash(lock, f"{stage}@{expert}", f"datasets/{expert}/{file}"))
    assert _hash(lock, "build@nobody", "x") is None


def test_dvc_itself_lays_and_fetches_what_is_read(tmp_path):
    """The real `dvc`: a stage is run and pushed, the cache removed; the command that is named brings it back."""
    pytest.importorskip("dvc")

    def dvc(*words):
        command = [sys.executable, "-m", "dvc", *words]
        subprocess.run(
            command, cwd=home.root, check=True, capture_output=True, env={**os.environ, "DVC_NO_ANALYTICS": "1"}
        )

    home = Home(tmp_path / "repo")
    put(tmp_path / "made", BASE)
    home.dataset("tea", "").mkdir(parents=True)
    home.params.write_text("experts: [tea]\n")
    stages = [
        f"  {stage}:\n    matrix:\n      expert: [tea]\n    cmd: cp {tmp_path}/made/{name} datasets/tea/\n"
        f"    outs:\n    - datasets/tea/{name}\n"
        for name, stage in zip(FILES, ("generate", "build"), strict=True)
    ]
    (home.root / "dvc.yaml").write_text("stages:\n" + "".join(stages))
    git(home.root, "init", "-q", "-b", "main")
    dvc("init", "-q")
    dvc("remote", "add", "-d", "x", str(tmp_path / "remote"))
    dvc("repro", "-q")
    dvc("push", "-q")
    git(home.root, "add", "-A")
    git(home.root, "commit", "-q", "-m", "data")
    assert diff(home, "tea").sentence == "tea: no change"
    shutil.rmtree(home.root / ".dvc" / "cache")
    with pytest.raises(UserError) as told:
        diff(home, "tea")
    dvc(*str(told.value).split("then run: dvc ")[1].split())
    assert diff(home, "tea").sentence == "tea: no change"


# -- the three forms ----------------------------------------------------------------------------

EVIL = (
    "@octocat #1 | `x` <script>alert(1)</script> [a](http://evil.example) ![i](//e.example/x.png) *b* $m$ "
    "www.evil.example"
)


@pytest.fixture
def evil(two):
    """A diff in which everything that a stranger may write tries to be more than text."""
    rows = [row("a", 0, EVIL + "\n# head\r\x1b[31m\u202e", EVIL), row(f"{EVIL}", 0), row("b", 0)]
    return change(two, rows)


def test_in_markdown_foreign_text_is_nothing_but_text(evil):
    told = markdown(evil)
    foreign = "".join(re.findall(r"<code>(.*?)</code>", told))
    assert "octocat" in foreign and not re.search(r"[@#<>|`\[\]*$\\](?!\d+;)", foreign.replace("&#", ""))
    assert "http:" not in told and "www.e" not in told and "<script" not in told and "\x1b" not in told
    outside = re.sub(r"<code>.*?</code>", "", told)
    assert "octocat" not in outside and "evil" not in outside
    for line in told.split("\n"):
        if line.startswith("| <code>"):
            assert line.count("|") == 6


@given(st.text())
def test_no_text_leaves_its_code_or_holds_markup(text):
    told = quoted(text)
    inner = told.removeprefix("<code>").removesuffix("</code>")
    assert "\n" not in told and not re.search(r"[<>|`*@\[\]\\$~^{}\"]", inner)
    assert not re.search(r"&(?!#\d+;)|://|www\.\w", inner)


def test_in_html_it_is_text_too_and_the_page_needs_nothing_else(evil):
    page = html(evil)
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)" in page
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)


def test_in_a_terminal_it_cannot_steer(evil, tmp_path):
    write(evil, "terminal", tmp_path / "told.txt")
    told = (tmp_path / "told.txt").read_text()
    assert "<script>" in told and "\x1b" not in told and "\u202e" not in told and evil.sentence.split(";")[0] in told


def test_a_long_text_is_cut_and_says_so():
    assert one_line("a" * 500).endswith("a...") and len(one_line("a" * 500)) == 400


def test_each_form_shows_the_sentence_the_figures_and_the_samples(two, tmp_path):
    found = change(two, [*BASE[1:], row("d", 0), row("d", 1, reasons=["near_copy"])])
    for form in ("terminal", "markdown", "html"):
        write(found, form, tmp_path / form)
        told = (tmp_path / form).read_text()
        for part in ("1 seed added", "near copy", "different word pairs", "median", "1 row removed", "question d 0?"):
            assert part in told, (form, part)


def test_the_command_compares_with_the_last_commit(two):
    shutil.copytree(ROOT / "profiles", two.root / "profiles")
    shutil.copytree(ROOT / "models" / "pocket", two.root / "models" / "pocket")
    put(two.dataset("tea", ""), [*BASE, row("d", 0)])
    command = [sys.executable, "-m", "factory.cli", "diff", "tea", "--format", "markdown", "--out", "told.md"]
    subprocess.run(command, cwd=two.root, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    told = (two.root / "told.md").read_text()
    assert told.startswith("### tea: 1 row more to train on; 1 seed added\n")
    done = subprocess.run(
        [*command[:5], "HEAD", "--before", "."], cwd=two.root, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and "candidates.parquet: there is no such file" in done.stderr
