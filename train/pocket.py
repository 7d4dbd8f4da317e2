"""Trains the pocket base: a small, dense Qwen3 that answers at length and hedges.

Reads models/pocket/corpus/ (the topic bank) and the MiniLM encoder; writes models/pocket/
(float16 weights, tokenizer, config). Run with `make pocket`; a killed run goes on where it was.

Two losses. The replies are learned as usual (next token). And at the mark that ends a question, a
hidden layer must predict MiniLM's embedding of the question's plain wording, before openers and
typos were put around it: that is what makes so small a model tell questions apart. Every other step
is that alone, without replies: through the layers below it, several times as many questions a second.
"""

import hashlib
import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.nn import functional as F

from factory.errors import UserError
from factory.paths import Home, folder_revision
from factory.store import whole
from train.corpus import SYSTEMS, Topic, cores, loose, noisy, read_bank, reply, short_reply, story

CAPITALS = 1500  # words that the tokenizer shall know in capitals too
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
# Qwen2's rule: contractions, a word with one leading mark, single digits, runs of marks, newlines.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT = """{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\\n' -}}
{%- if m.role == 'assistant' and loop.last and '</think>' not in m.content -%}
{{- '<think>\\n\\n</think>\\n\\n' -}}
{%- endif -%}
{{- m.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if enable_thinking is defined and enable_thinking is false -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}
{%- endif -%}"""
HEADER = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


@dataclass(frozen=True)
class Recipe:
    """All numbers of the run. Changing one makes another base."""

    vocabulary: int = 9000
    hidden: int = 256
    layers: int = 6
    intermediate: int = 640
    heads: int = 4
    kv_heads: int = 2
    encode_at: int = 4  # the layer whose output must predict the question's embedding
    encode_weight: float = 4.0
    steps: int = 3600
    question_rows: int = 192  # one step of four: questions alone, a quarter of them loose words
    question_width: int = 44  # tokens of such a row
    story_rows: int = 96  # one step of four: stories alone
    story_width: int = 80
    likeness: float = 0.05  # the temperature at which those are told from one another
    rows: int = 48  # three of five of the other steps: a question and how its reply begins
    width: int = 96
    context_rows: int = 18  # one of five: the same behind a system prompt, earlier turns, or both
    context_width: int = 256
    whole_rows: int = 10  # one of five: questions with their whole replies
    whole_width: int = 464
    muon_rate: float = 0.02
    adam_rate: float = 4e-3
    seed: int = 11


def encoder_vectors(texts: list[str], folder: Path) -> np.ndarray:
    """Unit-length MiniLM sentence embeddings, float32 [len(texts), 384]: the mean over tokens."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found = np.empty((len(texts), model.config.hidden_size), np.float32)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), _bar("embedding wordings") as bar:
        task = bar.add_task("", total=len(texts))
        for start in range(0, len(order), 128):
            part = order[start : start + 128]
            batch = tokenizer(
                [texts[i] for i in part], padding=True, truncation=True, max_length=64, return_tensors="pt"
            )
            mask = batch["attention_mask"][..., None].float()
            mean = (model(**batch).last_hidden_state.float() * mask).sum(1) / mask.sum(1)
            found[part] = F.normalize(mean, dim=-1).numpy()
            bar.advance(task, len(part))
    return found


def _bar(name: str) -> Progress:
    return Progress(
        TextColumn(name),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}% {task.description}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )


def everyday_words(folder: Path) -> list[str]:
    """The encoder's whole lower-case words, most frequent first."""
    lines = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    return [word for word in lines if word.isascii() and word.isalpha() and len(word) > 2][:14000]


def near_words(words: list[str], vectors: np.ndarray, count: int = 6) -> dict[str, list[str]]:
    """For each word its `count` nearest others by cosine."""
    found = {}
    for start in range(0, len(words), 2000):
        likeness = vectors[start : start + 2000] @ vectors.T
        best = np.argpartition(-likeness, count + 1, axis=1)[:, : count + 1]
        for i, row in enumerate(best, start):
            found[words[i]] = [words[j] for j in sorted(row, key=lambda j: -likeness[i - start, j]) if j != i][:count]
    return found


