"""A GGUF that is not the adapter that was trained is told, with the first tensor that differs; one that is, passes."""

import json
import shutil
import warnings
from dataclasses import replace
from types import SimpleNamespace

import lora_shapes as shapes
import numpy as np
import pytest

from factory.errors import UserError
from factory.paths import read_profile
from factory.schema import ROWS, write_rows
from factory.store import read_json
from train.base_gguf import export_base
from train.export import export_adapter
from train.parity import (
    LOOSER,
    MOST_KL,
    Passage,
    Update,
    blame,
    choose,
    compare_updates,
    figures,
    interleaved,
    judge,
    loosened,
    measured,
    parity,
)


def row(seed, text="Take the blue one."):
    return {
        "row_id": f"{seed:016d}", "seed_id": f"product-{seed:04d}", "answer": "default", "instruction": "Which?",
        "output": text, "prompt": [{"role": "user", "content": "Which?"}],
        "completion": [{"role": "assistant", "content": text}],
    }  # fmt: skip


@pytest.fixture
def small(checkout, tiny_base, tiny_adapters, tiny_ggufs):
    """A checkout on the tiny base, whose product expert is a random adapter, with one short row held out."""
    shutil.copytree(tiny_base, checkout.root / "models" / "pocket", dirs_exist_ok=True)
    shutil.copytree(tiny_adapters[0], checkout.expert("product", "adapter"))
    shutil.copy(tiny_ggufs[0], checkout.expert("product", "adapter.gguf"))
    write_rows(checkout.dataset("product", "holdout.parquet"), ROWS, [row(1, "Blue.")])
    return checkout


def run(small):
    return parity(small, "product", read_profile(small, "pocket"))


def missed(small):
    with pytest.raises(UserError) as told:
        run(small)
    assert not small.expert("product", "parity.json").exists()
    return str(told.value)


def rewrite(small, change, alpha=8.0):
    """Writes the expert's GGUF again with alpha and with tensors (name -> values) that `change` has altered."""
    import gguf

    file = small.expert("product", "adapter.gguf")
    tensors = {tensor.name: tensor.data.copy() for tensor in gguf.GGUFReader(file).tensors}
    change(tensors)
    file.unlink()
    writer = gguf.GGUFWriter(file, "qwen3")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_an_adapter_that_is_right_passes_at_every_scale(small):
    rewrite(small, lambda tensors: None)  # what the sabotaged files below are written by changes nothing itself
    found = run(small)
    assert found == read_json(small.expert("product", "parity.json"))
    assert list(found["scales"]) == list(found["as_served"]) == ["0", "0.5", "1"]
    assert all(f["kl_max"] < 1e-8 and f["agreement"] == 1 for f in found["scales"].values())
    assert found["identical_at_0"] and found["updates"] == {"compared": 14, "largest_error": 0.0}


def test_half_the_alpha_is_told_as_such(small):
    rewrite(small, lambda tensors: None, alpha=4.0)
    told = missed(small)
    assert "kl_max" in told and "at scale 0.5" in told and "at scale 1" in told and "at scale 0," not in told
    assert "14 of 14 updates differ" in told
    assert "blk.0.attn_q.weight: its update differs by 0.5 of its size; every update is 0.5 times PEFT's" in told


def test_two_pairs_of_one_shape_that_changed_places_are_told(small):
    def swap(tensors):
        for side in ("a", "b"):
            gate, up = f"blk.1.ffn_gate.weight.lora_{side}", f"blk.1.ffn_up.weight.lora_{side}"
            tensors[gate], tensors[up] = tensors[up], tensors[gate]

    rewrite(small, swap)
    told = missed(small)
    assert "kl_max" in told and "2 of 14 updates differ" in told
    assert "first tensor that differs: blk.1.ffn_gate.weight: its update differs" in told


def test_a_layer_without_its_pair_is_told(small):
    rewrite(small, lambda tensors: [tensors.pop(f"blk.0.attn_output.weight.lora_{side}") for side in ("a", "b")])
    told = missed(small)
    assert "kl_max" in told and "1 of 14 updates differ" in told
    assert "first tensor that differs: blk.0.attn_output.weight: is missing" in told


def test_a_pair_that_was_never_trained_is_told(small, tiny_base, tiny_adapters):
    folder = small.expert("product", "adapter")
    config = read_json(folder / "adapter_config.json")
    kept = {**config, "target_modules": [m for m in config["target_modules"] if not m.endswith("v_proj")]}
    (folder / "adapter_config.json").write_text(json.dumps(kept))
    from safetensors.numpy import load_file, save_file

    weights = load_file(folder / "adapter_model.safetensors")
    save_file({n: v for n, v in weights.items() if "v_proj" not in n}, folder / "adapter_model.safetensors")
    told = missed(small)
    assert "kl_max" in told and "blk.0.attn_v.weight: is not in PEFT's adapter" in told


