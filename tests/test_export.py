"""What GGUF carries is carried exactly; what it cannot carry is refused by name."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
import warnings
from pathlib import Path

import lora_shapes as shapes
import numpy as np
import pytest

from factory.errors import UserError
from factory.llama import running
from factory.paths import Profile
from train import export as module
from train.export import CARRIED, NOT_CARRIED, PLAIN_STARTS, export_adapter, refuse_adapter, template_hash
from train.tensors import read, stored

PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "init_lora_weights": True}
DIGESTS = json.loads(shapes.DIGESTS.read_text())["digests"]
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
        ({"lora_alpha": None}, "lora_alpha: None is no alpha"),
        ({"lora_alpha": float("inf")}, "lora_alpha: inf is no alpha"),
        ({"alpha_pattern": {"q_proj": "8"}}, "q_proj: '8' is no alpha"),
        ({"alpha_pattern": {"q_proj(": 8}}, r"alpha_pattern: 'q_proj\(' is no pattern"),
        ({"rank_pattern": {"q_proj": 0}}, "q_proj: 0 is no rank"),
        ({"init_lora_weights": "olora"}, "init_lora_weights: 'olora' changes the base"),
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


def exported(case, folder):
    """The GGUF of one of shapes.CASES."""
    base, rank, kind, outtype = case
    adapter = shapes.write_adapter(folder, shapes.BASES[base], rank, kind)
    export_adapter(adapter, shapes.BASES[base], folder / "adapter.gguf", {}, outtype)
    return folder / "adapter.gguf"


@pytest.mark.parametrize("case", shapes.CASES, ids=shapes.case_name)
def test_tensors_are_those_of_llama_cpps_own_converter_byte_for_byte(case, tmp_path):
    assert shapes.digest(exported(case, tmp_path)) == DIGESTS[shapes.case_name(case)]


@pytest.mark.skipif("DMOE_LLAMA_CPP" not in os.environ, reason="DMOE_LLAMA_CPP names no folder of llama.cpp")
def test_the_frozen_digests_are_what_llama_cpps_converter_writes_today(tmp_path):
    assert shapes.upstream_digests(Path(os.environ["DMOE_LLAMA_CPP"]), tmp_path) == DIGESTS


@pytest.mark.parametrize("base", ["llama", "llama-grouped", "mistral", "smollm2", "smollm3"])
def test_rows_of_q_and_k_in_the_bases_order_would_be_noticed(base, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PERMUTED", ())
    case = (base, 4, "F32", "f32")
    assert shapes.digest(exported(case, tmp_path)) != DIGESTS[shapes.case_name(case)]


@pytest.mark.parametrize("base", shapes.BASES)
def test_the_shapes_are_what_peft_trains(base, tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from transformers import AutoConfig, AutoModelForCausalLM

    shapes.write_adapter(tmp_path, shapes.BASES[base])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "base"))
    lora = LoraConfig(r=4, target_modules=list(shapes.layers(shapes.BASES[base])), task_type="CAUSAL_LM")
    with warnings.catch_warnings():  # as in conftest
        warnings.simplefilter("ignore", FutureWarning)
        found = get_peft_model_state_dict(get_peft_model(model, lora), save_embedding_layers=False)
    wanted = shapes.matrices(shapes.BASES[base])
    assert {name: tuple(t.shape) for name, t in found.items()} == {name: m.shape for name, m in wanted.items()}


def test_a_type_is_written_where_its_blocks_fit(tmp_path):
    from gguf import GGUFReader

    reader = GGUFReader(exported(("phi3", 4, "F32", "q8_0"), tmp_path))
    assert {t.name.rpartition(".")[2]: t.tensor_type.name for t in reader.tensors} == {
        "lora_a": "Q8_0",
        "lora_b": "F16",
    }
    assert reader.fields["general.quantization_version"].contents() == 2


FOLDED = {
    "rsLoRA": {"use_rslora": True},
    "alphas": {"alpha_pattern": {"layers.1.self_attn.q_proj": 3, "down_proj": 0, "model.layers.0.*": 16.5}},
    "ranks": {"rank_pattern": {"layers.0.mlp.*": 2, "o_proj": 16}},
    "all": {"use_rslora": True, "rank_pattern": {"layers.0.mlp.*": 2}, "alpha_pattern": {"layers.1.*": 5}},
}


def peft_adapter(folder, base, **options):
    """A PEFT model on the tiny base whose B is not zero, also saved to `folder`."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(5)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    with warnings.catch_warnings():  # PEFT warns that patterns and rsLoRA together are easily misread
        warnings.simplefilter("ignore")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), lora).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", FOLDED)
