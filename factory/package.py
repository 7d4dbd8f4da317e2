"""Stage package: all that a marketplace and an operator need of an expert, in one manifest and one tar.

Reads the adapter, its GGUF, the scores, gate.json, parity.json, audit.json, the template, the base's GGUF and, where it
is there, route.safetensors; writes experts/<expert>/<expert>.tar and, last, manifest.json. Equal inputs, equal bytes.
The tar is the package; unpacked it is a folder that `dmoe install` takes as well, and that can be pushed to a hub.
Run: dmoe package <expert>
"""

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

from factory.errors import UserError, relative
from factory.gguf_file import read_base
from factory.paths import Home, Profile
from factory.schema import SCORES, read_rows
from factory.store import need, read_json, sha256, whole, write_json
from factory.template import Template, find_any, read_template

SCHEMA = 2
BASE_FILES = ("model.safetensors", "tokenizer.json", "chat_template.jinja")
PROBES = 3
LICENCES = {  # as the Hub knows them
    "apache-2.0", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc0-1.0", "mit",
    "odbl", "odc-by", "pddl",
}  # fmt: skip


def package(home: Home, expert: str, profile: Profile, base: Path) -> dict[str, Any]:
    """Writes the tar and the manifest; returns the manifest. `base` is the GGUF of the base."""
    template = read_template(home.template(expert))
    for name in ("parity", "eval", "gate", "audit"):
        need(home.expert(expert, f"{name}.json"), f"dvc repro {'score' if name == 'eval' else name}@{expert}")
    measured = read_json(home.expert(expert, "eval.json"))
    files = {
        "adapter.gguf": home.expert(expert, "adapter.gguf"),
        **{f"adapter/{p.name}": p for p in sorted(home.expert(expert, "adapter").iterdir())},
        "eval.json": home.expert(expert, "eval.json"),
        "gate.json": home.expert(expert, "gate.json"),
        "parity.json": home.expert(expert, "parity.json"),
        "audit.json": home.expert(expert, "audit.json"),
        "scores.parquet": home.expert(expert, "scores.parquet"),
    }
    if (routing := home.expert(expert, "route.safetensors")).exists():
        files["route.safetensors"] = routing
    manifest = describe(home, template, profile, measured, base)
    made = {
        "template.json": _json(declared(template)),
        "manifest.json": _json(manifest),
        "README.md": card(template, measured, manifest).encode(),
    }
    made["SHA256SUMS"] = _sums(files, made)
    with whole(home.expert(expert, f"{expert}.tar")) as temporary:
        _tar(temporary, template.declaration.market.lora_id, files, made)
    write_json(home.expert(expert, "manifest.json"), manifest)
    return manifest


def declared(template: Template) -> dict[str, Any]:
    """What of the template the package carries: what the expert says and is measured by, not how it was made."""
    keys = {"expert", "version", "description", "language", "answers", "rivals", "output", "route", "market"}
    values = template.declaration.model_dump(include=keys)
    del values["output"]["never"]
    return values


def describe(home: Home, template: Template, profile: Profile, measured: dict[str, Any], base: Path) -> dict[str, Any]:
    """The manifest: the marketplace's fields by their names, then hashes and figures that prove them."""
    declaration, expert = template.declaration, template.expert
    config = read_json(home.expert(expert, "adapter") / "adapter_config.json")
    model = profile.model_path(home)
    audit = read_json(home.expert(expert, "audit.json"))
    return {
        "schema": SCHEMA,
        "name": expert,
        "lora_id": declaration.market.lora_id,
        "version": declaration.version,
        "description": declaration.description,
        "keywords": declaration.route.keywords,
        "not_keywords": declaration.route.not_keywords,
        "base_model": profile.model,
        "base": read_base(base).facts(),
        "recommended_scale": measured["recommended_scale"],
        "adapter_file": "adapter.gguf",
        "rank": config["r"],
        "alpha": config["lora_alpha"],
        "targets": sorted(config["target_modules"]),
        "licence": declaration.market.licence,
        "seed_licences": _licences(home, expert),
        "declares": declaration.market.declares.model_dump(),
        "sha256": {
            "adapter.gguf": sha256(home.expert(expert, "adapter.gguf")),
            "adapter": sha256(home.expert(expert, "adapter")),
            "train.parquet": sha256(home.dataset(expert, "train.parquet")),
            "holdout.parquet": sha256(home.dataset(expert, "holdout.parquet")),
            "template.json": hashlib.sha256(_json(declared(template))).hexdigest(),
            **({f"base/{name}": sha256(model / name) for name in BASE_FILES} if model else {}),
        },
        "scores": {
            "measured_on": measured["about"],
            **{arm: measured[arm] for arm in ("base", "told", "expert")},
            "base_follows_system_prompt": measured["base_follows_system_prompt"],
            "robustness": measured["robustness"],
            "off_domain": measured["off_domain"],
            "full_precision": measured["full_precision"],
            "times_more": measured["times_more"],
            "length_ratio": measured["length_ratio"],
        },
        "parity": _parity(home, expert),
        "audit": {name: found for name, found in audit.items() if name not in ("base_model", "about")},
        "probe": probes(
            template, read_rows(home.expert(expert, "scores.parquet"), SCORES, f"dvc repro score@{expert}")
        ),
    }


