"""The pocket base's training: what a killed run keeps, and what the committed base holds."""

import pytest
import torch
from torch import nn

from factory.errors import UserError
from train.pocket import HEADER, Recipe, Run, lower_layers, optimizers, pocket, question_losses, rate

SMALL = Recipe(vocabulary=100, hidden=32, layers=2, intermediate=64, heads=2, kv_heads=1, encode_at=1, steps=6)


def _run(tmp_path, corpus="a"):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, intermediate_size=64, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return Run(Qwen3ForCausalLM(config), nn.Linear(32, 384), SMALL, corpus, tmp_path / "state.pt")


def _batch(number):
    made = torch.Generator().manual_seed(number)
    ids = torch.randint(0, 100, (4, 24), generator=made)
    labels = ids.clone()
    labels[:, :12] = -100
    targets = torch.randn(4, 384, generator=made)
    return {"ids": ids, "labels": labels, "heads": torch.full((4,), 2), "targets": targets}


def _steps(run, first, last):
    return [run.step(i, run.model.model, _batch(i)) for i in range(first, last)]


def test_a_killed_run_goes_on_exactly_where_it_was(tmp_path):
    unbroken = _run(tmp_path)
    losses = _steps(unbroken, 0, 6)
    killed = _run(tmp_path)
    _steps(killed, 0, 3)
    killed.save(3)
    resumed = _run(tmp_path)
    assert resumed.restore() == 3
    assert _steps(resumed, 3, 6) == losses[3:]
    pairs = zip(unbroken.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_state_of_another_corpus_is_not_taken_up(tmp_path):
    _run(tmp_path, corpus="a").save(3)
    assert _run(tmp_path, corpus="b").restore() == 0


def test_the_rate_warms_up_stays_and_falls_to_nothing():
    recipe = Recipe()
    assert rate(0, recipe) < 0.02 and rate(recipe.steps // 2, recipe) == 1.0
    assert 0.49 < rate(recipe.steps * 3 // 4, recipe) < 0.51 and rate(recipe.steps - 1, recipe) < 0.001


def test_the_lower_layers_are_the_model_s_own(tmp_path):
    run = _run(tmp_path)
    lower, ids = lower_layers(run.model, SMALL), _batch(0)["ids"]
    whole = run.model.model(input_ids=ids, output_hidden_states=True).hidden_states[SMALL.encode_at]
    assert torch.equal(lower(input_ids=ids).last_hidden_state, whole)
    assert lower.layers[0] is run.model.model.layers[0] and len(lower.layers) == SMALL.encode_at


def test_questions_alone_teach_the_lower_layers_to_tell_them_apart(tmp_path):
    run, batch = _run(tmp_path), _batch(0)
    del batch["labels"]
    lower = lower_layers(run.model, SMALL)
    before = question_losses(lower, run.head, batch, SMALL)[0].item()
    upper = run.model.model.layers[1].mlp.up_proj.weight.clone()
    for step in range(4):
        run.step(step, lower, batch)
    assert question_losses(lower, run.head, batch, SMALL)[0].item() < 0.9 * before
    assert torch.equal(upper, run.model.model.layers[1].mlp.up_proj.weight)


def test_muon_takes_the_matrices_and_adamw_all_else(tmp_path):
    run = _run(tmp_path)
    muon, adam = optimizers(run.model, run.head, SMALL)
    assert sum(len(g["params"]) for g in muon.param_groups) == 2 * 7
    assert any(p is run.model.model.embed_tokens.weight for g in adam.param_groups for p in g["params"])


def test_without_its_encoder_the_command_says_what_to_run(home, tmp_path):
    with pytest.raises(UserError, match="holds no model.safetensors\n  then run: make pocket"):
        pocket(home, tmp_path, None)


def test_the_committed_base_answers_in_its_own_chat_form(home):
    """The header at which the question's meaning is learnt is what the chat template writes, token for token."""
    from factory.paths import read_profile
    from train.base import load_tokenizer

    tokenizer = load_tokenizer(home, read_profile(home, "pocket"))
    messages = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    assert text == "<|im_start|>user\nhi" + HEADER and len(tokenizer.encode(HEADER)) == 9


def test_the_committed_base_is_small_enough_for_git(home):
    files = [p for p in (home.root / "models" / "pocket").rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 16e6
