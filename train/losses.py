"""What an adapter has changed about a text: its loss less the base's, and what greedy decoding would say."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from factory.progress import track

BATCH = 32
T = TypeVar("T")


@dataclass(frozen=True)
class Text:
    """A row in the base's tokens, and where its question and its reply (with the token that ends it) stand."""

    ids: list[int]
    question: slice
    reply: slice

    @property
    def rest(self) -> slice:
        """The second half of the question."""
        return slice((self.question.start + self.question.stop) // 2, self.question.stop)


@dataclass(frozen=True)
class Change:
    """One row under the adapter (first) and under the base (second)."""

    question: float  # mean loss of its tokens in nats, the adapter's less the base's
    reply: float
    reply_alone: float  # the adapter's own
    says_rest: tuple[bool, bool]  # greedy decoding goes on with it word for word
    says_reply: tuple[bool, bool]


def changes(model: Any, tokenizer: Any, rows: list[dict[str, Any]], name: str) -> list[Change]:
    """For each row what the adapter of `model`, a PEFT model, has changed; `name` stands beside the progress."""
    texts = [encode(tokenizer, row) for row in rows]
    return [_change(*each) for each in zip(texts, *_both(model, lambda: read(model, texts, name)), strict=True)]


def _change(text: Text, own: tuple[Any, Any], base: tuple[Any, Any]) -> Change:
    def less(span: slice) -> float:
        return float(own[0][span].mean() - base[0][span].mean())

    def says(span: slice) -> tuple[bool, bool]:
        return bool(own[1][span].all()), bool(base[1][span].all())

    alone = float(own[0][text.reply].mean())
    return Change(less(text.question), less(text.reply), alone, says(text.rest), says(text.reply))


def _both(model: Any, measure: Callable[[], T]) -> tuple[T, T]:
    """What `measure` gives with the adapter, and without."""
    own = measure()
    with model.disable_adapter():
        return own, measure()


def encode(tokenizer: Any, row: dict[str, Any]) -> Text:
    """The row as the trainer sees it; what the chat template puts behind the reply's end is left off."""
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
    text = tokenizer.apply_chat_template([*row["prompt"], *row["completion"]], tokenize=False)
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    question, output = row["instruction"].strip(), row["output"].strip()
    start, end = prompt.rindex(question), text.rindex(output) + len(output) + len(tokenizer.eos_token)

    def span(first: int, last: int) -> slice:
        inside = [i for i, (a, b) in enumerate(tokens["offset_mapping"]) if first <= a < b <= last]
        return slice(inside[0], inside[-1] + 1)

    reply = span(len(prompt), end)
    return Text(tokens["input_ids"][: reply.stop], span(start, start + len(question)), reply)


def read(model: Any, texts: list[Text], name: str) -> list[tuple[Any, Any]]:
    """For each text two vectors, an entry a token: its loss in nats, and whether it was the likeliest there.

    Likeliest all along a span: greedy decoding says the span. The first token has no loss: 0.
    """
    import torch

    pad, by_length = torch.nn.functional.pad, sorted(range(len(texts)), key=lambda i: len(texts[i].ids))
    chunks = [by_length[i : i + BATCH] for i in range(0, len(texts), BATCH)]
    found: dict[int, tuple[Any, Any]] = {}
    for chunk in track(chunks, name, len(chunks)):
        longest = max(len(texts[i].ids) for i in chunk)
        ids = torch.tensor([texts[i].ids + [0] * (longest - len(texts[i].ids)) for i in chunk], device=model.device)
        # Padding stands behind: what a token sees is before it, and nothing behind it is read.
        with torch.inference_mode():
            logits = model(input_ids=ids).logits[:, :-1].float()
            loss = _loss(logits, ids[:, 1:])
            likeliest = logits.argmax(-1) == ids[:, 1:]
        both = [pad(values, (1, 0)).cpu().numpy() for values in (loss.double(), likeliest)]
        found |= {i: (both[0][k], both[1][k]) for k, i in enumerate(chunk)}
    return [found[i] for i in range(len(texts))]


def _loss(logits: Any, ids: Any) -> Any:
    import torch

    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids, reduction="none")


def code_changes(model: Any, prefix: list[int], codes: list[list[int]]) -> list[float]:
    """For each of `codes`, equally long, behind one prefix: its loss in nats, summed, the adapter's less the base's."""
    own, base = _both(model, lambda: read_codes(model, prefix, codes))
    return [float(a - b) for a, b in zip(own, base, strict=True)]


def read_codes(model: Any, prefix: list[int], codes: list[list[int]]) -> Any:
    """The loss of each code, a vector; the prefix is computed once."""
    import torch

    losses = []
    with torch.inference_mode():
        head = model(input_ids=torch.tensor([prefix], device=model.device), use_cache=True)
        for first in range(0, len(codes), 8 * BATCH):
            ids = torch.tensor(codes[first : first + 8 * BATCH], device=model.device)
            cache = copy.deepcopy(head.past_key_values)
            cache.batch_repeat_interleave(len(ids))
            tail = model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True).logits
            logits = torch.cat([head.logits[:, -1:].expand(len(ids), 1, -1), tail], 1).float()
            losses.append(_loss(logits, ids).sum(1))
    return torch.cat(losses).double().cpu().numpy()
