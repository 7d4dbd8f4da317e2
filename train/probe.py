"""What share of held-out questions the adapter answers, asked while it trains: after each epoch.

Greedy replies of the model as it is being trained, by transformers: near to what the shipped file will say, but not
it; `score` measures that. Training stops where the lower ends of the 95 % intervals of mention, right and form all
reach `enough` of the profile. No gate of the template is looked at for that, so that editing one trains nothing anew.
"""

from dataclasses import dataclass
from typing import Any

from factory.paths import Profile
from factory.template import Template
from train.figures import interval
from train.panel import spread

MEASURES = {"mention": "mention", "right": "right", "form": "in_form"}  # the gate's name -> the measure's
ROOM = 8  # tokens of a reply beyond the template's most: an empty think block is four, the end of the turn one
Row = dict[str, Any]


@dataclass(frozen=True)
class Probe:
    """Held-out rows, and what they are judged by."""

    template: Template
    questions: list[Row]
    enough: float | None

    def ask(self, model: Any, tokenizer: Any) -> dict[str, dict[str, float]]:
        """Each measure's rate and interval; `model` is left as it was, in training or not."""
        replies = greedy(model, tokenizer, self.questions, self.template.output.tokens[1] + ROOM)
        found = [
            (row["seed_id"], self.template.measure(reply, row["answer"]))
            for row, reply in zip(self.questions, replies, strict=True)
        ]
        return {
            name: interval((seed, getattr(measured, measure)) for seed, measured in found)
            for name, measure in MEASURES.items()
        }

    def settled(self, found: dict[str, dict[str, float]]) -> bool:
        """Whether the claim is kept so safely that more training has nothing to add."""
        return self.enough is not None and all(figures["low"] >= self.enough for figures in found.values())


def read_probe(template: Template, profile: Profile, held_out: list[Row]) -> Probe | None:
    """The probe that the profile asks for; None: none."""
    questions = spread(held_out, profile.train.probe)
    return Probe(template, questions, profile.train.enough) if questions else None


def hopeless(found: dict[str, dict[str, float]], template: Template, profile: Profile) -> list[str]:
    """For each gated measure whose interval lies wholly below its gate, what was found and wanted."""
    gate = template.declaration.gate
    return [
        f"{name} {figures['rate']:.2f} ({figures['low']:.2f} to {figures['high']:.2f}), {getattr(gate, name):g} wanted"
        for name, figures in found.items()
        if name in profile.gates and figures["high"] < getattr(gate, name)
    ]


def greedy(model: Any, tokenizer: Any, rows: list[Row], most: int) -> list[str]:
    """The most likely reply to each row's prompt, at most `most` tokens, without a think block."""
    import torch

    prompts = [tokenizer.apply_chat_template(r["prompt"], add_generation_prompt=True, tokenize=False) for r in rows]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    batch = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            out = model.generate(**batch, max_new_tokens=most, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    finally:
        model.train(training)
    texts = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.rpartition("</think>")[2].strip() for text in texts]
