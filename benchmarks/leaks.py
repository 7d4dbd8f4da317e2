"""Held-out questions planted into the training rows: how many `dmoe leaks` finds, and how many it finds where none are.

Every planted row is a held-out seed reworded by hand lightly, by hand in other words, with letters swapped, or with
a teacher's words around it. Beside it plain rapidfuzz at the likeness at which it has as few false alarms.
Run: python benchmarks/leaks.py [FOLDER OF all-MiniLM-L6-v2]   (make pocket puts it into build/minilm)
"""

import random
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from rapidfuzz import fuzz, process
from rapidfuzz.utils import default_process
from rich.console import Console
from rich.table import Table

from factory.leaks import FEW, Expert, Method, _expert, _held_out, meaning_vectors, nearest, word_vectors
from factory.paths import find_home, read_params
from factory.seeds import Seed

# held-out seed -> its question reworded lightly, and said anew in other words
PLANTED = {
    "product-0006": (
        "any ideas for a lite laptop that i need for flights",
        "looking for something light to work on while flying, suggestions?",
    ),
    "product-0022": (
        "my laptop is gone, I spilled coffee on it. what new one please",
        "drowned my old notebook in a cup of coffee, what should replace it",
    ),
    "product-0032": (
        "I know nothing at all about computers. Which one do I ask for in the store?",
        "Total beginner here, no clue about technology. What do I tell the shop assistant I want?",
    ),
    "product-0052": (
        "My faithful machine won't take updates after ten years. I want the next one to last as long. Any suggestions?",
        "The old computer no longer gets updates, it is a decade old. Recommend one that will live equally long.",
    ),
    "product-0079": (
        "Please replace my 2015 MacBook Pro, but not with another Apple.",
        "I own an eleven year old Mac and do not want to stay with Apple. What instead?",
    ),
    "product-0113": ("what computer 4 a small biz", "Which machine is right for a little company?"),
    "product-0133": (
        "I forget my passwords all the time, so a laptop with a fingerprint thing would be nice. Which one?",
        "Can't remember logins, want to sign in with my finger. What notebook do I buy?",
    ),
    "product-0157": (
        "I only want a computer and I've got store credit to use before Sunday. What, quick?",
        "My voucher for the shop runs out on the weekend, tell me fast which PC to spend it on.",
    ),
    "medical-0004": (
        "How is it called by doctors when the nose gives blood?",
        "Medical word for blood running out of somebody's nose?",
    ),
    "medical-0023": (
        "still have 3 meetings and my forehead is pounding",
        "hammering pain above my eyes but more calls to sit through today",
    ),
    "medical-0043": (
        "In a medical report, what do you call hiccups?",
        "What is the clinical name that physicians write down for hiccuping?",
    ),
    "medical-0062": (
        "Every time I lie down after a big meal there is a burning behind my breastbone.",
        "When I go to bed with a full stomach my chest feels like it is on fire.",
    ),
    "medical-0081": (
        "no idea why but both my ears are ringing",
        "constant high tone left and right, where does it come from",
    ),
    "medical-0102": (
        "I have hardly any spit and my tongue sticks to the roof of my mouth.",
        "There is almost no saliva, everything glues together in there.",
    ),
    "medical-0122": (
        "I can't stop scratching my legs though no rash can be seen.",
        "My shins itch like mad but the skin looks perfectly normal.",
    ),
    "medical-0163": (
        "What is low back pain's medical name?",
        "How is an aching lower spine called in doctors' language?",
    ),
    "medical-0182": (
        "My girlfriend turns away because of the smell from my mouth when I talk to her.",
        "My partner avoids my face whenever I speak as my breath reeks.",
    ),
    "medical-0204": (
        "I'm only twenty-six and my hairline is moving backwards.",
        "Still in my twenties and the front is already going bald.",
    ),
    "medical-0222": (
        "My palms sweat so much when I write that the paper curls.",
        "My hands are so wet that every sheet I put notes on gets wavy.",
    ),
    "medical-0250": (
        "Kindly name the condition in which nausea is caused by travel by ship.",
        "What do you call it when people feel sick on boats?",
    ),
    "legal-0021": ("at midnight a debt collector calls me", "they phone in the middle of the night about money I owe"),
    "legal-0043": (
        "all i do is stack shelves but boss says salaried people dont get overtime",
        "i fill supermarket shelves 55 hours and hear that a fixed salary means no extra pay",
    ),
    "legal-0065": (
        "when baby comes how many weeks of unpaid leave do i get",
        "how long may i stay home without pay after giving birth",
    ),
    "legal-0087": (
        "boss wants someone younger so i was passed over for promotion",
        "my supervisor gave the better position to a kid since i am too old in his eyes",
    ),
    "legal-0101": ("all day robot calls", "automated voices ring my cell from morning till evening"),
    "legal-0123": (
        "They say the warranty is void because I used ink of another brand. Can a manufacturer do this?",
        "Printer maker refuses the repair as I bought third party cartridges. Is that allowed?",
    ),
    "legal-0141": ("my bank account, money stolen from it", "somebody emptied my checking balance without permission"),
    "legal-0164": (
        "How many days ahead must a large employer announce the closing of a plant?",
        "What advance notice do workers get before a big factory shuts down?",
    ),
    "legal-0182": (
        "Can they fire me for handing out union cards in the parking lot?",
        "Am I risking my job by giving colleagues sign-up sheets for a labor organization outside the building?",
    ),
    "legal-0207": (
        "We are from India and an agent shows us houses in certain neighbourhoods only. I think that is the reason.",
        "The realtor steers us away from parts of the city, I believe due to our Indian origin.",
    ),
    "legal-0227": (
        "Which statute gives the right to return to civilian employment to members of the military?",
        "What law protects soldiers who want their old job back after service?",
    ),
    "legal-0244": (
        "They told me at the job interview to come back Thursday for a lie detector. Is it normal in America?",
        "A company wants to hook me up to a polygraph before hiring. Is that usual in the US?",
    ),
}
BEFORE = ("Honestly, I am fed up. ", "Please, I have one question for you. ", "ok need help here ", "In one line: ")
AFTER = (". Cheers.", " Greetings to all of you.", " thx", " My whole family is waiting to hear.")