def test_rslora_that_was_written_as_plain_lora_is_told(small):
    config = small.expert("product", "adapter") / "adapter_config.json"
    config.write_text(json.dumps({**read_json(config), "use_rslora": True}))
    told = missed(small)  # rank 4: PEFT's scale is alpha / 2, the file's alpha / 4
    assert "kl_max" in told and "every update is 0.5 times PEFT's: look at adapter.lora.alpha" in told


@pytest.mark.parametrize("value", [1.0, np.nan], ids=["a number", "NaN"])
def test_one_element_that_is_another_is_told(small, value):
    def change(tensors):
        tensors["blk.1.ffn_down.weight.lora_b"][3, 2] += value

    rewrite(small, change)
    told = missed(small)
    assert "kl_max" in told and "1 of 14 updates differ" in told
    assert "first tensor that differs: blk.1.ffn_down.weight: its update differs" in told


def test_another_base_under_the_same_adapter_is_told_though_every_tensor_is_right(small, tmp_path):
    """As llama.cpp would be told that reads a tensor of the base in another way."""
    from safetensors.numpy import load_file, save_file

    other = tmp_path / "other"
    shutil.copytree(small.root / "models" / "pocket", other)
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] *= 1.01
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    export_base(other, small.work / "base.gguf")
    named = replace(read_profile(small, "pocket"), gguf=".dmoe/base.gguf")
    parity(small, "product", named)  # a named GGUF is held to what it shows at scale 0
    weights["model.norm.weight"] *= 3
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    export_base(other, small.work / "base.gguf")
    told = r"base's GGUF is .* nats from its weights, at most 0.5 wanted.*\n.*all 14 updates are PEFT's: look at"
    with pytest.raises(UserError, match=told):
        parity(small, "product", named)


def test_a_fault_that_a_quantised_base_would_hide_is_found_in_the_tensors(small):
    def nudge(tensors):
        tensors["blk.1.ffn_down.weight.lora_b"][3, 2] += 1e-4

    rewrite(small, nudge)
    told = missed(small)
    assert "kl_" not in told and "blk.1.ffn_down.weight" in told


def test_a_vocabulary_of_another_base_is_told(tiny_gguf, tmp_path):
    from factory.llama import running

    size = 9000
    with running(tiny_gguf, slots=1, threads=1, log=tmp_path / "log") as llama:
        for other, theirs in ((size - 1, f"more than {size - 1}"), (size + 1, str(size))):
            with pytest.raises(UserError, match=f"has {theirs} tokens, torch's {other}; the GGUF is of another base"):
                measured(llama, [Passage([1, 2, 3], [2])], [], other, "x")
        found = measured(llama, [Passage([1, 2, 3], [2])], [], size, "x")
    assert found.shape == (1, size) and np.exp(found).sum() == pytest.approx(1, abs=1e-12)


def test_what_llama_cpp_would_say_is_measured_even_where_it_is_half_a_letter(tiny_base, tiny_gguf, tmp_path):
    from transformers import AutoTokenizer

    from factory.llama import running

    half = AutoTokenizer.from_pretrained(tiny_base).convert_tokens_to_ids("\u00c3")  # first of two bytes, as BPE has it
    asked = {"n_predict": 1, "n_probs": 3, "temperature": 0}
    with running(tiny_gguf, slots=1, threads=1, log=tmp_path / "log") as llama:
        unheard, a, b = (llama.complete([1, 2], [], logit_bias=[[said, 1e4]], **asked) for said in (half, "a", "b"))
    assert "completion_probabilities" not in unheard  # llama.cpp waits for the other half
    assert (a["content"], b["content"]) == ("a", "b")  # what is said was forced,
    told, same = (reply["completion_probabilities"][0]["top_logprobs"] for reply in (a, b))
    assert told == same  # and what is measured was not


def test_float32_matrices_of_the_base_are_its_own(tiny_base, tmp_path):
    import gguf
    from safetensors.numpy import load_file

    export_base(tiny_base, tmp_path / "base.gguf", matrices="F32")
    source = load_file(tiny_base / "model.safetensors")
    carried = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "base.gguf").tensors}
    assert {tensor.tensor_type.name for tensor in carried.values()} == {"F32"}
    assert np.array_equal(carried["token_embd.weight"].data, source["model.embed_tokens.weight"])


