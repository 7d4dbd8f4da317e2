"""What GGUF carries is carried exactly; what it cannot carry is refused by name."""

import json
import shutil
import warnings

import numpy as np
import pytest

from factory.errors import UserError
from factory.llama import running
from train.export import NOT_CARRIED, export_adapter, refuse_adapter
from train.tensors import read, stored

PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "init_lora_weights": True}
PROMPT = [{"role": "user", "content": "My head hurts, what is it?"}]


@pytest.fixture(scope="module")
def peft_model(tiny_base, tiny_adapters):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    with warnings.catch_warnings():  # as in conftest
        warnings.simplefilter("ignore", FutureWarning)
        return PeftModel.from_pretrained(model, tiny_adapters[0]).eval()


@pytest.fixture(scope="module")
def llama(tiny_gguf, tiny_ggufs, tmp_path_factory):
    with running(tiny_gguf, tiny_ggufs[:1], threads=1, log=tmp_path_factory.mktemp("log") / "llama.log") as server:
        yield server


@pytest.fixture(scope="module")
def prompt(tiny_base):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    return tokenizer.apply_chat_template(PROMPT, add_generation_prompt=True, return_dict=False)


def greedy(model, ids, count=20):
    """Greedy tokens and the float64 log-probabilities [count, vocabulary] they were taken from."""
    import torch

    ids, rows = list(ids), []
    with torch.no_grad():
        for _ in range(count):
            rows.append(torch.log_softmax(model(torch.tensor([ids])).logits[0, -1].double(), -1).numpy())
            ids.append(int(rows[-1].argmax()))
    return ids[-count:], np.array(rows)


def served(llama, ids, scale, count=20):
    options = {"n_predict": count, "n_probs": 10, "temperature": 0, "ignore_eos": True}
    steps = llama.complete(ids, [scale], **options)["completion_probabilities"]
    return [step["id"] for step in steps], [[(t["id"], t["logprob"]) for t in step["top_logprobs"]] for step in steps]


def farthest(steps, rows):
    """The largest difference in log-probability over the served top tokens."""
    return max(abs(logprob - row[token]) for step, row in zip(steps, rows, strict=False) for token, logprob in step)


def test_peft_and_llama_cpp_agree_on_the_expert_and_on_the_base(peft_model, llama, prompt):
    for scale in (1.0, 0.0):
        if scale:
            tokens, rows = greedy(peft_model, prompt)
        else:
            with peft_model.disable_adapter():
                tokens, rows = greedy(peft_model, prompt)
        seen, steps = served(llama, prompt, scale)
        assert seen == tokens
        assert farthest(steps, rows) < 0.1


def test_half_the_alpha_would_be_noticed(peft_model, llama, prompt):
    _, rows = greedy(peft_model, prompt, 1)
    _, steps = served(llama, prompt, 0.5, 1)
    assert farthest(steps, rows) > 0.3


def test_an_adapter_at_scale_zero_leaves_the_base_as_it_is(llama, prompt, tiny_gguf, tmp_path):
    with running(tiny_gguf, threads=1, log=tmp_path / "llama.log") as bare:
        alone = bare.complete(prompt, n_predict=20, n_probs=10, temperature=0)["completion_probabilities"]
    beside = llama.complete(prompt, [0.0], n_predict=20, n_probs=10, temperature=0)["completion_probabilities"]
    assert alone == beside


def test_llama_cpp_reads_text_as_the_bases_tokenizer_does(llama, tiny_base):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    for text in (
        "<|im_start|>user\nit's 42, OK?\n\n  Yes.<|im_end|>\n<think>\n\n</think>\n\nI",
        "Café  naïve 123\tx",
        "don't",
    ):
        assert llama.tokenize(text) == tokenizer(text).input_ids


def test_tensors_and_metadata_arrive_unchanged(tiny_adapters, tiny_ggufs):
    import gguf

    reader = gguf.GGUFReader(tiny_ggufs[0])
    assert reader.fields["adapter.lora.task_name"].contents() == "red"
    assert reader.fields["adapter.lora.alpha"].contents() == 8.0
    source = {t.name: read(t) for t in stored(tiny_adapters[0] / "adapter_model.safetensors")}
    assert len(reader.tensors) == len(source) == 2 * 7 * 2
    carried = {t.name: t.data for t in reader.tensors}
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_{}.weight"
    for side in "AB":
        assert np.array_equal(carried[f"blk.1.ffn_down.weight.lora_{side.lower()}"], source[name.format(side)])


def test_equal_adapters_give_equal_bytes(tiny_base, tiny_adapters, tiny_ggufs, tmp_path):
    config = json.loads((tiny_base / "config.json").read_text())
    export_adapter(tiny_adapters[0], config, tmp_path / "again.gguf", {"adapter.lora.task_name": "red"})
    assert (tmp_path / "again.gguf").read_bytes() == tiny_ggufs[0].read_bytes()


@pytest.mark.parametrize("key", NOT_CARRIED)
def test_what_gguf_cannot_carry_is_refused_by_name_with_the_cure(key):
    with pytest.raises(UserError, match=f"^here: {key}: .*cannot be carried by GGUF; .*"):
        refuse_adapter({**PLAIN, key: {"x": 1}}, "here")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"bias": "all"}, "bias: 'all' cannot"),
        ({"lora_alpha": 0}, "lora_alpha: 0 is read"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: 'pissa' changes the base"),
        ({"peft_type": "IA3"}, "peft_type: 'IA3' is not LoRA"),
        ({"r": None}, "r: None is no rank"),
    ],
)
def test_what_would_be_read_wrongly_is_refused(change, told):
    refuse_adapter(PLAIN, "here")
    with pytest.raises(UserError, match=told):
        refuse_adapter({**PLAIN, **change}, "here")


def edited(source, folder, **tensor_changes):
    """A copy of an adapter folder with tensors put in or, where None, taken out."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(source, folder)
    found = {**load_file(folder / "adapter_model.safetensors"), **tensor_changes}
    save_file({k: v for k, v in found.items() if v is not None}, folder / "adapter_model.safetensors")
    return folder


LAYER = "base_model.model.model.layers.0."


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        (LAYER + "mlp.up_proj.lora_A.weight", np.full((4, 64), np.nan, np.float32), "holds NaN or infinity"),
        (LAYER + "mlp.up_proj.lora_A.weight", None, "not in pairs"),
        (LAYER + "mlp.up_proj.lora_A.weight", np.ones((8, 64), np.float32), "not rank 4"),
        (LAYER + "input_layernorm.lora_A.weight", np.ones((4, 64), np.float32), "cannot carry an adapter"),
        ("base_model.model.lm_head.lora_A.weight", np.ones((4, 64), np.float32), "lm_head is tied to the embeddings"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", np.ones((4, 64), np.float32), "no LoRA matrix"),
    ],
)
def test_a_wrong_tensor_is_named_and_nothing_is_written(tiny_base, tiny_adapters, tmp_path, name, value, told):
    adapter = edited(tiny_adapters[0], tmp_path / "adapter", **{name: value})
    config = json.loads((tiny_base / "config.json").read_text())
    with pytest.raises(UserError, match=told):
        export_adapter(adapter, config, tmp_path / "out.gguf", {})
    assert not (tmp_path / "out.gguf").exists()
