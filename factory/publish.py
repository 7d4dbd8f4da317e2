"""`dmoe publish`: one expert's dataset as a folder with its card, and its way to a folder or to the Hugging Face Hub.

Nothing leaves the machine unless it is asked to, for real. The token is the Hub's own (HF_TOKEN, or `hf auth login`).
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from factory.card import PARQUET, dataset_card
from factory.errors import UserError, relative
from factory.leaks import leaks, told
from factory.paths import Home, Params
from factory.store import sha256, whole

SUMS = "SHA256SUMS"  # marks a folder as a publication: nothing else is ever overwritten


@dataclass(frozen=True)
class Target:
    """Where to: a folder, or a dataset on the Hub."""

    folder: Path | None
    repository: str  # owner/name


def target(to: str) -> Target:
    """What `--to` says.

    Raises:
        UserError: it is neither a folder nor hf://datasets/OWNER/NAME.
    """
    if match := re.fullmatch(r"hf://datasets/([\w.-]+/[\w.-]+)/?", to):
        return Target(None, match[1])
    url = urlsplit(to)
    if to and (not url.scheme or url.scheme == "file" and not url.netloc and url.path):
        return Target(Path(unquote(url.path) if url.scheme else to).expanduser(), "")
    raise UserError(f"--to {to!r}: is no target\n  give hf://datasets/OWNER/NAME, file:///FOLDER or a folder")


def prepare(home: Home, expert: str) -> Path:
    """build/publish/<expert>, written whole: the card, the rows, the seeds, the template, the counts, their hashes.

    Raises:
        UserError: the data are not built.
    """
    card = dataset_card(home, expert)
    files = {
        **{f"{split}.parquet": home.dataset(expert, name) for split, name in PARQUET.items()},
        "seeds.jsonl": home.seeds(expert),
        "template.yaml": home.template(expert),
        "stats.json": home.dataset(expert, "stats.json"),
    }
    folder = home.root / "build" / "publish" / expert
    with whole(folder) as temporary:
        temporary.mkdir()
        for name, path in files.items():
            shutil.copyfile(path, temporary / name)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        sums = [f"{sha256(path)}  {path.name}\n" for path in sorted(temporary.iterdir())]
        (temporary / SUMS).write_text("".join(sums), encoding="utf-8")
    return folder


def publish(home: Home, params: Params, expert: str, to: str, for_real: bool, allow_leaks: bool) -> list[str]:
    """Prepares one expert's folder and, `for_real`, puts it where `to` says; returns the lines to print.

    Raises:
        UserError: a bad target, leaks that are not allowed, or whatever keeps the target from taking it.
    """
    where = target(to)
    found = leaks(home, params.experts, expert)
    if found and not allow_leaks:
        cure = "mend them, or publish all the same: --allow-leaks"
        raise UserError(f"{expert}: not published, {len(found)} leaks\n{told(found, 'text')}\n  {cure}")
    folder = prepare(home, expert)
    lines = [f"{path.stat().st_size:>10,} {sha256(path)[:16]}  {path.name}" for path in sorted(folder.iterdir())]
    gate = "passed" if home.expert(expert, "gate.json").exists() else "not passed (or not scored yet)"
    lines += [f"leaks: {len(found) or 'none found'}; gate of the expert trained on it: {gate}"]
    if not for_real:
        return [*lines, f"would go to {to}; nothing was sent: look at {relative(folder)}, then add --for-real"]
    place = _to_hub(folder, where.repository) if where.repository else _to_folder(folder, where.folder)
    return [*lines, f"published: {place}"]


def _to_folder(folder: Path, place: Path | None) -> str:
    assert place is not None
    if place.exists() and not (place / SUMS).exists() and not (place.is_dir() and not any(place.iterdir())):
        raise UserError(f"{place}: is there and is no publication of dmoe; name another folder")
    with whole(place.resolve()) as temporary:
        shutil.copytree(folder, temporary)
    return str(place)


def _to_hub(folder: Path, repository: str) -> str:
    try:
        import huggingface_hub as hub
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError:
        raise UserError("hf:// needs huggingface_hub\n  then run: pip install huggingface_hub") from None
    if not hub.get_token():
        raise UserError("hf:// needs a token of the Hub\n  then run: hf auth login (or set HF_TOKEN)")
    try:
        api: Any = hub.HfApi()
        api.create_repo(repository, repo_type="dataset", exist_ok=True)
        message = f"{folder.name}: rows, card and hashes, as made by dmoe"
        done = api.upload_folder(repo_id=repository, repo_type="dataset", folder_path=folder, commit_message=message)
    except (HfHubHTTPError, ValueError) as error:  # ValueError: a name that the Hub does not take
        first = str(error).strip().split("\n")[0]
        cure = "is the token allowed to write there? hf auth whoami"
        raise UserError(f"hf://datasets/{repository}: the Hub refused: {first}\n  {cure}") from None
    except Exception as error:  # no network, offline mode: the errors of whatever carries the Hub's requests
        cause = f"{type(error).__name__}: {error}".split("\n")[0]
        cure = "nothing was published"
        raise UserError(f"hf://datasets/{repository}: the Hub was not reached: {cause}\n  {cure}") from None
    return str(getattr(done, "commit_url", None) or f"hf://datasets/{repository}")