def test_llamas_rows_are_compared_in_llama_cpps_order(tmp_path):
    """Two heads of four rows: the halves 0 1 | 2 3 of each become pairs 0 2 | 1 3."""
    config = SimpleNamespace(num_attention_heads=2, num_key_value_heads=1)
    b = np.arange(8.0)[:, None]
    assert interleaved(b, "blk.0.attn_q.weight", config)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert interleaved(b, "blk.0.attn_k.weight", config)[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert interleaved(b, "blk.0.attn_v.weight", config) is b


# -- figures --------------------------------------------------------------------------------------


def logs(*rows):
    return np.log(np.array(rows))


def test_divergence_is_measured_in_nats_from_peft_to_llama_cpp():
    found = figures(logs([0.5, 0.5], [0.9, 0.1]), logs([0.25, 0.75], [0.9, 0.1]), 0.0)
    wanted = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    assert found["kl_max"] == pytest.approx(wanted, rel=0.05) and found["kl_mean"] == pytest.approx(
        wanted / 2, rel=0.05
    )


def test_a_tie_is_left_out_of_agreement_and_counted():
    peft, cpp = logs([0.5001, 0.4999], [0.9, 0.1], [0.2, 0.8]), logs([0.4999, 0.5001], [0.9, 0.1], [0.6, 0.4])
    found = figures(peft, cpp, 1e-3)
    assert (found["agreement"], found["ties"]) == (0.5, 1)
    assert figures(peft[:1], cpp[:1], 1e-3)["agreement"] == 1.0


def test_a_quantised_base_is_held_to_a_multiple_of_what_it_shows_at_scale_zero():
    peft, cpp = logs([0.6, 0.4]), logs([0.61, 0.39])
    limits, shown = loosened(peft, cpp), figures(peft, cpp, 0.0)
    assert limits["kl_max"] == pytest.approx(LOOSER * shown["kl_max"], rel=0.05) and limits["tie"] > 1e-3
    assert loosened(peft, peft)["kl_max"] == MOST_KL


def test_nan_misses_the_gate():
    nan = {"kl_mean": float("nan"), "kl_max": float("nan"), "agreement": 1.0}
    result = {"limits": {"kl_mean": 1, "kl_max": 1}, "scales": {"0": nan}, "identical_at_0": True}
    assert len(judge(result, [])) == 3


def test_a_llama_cpp_that_is_not_the_bare_base_at_scale_zero_misses_the_gate():
    fine = {"kl_mean": 0.0, "kl_max": 0.0, "agreement": 1.0}
    result = {"limits": {"kl_mean": 1, "kl_max": 1}, "scales": {"0": fine}, "identical_at_0": False}
    assert judge(result, []) == ["at scale 0 not the bare base, bit for bit"]
    off = {**result, "identical_at_0": True, "scales": {"0": {**fine, "agreement": 0.5}}}
    assert judge(off, []) == ["the same best token at 50.0% of positions at scale 0, all wanted"]


def test_without_a_tensor_that_differs_the_engine_is_named(tmp_path):
    told = blame([Update("blk.0.attn_q.weight", 0.0, 1.0, 1e-6)], tmp_path / "adapter.gguf")
    assert "all 1 updates are PEFT's: look at llama.cpp's version and at the base's GGUF" in told


def test_rows_are_chosen_from_different_seeds_and_in_the_same_way_each_time(tiny_base):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    rows = [row(seed, f"Take number {seed}, it is the one to choose.") for seed in range(20)]
    rows += [{**r, "row_id": "f" + r["row_id"][1:]} for r in rows]
    chosen = choose(rows, tokenizer)
    assert chosen == choose(rows[::-1], tokenizer) and len(chosen) == 8
    assert len({tuple(p.tokens) for p in chosen}) == 8
    for passage in chosen:
        assert passage.ends == sorted(set(passage.ends)) and len(passage.ends) == 6
        assert tokenizer.decode(passage.tokens[: passage.ends[0]]).endswith("<|im_start|>assistant\n")


# -- every architecture ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen3", "llama-grouped", "smollm3", "gemma2", "phi2", "phi3"])
def test_the_updates_of_every_architecture_are_found_equal_through_its_order_and_folding(name, tmp_path):
    import torch
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM

    modules = sorted({module.rpartition(".")[2] for module in shapes.layers(shapes.BASES[name])})
    written = {
        "task_type": "CAUSAL_LM",
        "target_modules": modules,
        "use_rslora": True,
        "alpha_pattern": {modules[0]: 3},
    }
    adapter = shapes.write_adapter(tmp_path, shapes.BASES[name], **written)
    export_adapter(adapter, shapes.BASES[name], tmp_path / "adapter.gguf", {})
    torch.manual_seed(0)
    with warnings.catch_warnings():  # transformers and PEFT of one another
        warnings.simplefilter("ignore")
        base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "base"))
        model = PeftModel.from_pretrained(base, str(adapter))
    found = compare_updates(model, tmp_path / "adapter.gguf")
    assert len(found) == len(shapes.layers(shapes.BASES[name])) and not any(update.differs for update in found)
    model.config.get_text_config().num_attention_heads = 2  # as if the rows stood in another order
    moved = [u.name for u in compare_updates(model, tmp_path / "adapter.gguf") if u.differs]
    permuted = shapes.BASES[name]["model_type"] in ("llama", "mistral", "smollm3")
    assert moved == (["blk.0.attn_q.weight", "blk.1.attn_q.weight"] if permuted else [])
