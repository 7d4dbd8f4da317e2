"""Does the pocket base tell questions apart? Linear classifiers on it, on MiniLM and on plain words.

Run: python benchmarks/pocket_conditioning.py [FOLDER OF all-MiniLM-L6-v2]   (make pocket puts it into build/minilm)
"""

import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from factory.paths import find_home, read_params, read_profile
from factory.seeds import held_out, read_seeds
from factory.template import read_template
from train.base import load_base, load_tokenizer
from train.pocket import HEADER, Recipe, encoder_vectors


def base_vectors(texts: list[str]) -> np.ndarray:
    """The base's hidden state at the end of the question, float32 [texts, hidden]."""
    import torch

    home = find_home()
    profile = read_profile(home, "pocket")
    tokenizer, model = load_tokenizer(home, profile), load_base(home, profile).eval()
    found = []
    with torch.inference_mode():
        for text in texts:
            ids = torch.tensor([tokenizer.encode(f"<|im_start|>user\n{text}{HEADER}")])
            found.append(model.model(input_ids=ids, output_hidden_states=True).hidden_states[Recipe.encode_at][0, -1])
    return torch.stack(found).float().numpy()


def accuracy(features: np.ndarray, answers: list[str], outside: list[bool]) -> float:
    """Share of the held-out seeds whose answer a linear classifier on the others' features finds."""
    inside, labels = ~np.array(outside), np.array(answers)
    mean, spread = features[inside].mean(0), features[inside].std(0) + 1e-6
    scaled = (features - mean) / spread
    model = LogisticRegression(C=0.1, max_iter=2000).fit(scaled[inside], labels[inside])
    return float(model.score(scaled[~inside], labels[~inside]))


def words_accuracy(texts: list[str], answers: list[str], outside: list[bool]) -> float:
    """The same from words and word pairs alone."""
    train = [i for i, out in enumerate(outside) if not out]
    test = [i for i, out in enumerate(outside) if out]
    table = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    model = LogisticRegression(C=20, max_iter=2000)
    model.fit(table.fit_transform([texts[i] for i in train]), [answers[i] for i in train])
    return float(model.score(table.transform([texts[i] for i in test]), [answers[i] for i in test]))


def main() -> None:
    home = find_home()
    table = Table("expert", "answers", "held-out seeds", "words alone", "pocket base", "all-MiniLM-L6-v2")
    for expert in read_params(home).experts:
        seeds = read_seeds(home.seeds(expert), read_template(home.template(expert)))
        outside = [seed.id in held_out(seeds) for seed in seeds]
        texts, answers = [seed.instruction for seed in seeds], [seed.answer for seed in seeds]
        if len(set(answers)) == 1:
            continue
        own = accuracy(base_vectors(texts), answers, outside)
        peer = accuracy(encoder_vectors(texts, Path(sys.argv[1])), answers, outside) if len(sys.argv) > 1 else None
        lexical = words_accuracy(texts, answers, outside)
        cells = [
            str(len(set(answers))),
            str(sum(outside)),
            f"{lexical:.3f}",
            f"{own:.3f}",
            f"{peer:.3f}" if peer else "-",
        ]
        table.add_row(expert, *cells)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