def swapped(text: str, draw: random.Random) -> str:
    """The text with one pair of neighbouring letters in twenty swapped."""
    letters = list(text.lower())
    for _ in range(max(1, len(letters) // 20)):
        i = draw.randrange(len(letters) - 1)
        letters[i], letters[i + 1] = letters[i + 1], letters[i]
    return "".join(letters)


def planted(seeds: dict[str, Seed], draw: random.Random) -> dict[str, dict[str, str]]:
    """Kind of planting -> seed id -> the text that is planted."""
    own = {i: pair for i, pair in PLANTED.items() if i in seeds and len(seeds[i].instruction.split()) >= FEW}

    def around(text: str) -> str:
        return draw.choice(BEFORE) + text + draw.choice(AFTER)

    return {
        "letters swapped": {i: swapped(seeds[i].instruction, draw) for i in own},
        "words around": {i: around(seeds[i].instruction) for i in own},
        "reworded": {i: light for i, (light, _) in own.items()},
        "reworded, words around": {i: around(light) for i, (light, _) in own.items()},
        "in other words": {i: heavy for i, (_, heavy) in own.items()},
    }


def with_rows(expert: Expert, texts: dict[str, str]) -> Expert:
    """The expert with these texts among its training rows, as if of another seed of the same answer."""
    answers = {seed.id: seed.answer for seed in expert.seeds}
    rows = [
        {"row_id": f"planted-{i}", "seed_id": "planted", "answer": answers[i], "instruction": text, "output": ""}
        for i, text in texts.items()
    ]
    return replace(expert, rows={**expert.rows, "train": expert.rows["train"] + rows})


def compared(expert: Expert) -> list[Seed]:
    """The held-out seeds that are compared at all: those of some words."""
    held = {row["seed_id"] for row in expert.rows["holdout"]}
    return [seed for seed in expert.seeds if seed.id in held and len(seed.instruction.split()) >= FEW]


def by_method(expert: Expert, method: Method) -> set[str]:
    return {leak.other for leak in _held_out("x", expert, method)}


def by_rapidfuzz(expert: Expert, scorer: object, threshold: float) -> set[str]:
    """Held-out seeds with a training row of the same answer at this likeness."""
    seeds = compared(expert)
    rows = expert.rows["train"]
    likeness = process.cdist(
        [s.instruction for s in seeds], [r["instruction"] for r in rows], scorer=scorer, processor=default_process
    )
    likeness[np.array([[r["answer"] != s.answer for r in rows] for s in seeds])] = 0
    return {s.id for s, row in zip(seeds, likeness, strict=True) if row.max() >= threshold}


def main() -> None:
    home = find_home()
    experts = {name: _expert(home, name) for name in read_params(home).experts}
    words = Method("words", word_vectors, 0.55)
    ways = {
        "words, hashed TF-IDF": lambda e: by_method(e, words),
        "rapidfuzz token_sort_ratio >= 70": lambda e: by_rapidfuzz(e, fuzz.token_sort_ratio, 70),
        "rapidfuzz token_set_ratio >= 85": lambda e: by_rapidfuzz(e, fuzz.token_set_ratio, 85),
    }
    if len(sys.argv) > 1:
        meaning = Method("meaning", meaning_vectors(Path(sys.argv[1])), 0.82)
        ways["meaning, all-MiniLM-L6-v2"] = lambda e: by_method(e, meaning)
        ways["words or meaning"] = lambda e: by_method(e, words) | by_method(e, meaning)
    table = Table("compared by", "honest seeds flagged")
    kinds = list(planted({s.id: s for s in experts["legal"].seeds}, random.Random(1)))
    for kind in kinds:
        table.add_column(kind)
    for name, way in ways.items():
        clean = {expert: way(data) for expert, data in experts.items()}
        held = sum(len(compared(data)) for data in experts.values())
        cells = [f"{sum(map(len, clean.values()))} of {held}"]
        for kind in kinds:
            found = total = 0
            for data in experts.values():
                texts = planted({s.id: s for s in data.seeds}, random.Random(1))[kind]
                found += len(way(with_rows(data, texts)) & set(texts))
                total += len(texts)
            cells.append(f"{found} of {total}")
        table.add_row(name, *cells)
    Console(width=150).print(table)
    rows = [row["instruction"] for data in experts.values() for row in data.rows["train"]]
    many = [
        f"{word} {i} {row}"
        for i, row in enumerate(rows)
        for word in ["well", "so", "now", "hi", "ok", "look", "say", "hm", "er", "oh", "ah"]
    ]
    start = time.process_time()
    nearest(many[:10000], many, word_vectors)
    print(f"10,000 questions against {len(many):,} rows, by words: {time.process_time() - start:.0f} s of CPU")  # noqa: T201


if __name__ == "__main__":
    main()