def test_every_layer_has_the_scale_that_it_was_trained_with(name, tiny_base, tmp_path):
    import gguf

    model = peft_adapter(tmp_path / "adapter", tiny_base, **FOLDED[name])
    config = json.loads((tiny_base / "config.json").read_text())
    export_adapter(tmp_path / "adapter", config, tmp_path / "out.gguf", {})
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    alpha = reader.fields["adapter.lora.alpha"].contents()
    carried = {tensor.name: tensor.data for tensor in reader.tensors}
    for place, part in (
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.down_proj", "ffn_down"),
    ):
        for layer in (0, 1):
            a, b = (carried[f"blk.{layer}.{part}.weight.lora_{side}"] for side in "ab")
            trained = model.get_submodule(f"base_model.model.model.layers.{layer}.{place}").get_delta_weight("default")
            assert np.allclose(alpha / b.shape[1] * b @ a, trained.detach().numpy(), rtol=1e-5, atol=1e-7)


def test_peft_and_llama_cpp_agree_on_an_adapter_that_was_folded(tiny_base, tiny_gguf, prompt, tmp_path):
    model = peft_adapter(tmp_path / "adapter", tiny_base, **FOLDED["all"])
    export_adapter(tmp_path / "adapter", json.loads((tiny_base / "config.json").read_text()), tmp_path / "a.gguf", {})
    with running(tiny_gguf, [tmp_path / "a.gguf"], threads=1, log=tmp_path / "llama.log") as server:
        tokens, rows = greedy(model, prompt, 1)
        seen, steps = served(server, prompt, 1.0, 1)
        assert seen == tokens
        assert farthest(steps, rows) < 0.1
        assert farthest(served(server, prompt, 0.5, 1)[1], rows) > 0.3


def test_a_factor_of_one_leaves_the_bytes(tmp_path):
    base = shapes.BASES["qwen2"]
    plain = shapes.write_adapter(tmp_path / "plain", base, kind="F16")
    named = shapes.write_adapter(
        tmp_path / "named", base, kind="F16", alpha_pattern={".*": 8}, rank_pattern={"q_proj": 4}
    )
    for adapter in (plain, named):
        export_adapter(adapter, base, adapter.with_suffix(".gguf"), {}, "f16")
    assert plain.with_suffix(".gguf").read_bytes() == named.with_suffix(".gguf").read_bytes()


def test_memory_holds_one_tensor_and_not_the_adapter(tmp_path):
    base = {**shapes.BASES["qwen2"], "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 12}
    adapter = shapes.write_adapter(tmp_path, base, rank=32, kind="BF16")
    size = (adapter / "adapter_model.safetensors").stat().st_size
    export_adapter(adapter, base, tmp_path / "a.gguf", {})  # what is imported stays out of the measure
    tracemalloc.start()
    export_adapter(adapter, base, tmp_path / "a.gguf", {})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < size / 5


@pytest.mark.parametrize("base", ["qwen3", "smollm2", "gemma3"])
def test_lm_head_is_carried_only_where_the_base_has_one_of_its_own(base, tmp_path):
    import gguf

    tied = shapes.BASES[base]
    untied = {**tied, "tie_word_embeddings": False}
    adapter = shapes.write_adapter(tmp_path, untied)
    export_adapter(adapter, untied, tmp_path / "untied.gguf", {})
    assert "output.weight.lora_a" in {tensor.name for tensor in gguf.GGUFReader(tmp_path / "untied.gguf").tensors}
    for config in (tied, {key: value for key, value in tied.items() if key != "tie_word_embeddings"}):
        with pytest.raises(UserError, match="lm_head is tied to the embeddings"):
            export_adapter(adapter, config, tmp_path / "tied.gguf", {})


@pytest.mark.parametrize("base", ["gemma", "gemma2"])
def test_lm_head_is_refused_where_llama_cpp_always_ties_it(base, tmp_path):
    untied = {**shapes.BASES[base], "tie_word_embeddings": False}
    with pytest.raises(UserError, match="lm_head cannot carry an adapter in llama.cpp"):
        export_adapter(shapes.write_adapter(tmp_path, untied), untied, tmp_path / "untied.gguf", {})


@pytest.mark.parametrize("change", [{"num_attention_heads": 8}, {"num_key_value_heads": None}, {"head_dim": 32}])
def test_rows_that_are_not_the_bases_heads_are_refused(change, tmp_path):
    base = shapes.BASES["llama-grouped"]
    with pytest.raises(
        UserError, match=r"proj.lora_B.weight has \d+ rows, where the base's config.json has \d heads of"
    ):
        export_adapter(shapes.write_adapter(tmp_path, base), {**base, **change}, tmp_path / "a.gguf", {})


def test_the_stage_needs_no_torch_and_says_what_was_trained_on_what(checkout):
    import gguf

    root = checkout.root
    shapes.write_adapter(root / "experts" / "product", shapes.BASES["mistral"])
    checkout.dataset("product", "train.parquet").parent.mkdir(parents=True)
    checkout.dataset("product", "train.parquet").write_bytes(b"rows")
    code = (
        "import sys; from factory.paths import Profile, find_home; from train.export import export\n"
        "profile = Profile('pocket', 'experts/product/base', None, None, None, False, '', {}, [])\n"
        "export(find_home(), 'product', profile)\n"
        "print([name for name in ('torch', 'transformers', 'peft') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")
    fields = gguf.GGUFReader(checkout.expert("product", "adapter.gguf")).fields
    assert {key: fields[key].contents() for key in fields if key.startswith(("dmoe", "adapter", "general"))} == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "general.name": "product",
        "adapter.type": "lora",
        "adapter.lora.alpha": 8.0,
        "adapter.lora.task_name": "product",
        "dmoe.base_model": "experts/product/base",
        "dmoe.dataset_sha256": hashlib.sha256(b"rows").hexdigest(),
        "dmoe.template_sha256": template_hash(checkout.template("product")),
    }


