"""The embedded teacher: no server, no GPU, the same replies every time.

It recombines the seed's own wording, what people of each voice put around a question, and the
template's own phrases. It cannot write anything new, and says so by its name.
"""

import random
import re
from collections.abc import Callable

from factory.errors import UserError
from factory.seeds import Seed
from factory.teacher import Reply, Request, Variant
from factory.teacher.cache import key_of
from factory.template import Template

BEFORE = {
    "terse": [
        "Short question:",
        "Briefly:",
        "In one line:",
        "Quick answer wanted:",
        "No essays:",
        "Just curious:",
        "One thing:",
    ],
    "chatty": [
        "Hello there, I hope somebody has a minute for this.",
        "So here is my little story.",
        "I was telling my neighbour about it.",
        "Hi all, long-time reader, first question ever.",
        "Good morning! Coffee in hand, and this on my mind.",
        "My sister told me to ask here, so here goes.",
        "Bear with me, I will try to keep it short.",
        "Okay, picture this.",
    ],
    "non-native": [
        "Excuse my English, I am still learning.",
        "Hello, I come from other country.",
        "Please, I have one question for you.",
        "Sorry, maybe I do not write so good.",
        "Dear friends, help is needed.",
        "I not know the right words, so I say it simple.",
    ],
    "annoyed": [
        "I have asked this three times already.",
        "Nobody ever gives me a straight reply.",
        "Honestly, I am fed up.",
        "Can somebody finally tell me.",
        "Why is this so hard to find out?",
        "I have wasted a whole evening on this.",
    ],
    "on a phone": [
        "hey",
        "hiya quick one",
        "omg ok so",
        "yo",
        "soz to bother",
        "ok need help here",
        "typing this on the bus",
    ],
}
AFTER = {
    "terse": ["Answer in a sentence.", "Need it now.", "Keep it brief.", "Facts only.", "That is all.", "Cheers."],
    "chatty": [
        "Thanks so much in advance, you are all lovely!",
        "Anyway, that is where I am today.",
        "My whole family is waiting to hear.",
        "I would be really grateful for a word from you.",
        "Sorry for rambling on like this.",
        "Have a nice weekend, everyone.",
    ],
    "non-native": [
        "Please to explain me.",
        "I thank you very much for the help.",
        "What you think about it?",
        "I wait for your kind answer.",
        "Is it clear what I mean?",
        "Greetings to all of you.",
    ],
    "annoyed": [
        "And no lectures this time.",
        "Is that too much to ask?",
        "I want one clear reply.",
        "Stop beating about the bush.",
        "Do not tell me to look it up.",
        "This is really getting on my nerves.",
    ],
    "on a phone": ["thx", "any1 know", "asap pls", "lmk", "tia guys", "cant type much rn", "hit me back pls"],
}
# for a voice that is not known here
ANY_BEFORE = [text for texts in BEFORE.values() for text in texts]
ANY_AFTER = [text for texts in AFTER.values() for text in texts]
SHORT = {
    "you": "u",
    "your": "ur",
    "please": "pls",
    "because": "bc",
    "with": "w",
    "right now": "rn",
    "and": "n",
    "are": "r",
    "for": "4",
    "thanks": "thx",
    "people": "ppl",
    "something": "smth",
    "really": "rly",
    "tomorrow": "tmrw",
}


class PhrasesTeacher:
    """Recombines what template and seeds already say."""

    name = "phrases"
    variants = 1
    spare = 2  # it costs nothing: some fall in build, the rest is surplus
    budget = 1

    def __init__(self, template: Template) -> None:
        self.template = template
        if unfilled := slots_without_phrases(template):
            where = f"templates/{template.expert}.yaml: output.slots.{unfilled[0]}"
            raise UserError(f"{where}: has no phrases, and the embedded teacher cannot write; add phrases")

    async def reply(self, request: Request) -> Reply:
        """One variant, the same each time. Number 0 is the seed in its own words."""
        seed, declared, number = request.seed, self.template.declaration, request.number
        voice = declared.generate.voices[(number - 1) % len(declared.generate.voices)]
        phrases = {name: self.template.phrases(name, seed.answer) for name in self.template.output.slots}
        key = key_of([declared.expert, seed.id, seed.instruction, seed.answer, seed.slots, voice, phrases, number])
        rng = random.Random(key)
        instruction = reword(seed, voice, rng) if number else seed.instruction
        slots = {name: rng.choice(choices) for name, choices in phrases.items()} | seed.slots
        return Reply([Variant(instruction, slots)], key, "", "stop")

    def status(self) -> str:
        """Nothing: it is done at once."""
        return ""


def slots_without_phrases(template: Template) -> list[str]:
    """The slots that only a teacher who can write could fill."""
    return [n for n in template.output.slots if not all(template.phrases(n, answer) for answer in template.answers)]


def reword(seed: Seed, voice: str, rng: random.Random) -> str:
    """The seed's question as somebody of `voice` would put it; its own words stay recognisable."""
    style = STYLES.get(voice, _plain)
    core = style(seed.instruction, rng)
    before, after = rng.choice(BEFORE.get(voice, ANY_BEFORE)), rng.choice(AFTER.get(voice, ANY_AFTER))
    place = rng.choice(("before", "after", "both"))
    parts = [before if place != "after" else "", core, after if place != "before" else ""]
    text = " ".join(part for part in parts if part)
    return text.lower() if voice == "on a phone" else text


ASKING = re.compile(r"(who|what|which|when|where|why|how|is|are|am|can|could|do|does|did|should|would|will)\b", re.I)


def _plain(text: str, rng: random.Random) -> str:
    return text if text[-1] in ".?!" else text + ("?" if ASKING.match(text) else ".")


def _terse(text: str, rng: random.Random) -> str:
    return _plain(re.sub(r"\b(please|could you|can you tell me|just|really|so|very) ", "", text, flags=re.I), rng)


def _non_native(text: str, rng: random.Random) -> str:
    return _plain(re.sub(r"\b(the|a|an) ", "", text, count=rng.randint(1, 3), flags=re.I), rng)


def _annoyed(text: str, rng: random.Random) -> str:
    return text.rstrip(".?! ") + rng.choice(("!", "?!", "!!", "."))


def _on_a_phone(text: str, rng: random.Random) -> str:
    words = re.sub(r"[.,;:!?'\u2019]", "", text.lower())
    for long, short in SHORT.items():
        if rng.random() < 0.7:
            words = re.sub(rf"\b{long}\b", short, words)
    return words


STYLES: dict[str, Callable[[str, random.Random], str]] = {
    "terse": _terse,
    "chatty": _plain,
    "non-native": _non_native,
    "annoyed": _annoyed,
    "on a phone": _on_a_phone,
}
