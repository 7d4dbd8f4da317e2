"""Lengths in the base model's own tokens, by its tokenizer alone: no torch, no transformers."""

from collections.abc import Callable
from functools import lru_cache

from factory.errors import Problem, Problems
from factory.paths import Home, Profile


def counter(home: Home, profile: Profile) -> Callable[[str], int]:
    """A function from a text to its number of tokens.

    Raises:
        Problems: the base's tokenizer is neither in its folder nor to be had from the hub.
    """
    from tokenizers import Tokenizer

    folder = profile.model_path(home)
    try:
        if folder:
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        else:
            tokenizer = Tokenizer.from_pretrained(profile.model, revision=profile.revision or "main")
    except Exception as error:  # the library raises bare Exception for a missing file and for a missing network
        text = f"no tokenizer for {profile.model!r} ({error})\n  then {profile.to_fetch(home)}"
        raise Problems([Problem(f"profiles/{profile.name}.yaml", 0, "base.model", text)]) from None

    @lru_cache(4096)  # the checks ask twice
    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    return count