def test_a_base_that_is_nowhere_is_told(checkout, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"profiles/far.yaml: base.model: the config.json of 'far/away' cannot be had"):
        module.base_config(checkout, Profile("far", "far/away", None, None, None, True, "", {}, []))


def test_an_architecture_whose_adapters_are_not_written_is_refused(tmp_path):
    adapter = shapes.write_adapter(tmp_path, shapes.BASES["llama"])
    with pytest.raises(
        UserError, match=r"^base model: model_type 'mamba' cannot be exported, only qwen3, qwen2, llama"
    ):
        export_adapter(adapter, {**shapes.BASES["llama"], "model_type": "mamba"}, tmp_path / "a.gguf", {})


def test_a_base_whose_configuration_lacks_a_key_is_told(tmp_path):
    base = dict(shapes.BASES["llama"])
    adapter = shapes.write_adapter(tmp_path, base)
    del base["num_hidden_layers"]
    with pytest.raises(UserError, match=r"^base model: its config.json lacks 'num_hidden_layers'"):
        export_adapter(adapter, base, tmp_path / "a.gguf", {})


def test_every_key_of_pefts_configuration_is_known_and_a_new_one_is_refused():
    from dataclasses import fields

    from peft import LoraConfig

    known = {"runtime_config", *CARRIED, *NOT_CARRIED}  # runtime_config is never saved
    assert {field.name for field in fields(LoraConfig)} <= known
    refuse_adapter({**PLAIN, "use_novelty": False}, "here")
    with pytest.raises(UserError, match="^here: use_novelty: True is not known here, so it may be lost"):
        refuse_adapter({**PLAIN, "use_novelty": True}, "here")


@pytest.mark.parametrize("start", ["gaussian", "orthogonal", "mica", "pissa", "pissa_niter_2", "olora"])
def test_a_start_is_refused_where_it_changes_the_base(start):
    import torch
    from peft import LoraConfig, inject_adapter_in_model

    model = torch.nn.Sequential(torch.nn.Linear(16, 12, bias=False))
    before = model[0].weight.detach().clone()
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["0"], init_lora_weights=start), model)
    assert torch.equal(model[0].base_layer.weight, before) == (start in PLAIN_STARTS)


def test_the_templates_hash_is_of_what_makes_the_rows_and_the_training(home, tmp_path):
    path = tmp_path / "product.yaml"
    text = home.template("product").read_text()

    def after(old, new):
        assert old in text
        path.write_text(text.replace(old, new, 1))
        return template_hash(path)

    same = template_hash(home.template("product"))
    assert after("# Laptop advice", "# Advice") == after("prefer: precision", "prefer: recall") == same
    assert len({same, after("rank: 16", "rank: 8"), after("- Chromebook", "- Chromebox")}) == 3
