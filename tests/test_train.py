"""The trainer: its loss is the plain loop's, its labels are the reply's, a kill costs at most an epoch."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from factory.build import build
from factory.errors import UserError
from factory.generate import generate
from factory.paths import read_params, read_profile
from factory.schema import ROWS, read_rows, write_rows
from factory.template import read_template
from train import sft
from train.base import load_tokenizer
from train.rows import IGNORED, encode, passes, stops_of

pytestmark = pytest.mark.filterwarnings("default")  # TRL, PEFT and transformers warn of one another


@pytest.fixture
def small(checkout, tiny_base):
    """A checkout on the tiny base with the rows of twenty seeds of one expert."""
    shutil.copytree(tiny_base, checkout.root / "models" / "pocket", dirs_exist_ok=True)
    seeds = checkout.seeds("product")
    seeds.write_text("".join(seeds.read_text().splitlines(keepends=True)[:20]))
    generate(checkout, "product", read_params(checkout), read_profile(checkout, "pocket"))
    build(checkout, "product", read_profile(checkout, "pocket"))
    return checkout


def recipe(small, **keys):
    """The pocket profile with other keys of `train`, as a reviewer writes them."""
    path = small.profile("pocket")
    lines = path.read_text().splitlines()
    for key, value in keys.items():
        (at,) = (i for i, line in enumerate(lines) if line.startswith(f"  {key}:"))
        lines[at] = f"  {key}: {json.dumps(value)}"
    path.write_text("\n".join(lines) + "\n")
    return read_profile(small, "pocket")


def rows_of(small, name="train"):
    return read_rows(small.dataset("product", f"{name}.parquet"), ROWS, "")


def adapter_of(small):
    return (small.expert("product", "adapter") / "adapter_model.safetensors").read_bytes()


# -- the loss -------------------------------------------------------------------------------------


def plain_loop(small, profile, order):
    """Losses per step of a loop without TRL, packing or padding: each row alone, full logits, plain AdamW."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup, set_seed

    set_seed(sft.SEED)
    model = AutoModelForCausalLM.from_pretrained(profile.model_path(small), dtype=torch.float32)
    wanted = read_template(small.template("product")).declaration.train
    model = get_peft_model(
        model,
        LoraConfig(r=wanted.rank, lora_alpha=wanted.alpha, target_modules="all-linear", task_type="CAUSAL_LM"),
    ).train()
    learnt = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learnt, lr=profile.train.learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(profile.train.warmup * len(order)), len(order))
    losses = []
    for step in order:
        count = sum(label != IGNORED for row in step for label in row["labels"])
        total = 0.0
        for row in step:
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
            labels = torch.tensor(row["labels"])[1:]
            loss = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum") / count
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(learnt, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


@pytest.mark.parametrize("tokens_per_pass", [100_000, 300])
def test_the_loss_of_every_step_is_that_of_a_plain_loop(small, monkeypatch, tmp_path, tokens_per_pass):
    """Packed, cut into passes or not: within 1e-5 of each row alone."""
    monkeypatch.setattr(sft, "LOG_EVERY", 1)
    profile = recipe(small, dropout=0.0, tokens_per_pass=tokens_per_pass, learning_rate=0.01)
    base = sft.load(small, profile)
    template = read_template(small.template("product"))
    trainer = sft.fit(base, template, profile, rows_of(small), sft.Run("tiny", tmp_path))
    cut, size = trainer.args.gradient_accumulation_steps, profile.train.examples_per_step
    assert (cut > 1) == (tokens_per_pass == 300) and cut * trainer.args.per_device_train_batch_size == size
    found = [at["loss"] for at in trainer.state.log_history if "loss" in at]
    rows = encode(base.tokenizer, rows_of(small), stops_of(base.model, base.tokenizer), 2048)
    order = orders(trainer, rows, size, epochs=template.declaration.train.epochs)
    wanted = plain_loop(small, profile, order)
    assert len(found) == len(wanted) > 10
    assert max(abs(a - b) for a, b in zip(found, wanted, strict=True)) < 1e-5
    assert found[-1] < found[0] - 0.5  # it has learnt


def orders(trainer, rows, size, epochs):
    """The rows of every step, as the trainer's own sampler gives them."""
    by_ids = {tuple(row["input_ids"]): row for row in rows}
    steps = []
    loader = trainer.get_train_dataloader()
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        seen = []
        for batch in loader:
            cuts = batch["cu_seq_lens_q"].tolist()
            ids = batch["input_ids"][0].tolist()
            seen += [by_ids[tuple(ids[a:b])] for a, b in zip(cuts, cuts[1:], strict=False)]
        steps += [seen[i : i + size] for i in range(0, len(seen), size)]
    return steps


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_packed_rows_attend_to_themselves_alone(tiny_base, lengths, seed):
    """The logits of a packed row are those of the row alone, whatever lies beside it."""
    from transformers import AutoModelForCausalLM

    import train.packed  # noqa: F401

    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()
    torch.manual_seed(seed)
    rows = [torch.randint(0, 9000, (n,)) for n in lengths]
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    model.set_attn_implementation("rows")
    with torch.no_grad():
        packed = model(
            input_ids=torch.cat(rows)[None], position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
            cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=max(lengths), max_length_k=max(lengths),
        ).logits[0]  # fmt: skip
        model.set_attn_implementation("sdpa")
        alone = torch.cat([model(input_ids=row[None]).logits[0] for row in rows])
    assert torch.allclose(packed, alone, atol=1e-4)


def test_padded_batches_are_generated_from_as_with_sdpa(tiny_base):
    """The probe asks questions of different lengths at once, of a model whose attention is `rows`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import train.packed  # noqa: F401
    from train.probe import greedy

    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in ("Which laptop?", "And for my whole family?")]
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    model.set_attn_implementation("rows")
    found = greedy(model, tokenizer, rows, 12)
    model.set_attn_implementation("sdpa")
    assert found == greedy(model, tokenizer, rows, 12) == [greedy(model, tokenizer, [row], 12)[0] for row in rows]


def test_what_goes_on_behind_a_cache_sees_all_of_it(tiny_base):
    """As the audit reads many codes behind one prefix."""
    from transformers import AutoModelForCausalLM

    import train.packed  # noqa: F401

    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()
    ids = torch.arange(100, 112)[None]
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        model.set_attn_implementation("rows")
        cache = model(input_ids=ids[:, :7], use_cache=True).past_key_values
        behind = model(input_ids=ids[:, 7:], past_key_values=cache).logits
    assert torch.allclose(behind, whole[:, 7:], atol=1e-4)


def test_dropout_drops_its_share_scales_the_rest_and_rests_in_evaluation():
    from train.packed import Dropout

    torch.manual_seed(3)
    layer, x = Dropout(0.15), torch.ones(400, 501, requires_grad=True)
    out = layer(x)
    assert abs((out == 0).float().mean().item() - 0.15) < 0.003
    assert abs(out.mean().item() - 1) < 0.005 and out.max().item() == pytest.approx(1 / 0.85, rel=1e-4)
    assert abs((out == 0).float().mean(0).std().item() - (0.15 * 0.85 / 400) ** 0.5) < 0.002  # no column is favoured
    out.sum().backward()
    assert torch.equal(x.grad, out.detach())
    assert torch.equal(layer.eval()(x), x)


@given(
    lengths=st.lists(st.integers(1, 500), min_size=1, max_size=60), examples=st.integers(1, 32),
    tokens=st.integers(1, 5000),
)  # fmt: skip
def test_no_pass_exceeds_its_tokens_unless_it_is_one_example(lengths, examples, tokens):
    cut = passes(lengths, examples, tokens)
    each = examples // cut
    assert examples % cut == 0
    assert each == 1 or sum(sorted(lengths, reverse=True)[:each]) <= tokens
    fewer = [n for n in range(1, cut) if examples % n == 0]
    assert all(sum(sorted(lengths, reverse=True)[: examples // n]) > tokens for n in fewer)


# -- the labels -----------------------------------------------------------------------------------

CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
ASKED = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TEMPLATES = {
    "plain": CHAT + ASKED,
    "think block in the completion": CHAT.replace(
        "{{ m.content }}", "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}"
    )
    + ASKED,
}


@pytest.fixture
def tokenizer(small):
    return load_tokenizer(small, read_profile(small, "pocket"))


@pytest.mark.parametrize("name", TEMPLATES)
def test_whatever_the_chat_template_the_loss_falls_on_the_reply_and_its_end(small, tokenizer, name):
    tokenizer.chat_template = TEMPLATES[name]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for row, encoded in zip(rows_of(small), encode(tokenizer, rows_of(small), {end}, 2048), strict=True):
        learnt = [token for token in encoded["labels"] if token != IGNORED]
        assert end in learnt and len(encoded["labels"]) == len(encoded["input_ids"])
        said = tokenizer.decode(learnt)
        assert said.endswith(row["output"] + "<|im_end|>\n") and row["instruction"] not in said
        first = len(encoded["labels"]) - len(learnt)
        assert encoded["labels"][:first] == [IGNORED] * first and encoded["labels"][first:] == learnt


BROKEN = {
    "no template": (None, "has no chat template"),
    "a word behind the reply": (CHAT.replace("<|im_end|>", " over<|im_end|>") + ASKED, "the loss would fall on"),
    "a word before the reply": (
        CHAT.replace("{{ m.content }}", "{% if m.role == 'assistant' %}Well: {% endif %}{{ m.content }}") + ASKED,
        "the loss would fall on",
    ),
    "no end of turn": (CHAT.replace("<|im_end|>", "") + ASKED, "the loss would fall on"),
    "a prompt put otherwise alone": (
        CHAT + "{% if add_generation_prompt %}Assistant: {% endif %}",
        "is not where .*: it is put otherwise",
    ),
    "a thought that the prompt begins": (  # "\n" and "\n\n" are different tokens
        TEMPLATES["think block in the completion"].replace("assistant\n{% endif", "assistant\n<think>\n{% endif"),
        "one token reaches from the prompt into the reply",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_another_loss_is_refused_before_the_first_step(small, tokenizer, name):
    tokenizer.chat_template, why = BROKEN[name]
    with pytest.raises(UserError, match=f"(?s){why}"):
        encode(tokenizer, rows_of(small), {tokenizer.convert_tokens_to_ids("<|im_end|>")}, 2048)


def test_a_base_that_does_not_stop_where_its_template_ends_a_turn_is_refused(small, tokenizer):
    """As a checkpoint from pretraining with an instruct model's template: replies would never end."""
    with pytest.raises(
        UserError, match=r"name an instruct checkpoint: this base ends a reply at <\|endoftext\|> alone"
    ):
        encode(tokenizer, rows_of(small), {tokenizer.convert_tokens_to_ids("<|endoftext|>")}, 2048)


def test_a_row_longer_than_the_context_is_refused_never_cut(small, tokenizer):
    with pytest.raises(UserError, match=r"tokens, and the base takes 20; nothing is ever cut off"):
        encode(tokenizer, rows_of(small), {tokenizer.convert_tokens_to_ids("<|im_end|>")}, 20)


def test_tied_and_untied_bases_of_another_architecture_are_trained(small):
    """A Llama whose head is its own: the adapter goes on every linear layer but that."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = small.root / "models" / "pocket"
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=9000, hidden_size=32, num_hidden_layers=1, intermediate_size=64, num_attention_heads=2,
            num_key_value_heads=2, tie_word_embeddings=False, max_position_embeddings=512, bos_token_id=None,
            eos_token_id=None, pad_token_id=None,
        )
    ).save_pretrained(folder)  # fmt: skip
    sft.train(small, "product", recipe(small, probe=0))
    names = list(load_file(small.expert("product", "adapter") / "adapter_model.safetensors"))
    assert len(names) == 2 * 7 and not any("lm_head" in name for name in names)


# -- one base, several experts; kills ----------------------------------------------------------------


def test_a_base_in_memory_gives_the_same_adapter_as_one_loaded_anew(small):
    profile = read_profile(small, "pocket")
    sft.train(small, "product", profile)
    alone, base = adapter_of(small), sft.load(small, profile)
    before = {name: weight.clone() for name, weight in base.model.state_dict().items()}
    for _ in range(2):
        sft.train(small, "product", profile, base)
        assert adapter_of(small) == alone
    after = base.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


class Killed(BaseException):
    pass


def test_a_killed_training_goes_on_and_ends_in_the_same_adapter(small, monkeypatch):
    """Killed in the second epoch: the first is not done again, and not a bit is different."""
    from train.live import Bar

    profile = recipe(small, probe=4)  # with dropout: chance goes on where it was
    sft.train(small, "product", profile)
    whole, epochs = adapter_of(small), []
    shutil.rmtree(small.expert("product", "adapter"))

    def killed(self, args, state, control, **_):
        epochs.append(state.epoch)
        if kills and state.epoch >= 1:
            raise kills.pop()

    kills = [Killed()]
    monkeypatch.setattr(Bar, "on_epoch_begin", killed)
    with pytest.raises(Killed):
        sft.train(small, "product", profile)
    assert not small.expert("product", "adapter").exists()
    left = list((small.work / "training" / "product").glob("*/checkpoint-*"))
    assert len(left) == 1
    (left[0].parent / "checkpoint-9999").mkdir()  # a checkpoint that was cut off
    epochs.clear()
    said = sft.train(small, "product", profile)
    assert adapter_of(small) == whole and epochs == [1.0] and "2 epochs" in said
    assert len(small.expert("product", "plots/probe.csv").read_text().splitlines()) == 3  # the killed run's probe too
    assert not list((small.work / "training" / "product").glob("*/*"))


def test_other_rows_do_not_go_on_from_what_a_kill_left(small):
    profile = read_profile(small, "pocket")
    first, second = (sft._state(small, "product", inputs) for inputs in (["a"], ["b"]))
    (first / "checkpoint-3").mkdir(parents=True)
    assert sft._state(small, "product", ["b"]) == second != first and not first.exists()
    assert "steps" in sft.train(small, "product", profile)


# -- the probe --------------------------------------------------------------------------------------


def test_training_stops_once_the_claim_is_safely_kept(small, monkeypatch):
    """A model that answers all held-out questions right cannot be had from random weights: its replies are put here."""
    held_out = {row["instruction"]: row["output"] for row in rows_of(small, "holdout")}
    monkeypatch.setattr(
        "train.probe.greedy", lambda model, tokenizer, rows, most: [held_out[row["instruction"]] for row in rows]
    )
    said = sft.train(small, "product", recipe(small, enough=0.5))
    assert "after 1 epochs mention 1.00, right 1.00, form 1.00 of held-out questions; that is enough" in said
    said = sft.train(small, "product", recipe(small, enough=1.0))  # so few questions cannot show that
    assert "after 2 epochs" in said and "enough" not in said


def test_epochs_of_a_few_steps_are_probed_together_and_the_last_one_always(small):
    write_rows(small.dataset("product", "train.parquet"), ROWS, rows_of(small)[:32])  # four steps an epoch
    template = small.template("product")
    template.write_text(template.read_text().replace("epochs: 2", "epochs: 4"))
    sft.train(small, "product", recipe(small, probe=4))
    lines = small.expert("product", "plots/probe.csv").read_text().splitlines()[1:]
    assert [line.partition(",")[0] for line in lines] == ["3", "4"]


def test_a_gate_that_will_not_be_met_is_said(small):
    said = sft.train(small, "product", recipe(small, probe=12))
    assert "the gate will not be met: mention 0.00 (0.00 to 0." in said and "0.9 wanted" in said
    assert "right 0.00" in said.splitlines()[1] and "right" not in said.splitlines()[2]  # reported, not gated, here


# -- more processes, trackers -------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_train_what_one_does(small):
    """By gloo on this CPU; 32 rows, so that every step is whole."""
    write_rows(small.dataset("product", "train.parquet"), ROWS, rows_of(small)[:32])
    sft.train(small, "product", recipe(small, dropout=0.0, probe=4))
    weights = small.expert("product", "adapter") / "adapter_model.safetensors"
    alone = load_file(weights)
    shutil.rmtree(weights.parent)
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    done = subprocess.run(
        [sys.executable, *launch, "-m", "factory.cli", "train", "product"], cwd=small.root, capture_output=True,
        text=True, env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("8 of 8 steps") == 1 and "on 2 processes, each the whole base" in done.stdout
    found = load_file(weights)
    assert found.keys() == alone.keys()
    assert max((found[key] - alone[key]).abs().max().item() for key in alone) < 1e-3
    assert all(torch.count_nonzero(value) for value in found.values())


def test_three_processes_cannot_share_eight_examples(small):
    profile = read_profile(small, "pocket")
    with pytest.raises(UserError, match="3 processes cannot share the 8 examples of a step evenly"):
        sft._arguments(
            read_template(small.template("product")), profile, [{"input_ids": [1, 2]}], 3, sft.Run("x", small.work)
        )


def test_without_a_first_commit_dvclive_is_left_out_and_training_goes_on(tmp_path, monkeypatch, capsys):
    from train.live import to_dvclive

    monkeypatch.chdir(tmp_path)
    for words in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"]):
        subprocess.run(words, check=True)
    assert to_dvclive(tmp_path / "live") == [] and "Empty git repo" in capsys.readouterr().err


def test_figures_go_to_dvclive_and_to_the_trackers_asked_for(small, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(small.root / "runs"))
    sft.train(small, "product", recipe(small, probe=4), report_to=["tensorboard"])
    live = small.work / "live" / "product" / "plots" / "metrics"
    names = {str(path.relative_to(live).with_suffix("")) for path in live.rglob("*.tsv")}
    assert {"loss", "tokens_per_second", "mfu", "memory_gb", "probe_right_rate"} <= names
    assert list((small.root / "runs").rglob("events.out.tfevents.*"))


def test_a_tracker_that_is_not_there_is_said_before_anything_is_trained(small):
    with pytest.raises(UserError, match=r"--report-to wandd: unknown, or its package is not installed here"):
        sft.train(small, "product", read_profile(small, "pocket"), report_to=["wandd"])


def test_without_a_network_a_hub_base_says_what_to_download_and_where_it_belongs(small, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    profile = replace(read_profile(small, "pocket"), model="Qwen/Qwen3-14B", revision="abc123")
    with pytest.raises(UserError) as error:
        sft.train(small, "product", profile)
    assert "hf download Qwen/Qwen3-14B --revision abc123 --local-dir models/Qwen3-14B" in str(error.value)
    assert "write base.model: models/Qwen3-14B, base.revision: null" in str(error.value)


def test_a_key_of_the_recipe_that_is_wrong_is_one_line_with_its_place(small):
    path = small.profile("pocket")
    path.write_text(path.read_text().replace("learning_rate: 0.004", "learning_rat: 0.004"))
    with pytest.raises(UserError) as error:
        read_profile(small, "pocket")
    assert "train.learning_rate: is missing" in str(error.value)
    assert "pocket.yaml:14: train.learning_rat: unknown key" in str(error.value)


def test_an_attention_that_cannot_be_used_is_refused(small):
    with pytest.raises(
        UserError, match=r"train.attention: 'flash_attention_2' cannot be used .*\n  then install it, or"
    ):
        sft.load(small, recipe(small, attention="flash_attention_2"))
