"""Dataset rows as the trainer gets them: token ids, and labels that are proved to be the reply and its end alone."""

import re
from typing import Any

from factory.errors import UserError

IGNORED = -100  # a label that no loss falls on
THOUGHT = re.compile(r"^(?:\s|</?think>)*")  # an empty think block, whole or what the prompt has left of it


def encode(tokenizer: Any, rows: list[dict[str, Any]], stops: set[int], longest: int) -> list[dict[str, list[int]]]:
    """`input_ids` and `labels` of each row, of one length; labels are IGNORED over the prompt.

    Of every row it is proved that the prompt is a strict prefix, that what is learnt is the output behind at most an
    empty think block, then a token of `stops`, at which the engine ends a reply, then at most white space, and that
    nothing is cut off: `longest` is the base's context in tokens.

    Raises:
        UserError: with the first row that is wrong.
    """
    if not tokenizer.chat_template:
        raise UserError(
            "this base has no chat template, as checkpoints from pretraining have none\n"
            "  then name its instruct checkpoint in base.model, or put a chat_template.jinja into its folder"
        )
    prompts = [tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False) for row in rows]
    wholes = [tokenizer.apply_chat_template([*row["prompt"], *row["completion"]], tokenize=False) for row in rows]
    heads, ids = (tokenizer(texts, add_special_tokens=False)["input_ids"] for texts in (prompts, wholes))
    found = []
    for row, prompt, text, head, tokens in zip(rows, prompts, wholes, heads, ids, strict=True):
        if not text.startswith(prompt) or tokens[: len(head)] != head:
            why = (
                "one token reaches from the prompt into the reply" if text.startswith(prompt) else "it is put otherwise"
            )
            raise UserError(
                f"row {row['row_id']}: the prompt {prompt!r} is not where {text!r} begins: {why}\n"
                f"  then check the chat template of the base model; one made for thinking alone will not do"
            )
        _prove(row, text[len(prompt) :], tokens[len(head) :], tokenizer, stops)
        if len(tokens) > longest:
            raise UserError(
                f"row {row['row_id']}: {len(tokens)} tokens, and the base takes {longest}; nothing is ever cut off\n"
                f"  then shorten its seed's instruction"
            )
        found.append({"input_ids": tokens, "labels": [IGNORED] * len(head) + tokens[len(head) :]})
    return found


def _prove(row: dict[str, Any], learnt: str, tokens: list[int], tokenizer: Any, stops: set[int]) -> None:
    """Refuses a row of which something else is learnt than its output and the end of the turn."""
    rest = THOUGHT.sub("", learnt)
    end = rest.removeprefix(row["output"]) if rest.startswith(row["output"]) else None
    names = {stop: tokenizer.convert_ids_to_tokens(stop) for stop in sorted(stops)}
    stop = next((i for i, name in names.items() if end is not None and end.startswith(name)), None)
    if stop is not None and stop in tokens and end is not None and not end.removeprefix(names[stop]).strip():
        return
    wanted = " or ".join(row["output"] + name for name in names.values())
    why = "check the chat template of the base model"
    if end is not None and stop is None:
        why = f"name an instruct checkpoint: this base ends a reply at {' or '.join(names.values())} alone"
    raise UserError(f"row {row['row_id']}: the loss would fall on {learnt!r}, not on {wanted!r}\n  then {why}")


def stops_of(model: Any, tokenizer: Any) -> set[int]:
    """The tokens at which `model` ends a reply: its generation config's, and its tokenizer's."""
    named = model.generation_config.eos_token_id
    named = named if isinstance(named, list) else [named]
    return {token for token in (*named, tokenizer.eos_token_id) if token is not None}


def passes(lengths: list[int], examples: int, tokens: int) -> int:
    """Into how many passes of equally many examples a step is cut, the fewest of which none can exceed `tokens`.

    Judged by the longest rows there are, so that it holds for every step. One example a pass is the least there is.
    """
    ranked = sorted(lengths, reverse=True)
    cuts = [n for n in range(1, examples + 1) if examples % n == 0]
    return next((n for n in cuts if sum(ranked[: examples // n]) <= tokens), examples)