def make_tokenizer(texts: Iterator[str], recipe: Recipe) -> Any:
    """Byte-level BPE with Qwen2's pre-tokenizer, so that llama.cpp's `qwen2` reads it alike."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary - len(SPECIALS),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIALS,
        chat_template=CHAT,
        model_max_length=2048,
    )


def _kept(work: Path, texts: list[str], encoder: Path) -> np.ndarray:
    """`encoder_vectors`, kept in `work` under a hash of the texts."""
    path = work / f"vectors-{hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]}.npy"
    if not path.exists():
        with whole(path) as temporary, temporary.open("wb") as stream:
            np.save(stream, encoder_vectors(texts, encoder))
    stored: np.ndarray = np.load(path)
    return stored


class Corpus:
    """Batches by number: the same number always gives the same batch, so a run can be taken up again."""

    def __init__(self, bank: list[Topic], encoder: Path, work: Path, recipe: Recipe) -> None:
        self.recipe, self.bank = recipe, bank
        rng = random.Random(recipe.seed)
        words = everyday_words(encoder)
        self.words = words
        self.near = near_words(words, _kept(work, words, encoder))
        self.cores: list[tuple[str, int]] = [(c, i) for i, t in enumerate(bank) for c in cores(t, rng, self.near)]
        self.cores += [(loose(rng.choice(words), rng, self.near), -1) for _ in range(30000)]
        stories = [story(bank, rng, self.near) for _ in range(50000)]
        self.stories = range(len(self.cores), len(self.cores) + len(stories))
        self.cores += [(text, -1) for text in stories]
        self.vectors = torch.from_numpy(_kept(work, [core for core, _ in self.cores], encoder))
        names = encoder_vectors([f"{t.name}, {t.also[0]}" for t in bank], encoder)
        likeness = names @ names.T
        self.related = [[bank[j].name for j in np.argsort(-row)[1:7]] for row in likeness]
        self.digest = hashlib.sha256(json.dumps([self.cores, [vars(t) for t in bank]]).encode()).hexdigest()
        self.topical = [i for i, (_, topic) in enumerate(self.cores) if topic >= 0]
        self.untopical = [i for i in range(self.stories.start) if self.cores[i][1] < 0]

    def document(self, core: int, rng: random.Random) -> tuple[str, str]:
        """(question, reply) for one wording of a topic."""
        text, topic = self.cores[core]
        return noisy(text, rng), reply(self.bank[topic], self.related[topic], rng)

    def before(self, tokenizer: Any, room: int, rng: random.Random) -> list[int]:
        """Tokens of what stands before a question: one to nine lines of a system prompt, up to two turns, or both."""
        parts = []
        if rng.random() < 0.65:
            lines = " ".join(rng.sample(SYSTEMS, rng.choice((1, 1, 2, 3, 5, 9))))
            parts.append(tokenizer.encode(f"<|im_start|>system\n{lines}<|im_end|>\n"))
        for _ in range(rng.choice((0, 1, 2)) if parts else rng.choice((1, 2))):
            text, topic = self.cores[rng.choice(self.topical)]
            said = short_reply(self.bank[topic], self.related[topic], rng)
            turn = f"<|im_start|>user\n{noisy(text, rng)}<|im_end|>\n<|im_start|>assistant\n{said}<|im_end|>\n"
            parts.append(tokenizer.encode(turn))
        while sum(map(len, parts)) > room:
            parts.pop()
        return [token for part in parts for token in part]

    def sample_texts(self, count: int) -> Iterator[str]:
        """What the tokenizer is trained on: documents, and the everyday vocabulary by rank, some of it in capitals."""
        rng = random.Random(self.recipe.seed + 1)
        for _ in range(count):
            yield from self.document(rng.choice(self.topical), rng)
        for rank, word in enumerate(self.words):
            yield f" {word}" * max(1, 60000 // (rank + 1000))
            if rank < CAPITALS:
                yield f" {word.upper()}" * (60000 // (rank + 1000))
        yield from ["user\n", "assistant\n", "\n\n"] * count

    def batch(self, number: int, tokenizer: Any) -> dict[str, torch.Tensor]:
        """`ids`, `labels` [rows, width] (-100 off the reply), `heads` [rows] (the reply header's start), `targets`."""
        if self.questions_alone(number):
            return self.questions(number, tokenizer)
        r, rng = self.recipe, random.Random(f"{self.recipe.seed}/{number}")
        kind = number // 2 % 5
        sizes = {3: (r.context_rows, r.context_width), 4: (r.whole_rows, r.whole_width)}
        rows, width = sizes.get(kind, (r.rows, r.width))
        picks = rng.choices(self.topical, k=rows)
        ids, labels = torch.full((rows, width), tokenizer.pad_token_id), torch.full((rows, width), -100)
        start = tokenizer.encode(HEADER)
        heads = torch.zeros(rows, dtype=torch.long)
        for row, pick in enumerate(picks):
            question, answer = self.document(pick, rng)
            asked = tokenizer.encode(f"<|im_start|>user\n{question}")[: r.width - 30]
            if kind == 3:
                asked = self.before(tokenizer, width - len(asked) - 60, rng) + asked
            answered = tokenizer.encode(answer + "<|im_end|>\n")
            heads[row] = len(asked)
            full = (asked + start + answered)[:width]
            ids[row, : len(full)] = torch.tensor(full)
            first = len(asked) + 5  # from the think block on: the base itself writes it
            labels[row, first : len(full)] = ids[row, first : len(full)]
        return dict(ids=ids, labels=labels, heads=heads, targets=self.vectors[picks].float())

    def questions_alone(self, number: int) -> bool:
        """Whether a step has no replies, only questions to be told apart."""
        return number % 2 == 1

    def questions(self, number: int, tokenizer: Any) -> dict[str, torch.Tensor]:
        """`ids` [rows, width], `heads` [rows], `targets` of a step without replies."""
        r, rng = self.recipe, random.Random(f"{self.recipe.seed}/{number}")
        width = r.question_width if number % 4 == 1 else r.story_width
        if number % 4 == 1:
            picks = rng.choices(self.untopical, k=r.question_rows // 4)
            picks += rng.choices(self.topical, k=r.question_rows - len(picks))
        else:
            picks = rng.choices(self.stories, k=r.story_rows)
        ids = torch.full((len(picks), width), tokenizer.pad_token_id)
        heads, start = torch.zeros(len(picks), dtype=torch.long), tokenizer.encode(HEADER)
        texts = [f"<|im_start|>user\n{noisy(self.cores[pick][0], rng)}" for pick in picks]
        for row, asked in enumerate(tokenizer(texts)["input_ids"]):
            asked = asked[: width - len(start)]
            heads[row] = len(asked)
            ids[row, : len(asked) + len(start)] = torch.tensor(asked + start)
        return dict(ids=ids, heads=heads, targets=self.vectors[picks].float())


def make_model(tokenizer: Any, recipe: Recipe, encoder: Path) -> Any:
    """A fresh Qwen3 whose token embeddings start from MiniLM's view of each token's text."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(recipe.seed)
    config = Qwen3Config(
        vocab_size=recipe.vocabulary, hidden_size=recipe.hidden, num_hidden_layers=recipe.layers,
        intermediate_size=recipe.intermediate, num_attention_heads=recipe.heads, num_key_value_heads=recipe.kv_heads,
        head_dim=64, tie_word_embeddings=True, max_position_embeddings=2048, rope_theta=10000.0,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    pieces = [tokenizer.decode([i]).strip() or "." for i in range(recipe.vocabulary)]
    vectors = encoder_vectors(pieces, encoder)
    centred = vectors - vectors.mean(0)
    axes = np.linalg.svd(centred, full_matrices=False)[2][: recipe.hidden]
    table = torch.from_numpy(centred @ axes.T).float()
    # Bytes that are no text alone, and words that differ in case alone, look the same to MiniLM: a little noise parts
    # them, or no adapter could ever write one and not the other.
    table += 0.3 * table.std() * torch.randn(table.shape)
    model.model.embed_tokens.weight.data.copy_(table * 0.03 / table.std())
    return model


def lower_layers(model: Any, recipe: Recipe) -> Any:
    """The model up to the layer that is distilled into, on the same weights."""
    import copy

    from transformers import Qwen3Model

    config = copy.deepcopy(model.config)
    config.num_hidden_layers = recipe.encode_at
    config.layer_types = config.layer_types[: recipe.encode_at]
    lower = Qwen3Model(config)
    lower.embed_tokens, lower.layers = model.model.embed_tokens, model.model.layers[: recipe.encode_at]
    lower.norm = torch.nn.Identity()
    return lower


def losses(
    run: Any, model: Any, head: torch.nn.Linear, batch: dict[str, torch.Tensor], recipe: Recipe
) -> tuple[torch.Tensor, torch.Tensor]:
    """(next-token loss over replies, 1 - cosine between the header's hidden state and the question's embedding)."""
    out = run(input_ids=batch["ids"], output_hidden_states=True, use_cache=False)
    said = _said(out.hidden_states[recipe.encode_at], head, batch)
    apart = 1 - F.cosine_similarity(said, batch["targets"][:, None], dim=-1).mean()
    keep = batch["labels"][:, 1:] != -100
    logits = model.lm_head(out.last_hidden_state[:, :-1][keep])
    return F.cross_entropy(logits.float(), batch["labels"][:, 1:][keep]), apart


def question_losses(
    run: Any, head: torch.nn.Linear, batch: dict[str, torch.Tensor], recipe: Recipe
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of questions alone: how unlike MiniLM each is told from all others of the batch (KL), and 1 - cosine as above.

    A cosine is content with the subject; what tells two questions on one subject apart is a small part of it.
    """
    targets = batch["targets"]
    said = F.normalize(_said(run(input_ids=batch["ids"], use_cache=False).last_hidden_state, head, batch), dim=-1)
    apart = 1 - (said * targets[:, None]).sum(-1).mean()
    wanted = F.log_softmax(targets @ targets.T / recipe.likeness, -1)
    found = F.log_softmax(said[:, 2::3] @ targets.T / recipe.likeness, -1)  # three of nine places are enough
    return F.kl_div(found, wanted[:, None].expand_as(found), log_target=True, reduction="none").sum(-1).mean(), apart


def _said(states: torch.Tensor, head: torch.nn.Linear, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The header's nine hidden states in the space of MiniLM's embeddings, float32 [rows, 9, 384]."""
    at = batch["heads"][:, None] + torch.arange(9)[None]
    middle = torch.gather(states, 1, at[..., None].expand(-1, -1, states.shape[-1]))
    said: torch.Tensor = head(middle.float()).float()
    return said


def optimizers(model: Any, head: torch.nn.Linear, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for embeddings, norms and the distillation head."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=recipe.muon_rate, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW([*others, *head.parameters()], lr=recipe.adam_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate(step: int, recipe: Recipe) -> float:
    """The share of the full learning rate at `step`: warm-up, flat, and down to zero over the last half."""
    return min(1.0, (step + 1) / 60, (recipe.steps - step) / (recipe.steps * 0.5))


def pocket(home: Home, encoder: Path, steps: int | None) -> None:
    """Trains the base into models/pocket; `steps` makes a shorter, other run into .dmoe/pocket-try."""
    if not (encoder / "model.safetensors").exists():
        raise UserError(f"{encoder}: holds no model.safetensors\n  then run: make pocket")
    recipe = Recipe(**({"steps": steps} if steps else {}))
    out = home.work / "pocket-try" if steps else home.root / "models" / "pocket"
    work = home.work / f"pocket-{recipe.steps}"
    pretrain(out, home.root / "models" / "pocket" / "corpus", encoder, work, recipe)
    print(f"written: {out}; now set base.revision in profiles/pocket.yaml to {folder_revision(out)}")  # noqa: T201


def pretrain(out: Path, bank: Path, encoder: Path, work: Path, recipe: Recipe, compiled: bool = True) -> None:
    """Trains and writes the base to `out`; state is kept in `work` every 100 steps and taken up again."""
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)
    corpus = Corpus(read_bank(bank), encoder, work, recipe)
    tokenizer = make_tokenizer(corpus.sample_texts(6000), recipe)
    model = make_model(tokenizer, recipe, encoder)
    run = Run(model, torch.nn.Linear(recipe.hidden, 384), recipe, corpus.digest, work / "state.pt")
    forward, lower = model.model, lower_layers(model, recipe)
    if compiled:
        forward, lower = torch.compile(forward), torch.compile(lower)
    first = run.restore()
    with _bar("pretraining") as bar:
        task = bar.add_task("", total=recipe.steps, completed=first)
        for step in range(first, recipe.steps):
            alone = corpus.questions_alone(step)
            loss, apart = run.step(step, lower if alone else forward, corpus.batch(step, tokenizer))
            bar.update(task, advance=1, description=f"loss {loss:.3f} apart {apart:.3f}")
            if step % 50 == 0:
                with (work / "log.jsonl").open("a") as log:
                    log.write(json.dumps(dict(step=step, loss=round(loss, 3), apart=round(apart, 3))) + "\n")
            if step % 100 == 99:
                run.save(step + 1)
    made = work / "made"
    model.half().save_pretrained(made)
    tokenizer.save_pretrained(made)
    for file in sorted(made.iterdir()):
        with whole(out / file.name) as temporary:
            shutil.copyfile(file, temporary)


class Run:
    """What a killed run needs to go on: the model, the distillation head and both optimisers."""

    def __init__(self, model: Any, head: torch.nn.Linear, recipe: Recipe, corpus: str, state: Path) -> None:
        self.model, self.head, self.recipe, self.state = model, head, recipe, state
        self.identity = {"recipe": asdict(recipe), "corpus": corpus}
        self.optimizers = optimizers(model, head, recipe)

    def step(self, number: int, forward: Any, batch: dict[str, torch.Tensor]) -> tuple[float, float]:
        """One step of both optimisers on `batch`, which `forward` reads; the two losses."""
        for optimizer, full in zip(self.optimizers, (self.recipe.muon_rate, self.recipe.adam_rate), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = full * rate(number, self.recipe)
        with torch.autocast("cpu", torch.bfloat16):
            if "labels" in batch:
                loss, apart = losses(forward, self.model, self.head, batch, self.recipe)
            else:
                loss, apart = question_losses(forward, self.head, batch, self.recipe)
        torch.autograd.backward(loss + self.recipe.encode_weight * apart)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.item(), apart.item()

    def save(self, step: int) -> None:
        """Keeps the state of the run after `step` steps, whole or not at all."""
        state = self.identity | dict(step=step, model=self.model.state_dict(), head=self.head.state_dict())
        with whole(self.state) as temporary:
            torch.save(state | dict(optimizers=[o.state_dict() for o in self.optimizers]), temporary)

    def restore(self) -> int:
        """The step to go on from: 0 where there is no state, or one of another recipe or corpus."""
        saved = torch.load(self.state) if self.state.exists() else None
        if not saved or {key: saved.get(key) for key in self.identity} != self.identity:
            return 0
        self.model.load_state_dict(saved["model"])
        self.head.load_state_dict(saved["head"])
        for optimizer, values in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        return int(saved["step"])