def probes(template: Template, scores: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Up to three held-out questions that show whether the adapter is applied.

    Those of which the expert's greedy reply was right and in form and holds the answer's text, and the base's reply to
    the same question does not. The shortest reply first (a standing probe should cost little), one of each answer
    before a second of any; of equals, the first by row_id.
    """
    claim = [row for row in scores if row["panel"] == "claim"]
    base = {row["row_id"]: row["reply"] for row in claim if row["arm"] == "base"}
    good = [
        row for row in claim if row["arm"] == "expert" and row["right"] and row["in_form"] and row["row_id"] in base
    ]
    turns: dict[str, int] = {}
    found = []
    for row in sorted(good, key=lambda row: (row["tokens"], row["row_id"])):
        says = template.answers[row["answer"]].text
        if find_any([says], row["reply"]) and not find_any([says], base[row["row_id"]]):
            turns[row["answer"]] = turns.get(row["answer"], 0) + 1
            found.append((turns[row["answer"]], {"question": row["instruction"], "says": says}))
    return [probe for _, probe in sorted(found, key=lambda item: item[0])[:PROBES]]


def claim_kept(home: Home, expert: str) -> bool:
    """Whether the gate was passed. gate.json is DVC's: in a clone, a package of these very scores says so instead."""
    scores, packed = home.expert(expert, "eval.json"), home.expert(expert, "manifest.json")
    if home.expert(expert, "gate.json").exists():
        return True
    if not (scores.exists() and packed.exists()):
        return False
    return bool(read_json(packed)["scores"]["expert"] == read_json(scores)["expert"])


def _parity(home: Home, expert: str) -> dict[str, Any]:
    """What parity measured, if it was on these very files: one that fails leaves an older parity.json behind."""
    path = home.expert(expert, "parity.json")
    found: dict[str, Any] = read_json(path)
    for name, digest in found.pop("sha256").items():
        if digest != sha256(home.expert(expert, name)):
            raise UserError(f"{relative(path)}: is of another {name}\n  then run: dmoe parity {expert}")
    return found


def _licences(home: Home, expert: str) -> list[str]:
    lines = home.seeds(expert).read_text(encoding="utf-8").splitlines()
    return sorted({json.loads(line)["licence"] for line in lines if line.strip()})


def card(template: Template, measured: dict[str, Any], manifest: dict[str, Any]) -> str:
    """The package's README.md: what the expert does and what was measured, in words that claim no more."""
    expert, ratio = measured["expert"], measured["length_ratio"]
    arms = ["base", "told", "expert"] if measured["base_follows_system_prompt"] else ["base", "expert"]
    told = ["*told* is the base behind a system prompt that asks for just this."] if "told" in arms else []
    measures = ("named", "mention", "right", "in_form")
    lines = [
        *_front(template, manifest),
        f"# {manifest['lora_id']}",
        "",
        template.declaration.description,
        "",
        f"Base model: {manifest['base_model']} ({measured['about']}). Licence: {manifest['licence']}.",
        f"Recommended scale: {manifest['recommended_scale']:g}. Declared interest: {manifest['declares']['interest']}.",
        f"Domain risk: {manifest['declares']['domain_risk']}.",
        "",
        *_table("measured on the shipped GGUF, in llama.cpp, on held-out questions", *arms),
        *(_line(name, *(_share(measured[arm][name]) for arm in arms)) for name in measures),
        _line("median tokens", *(f"{measured[arm]['tokens']['median']:g}" for arm in arms)),
        "",
        f"{expert['n']} questions from {expert['seeds']} seeds that were never trained on; 95 % Wilson intervals,",
        f"clustered by seed. Replies are {ratio['rate']} times shorter ({ratio['low']} to {ratio['high']}).",
        *told,
        "All figures are the publisher's own.",
        "",
        "## Asked in harder ways",
        "",
        *_table("the same questions", "mention", "right"),
        *(_line(way, _share(f["mention"]), _share(f["right"])) for way, f in measured["robustness"].items()),
        "",
        *_elsewhere(measured["off_domain"]),
        *_same(manifest["parity"]),
        "## What three attacks got out of it",
        "",
        *(f"- {line}" for line in manifest["audit"]["says"]),
        "",
        "## To use it",
        "",
        "The PEFT adapter lies in `adapter/`, for llama.cpp there is `adapter.gguf`:",
        "",
        '    PeftModel.from_pretrained(base, "FOLDER/adapter")',
        f"    llama-server -m BASE.gguf --lora-scaled adapter.gguf:{manifest['recommended_scale']:g}",
    ]
    return "\n".join([*lines, ""])


def _front(template: Template, manifest: dict[str, Any]) -> list[str]:
    """The Hub's YAML. JSON is YAML too, so no text of the template can break out of its value."""
    values = {
        "base_model": manifest["base_model"],
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "language": [template.declaration.language],
        "tags": ["lora", "llama.cpp", "gguf", "dmoe"],
    }
    lines = {key: json.dumps(value) for key, value in values.items()} | hub_licence(manifest["licence"])
    return ["---", *(f"{key}: {value}" for key, value in lines.items()), "---", ""]


def hub_licence(licence: str) -> dict[str, str]:
    """A licence as the Hub's front matter tells it; one that the Hub does not know is "other", with its name."""
    known = licence.lower() in LICENCES
    return {"license": licence.lower()} if known else {"license": "other", "license_name": json.dumps(licence.lower())}


def _elsewhere(found: dict[str, Any]) -> list[str]:
    base, expert = found["base"], found["expert"]
    return [
        "## Asked something else",
        "",
        f"With the adapter on, {expert['n']} everyday questions of other kinds get one of its answers in "
        f"{_share(expert['mention'])},",
        f"from the base alone in {_share(base['mention'])} of {base['n']}. A router must keep them away from it.",
        "",
    ]


def _same(found: dict[str, Any]) -> list[str]:
    worst = max(scale["kl_max"] for scale in found["scales"].values())
    return [
        "## The file is what was trained",
        "",
        f"At scales {', '.join(found['scales'])} llama.cpp with this file and PEFT with the trained adapter differ by",
        f"at most {worst:.1e} nats (KL of the next token, {found['positions']} places, base {found['base']}); "
        f"all {found['updates']['compared']} updates are equal.",
        "",
    ]


def _table(*names: str) -> list[str]:
    return [_line(*names), _line(*("---" for _ in names))]


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _share(figure: dict[str, float]) -> str:
    return f"{figure['rate']:.3f} ({figure['low']:.3f} to {figure['high']:.3f})"


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _sums(files: dict[str, Path], made: dict[str, bytes]) -> bytes:
    sums = {name: sha256(path) for name, path in files.items()}
    sums |= {name: hashlib.sha256(data).hexdigest() for name, data in made.items()}
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())).encode()


def _tar(out: Path, folder: str, files: dict[str, Path], made: dict[str, bytes]) -> None:
    """Names in order, no owner, no time: the same content gives the same tar."""
    contents = {**{name: path.read_bytes() for name, path in files.items()}, **made}
    with tarfile.open(out, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in sorted(contents.items()):
            entry = tarfile.TarInfo(f"{folder}/{name}")
            entry.size, entry.mode = len(data), 0o644
            tar.addfile(entry, io.BytesIO(data))
