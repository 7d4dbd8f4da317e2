"""The whole line on a tiny random base, in a checkout of its own: seeds to a served, packed expert."""

import json
import shutil
import tarfile

import pytest
from huggingface_hub import ModelCard

from factory.build import build
from factory.errors import UserError
from factory.generate import generate
from factory.gguf_file import read_base
from factory.package import package
from factory.paths import read_params, read_profile
from factory.schema import ROWS, read_rows
from factory.store import read_json
from serve.ask import answers
from serve.market import installed
from serve.package_check import opened
from train.audit import Plan, audit
from train.base_gguf import base_gguf
from train.export import export
from train.gate import gate
from train.parity import parity
from train.score import score
from train.sft import train

pytestmark = pytest.mark.filterwarnings("default")  # TRL, PEFT and transformers warn of one another


@pytest.fixture
def small(checkout, tiny_base):
    """A checkout on the tiny base with sixteen seeds of one expert, trained for one short epoch."""
    shutil.copytree(tiny_base, checkout.root / "models" / "pocket", dirs_exist_ok=True)
    seeds = checkout.seeds("product")
    seeds.write_text("".join(seeds.read_text().splitlines(keepends=True)[:16]))
    profile = checkout.profile("pocket")
    profile.write_text(profile.read_text().replace("epochs_factor: 3", "epochs_factor: 1"))
    return checkout


def _train(small):
    profile = read_profile(small, "pocket")
    generate(small, "product", read_params(small), read_profile(small, "pocket"))
    build(small, "product", profile)
    train(small, "product", profile)
    export(small, "product", profile)
    return profile


def test_seeds_become_a_packed_and_served_expert(small):
    profile = _train(small)
    base = base_gguf(small, profile)
    figures = score(small, "product", profile, base, full=base)  # as if `base` were quantised, and this the whole one
    assert figures["expert"]["n"] == len(read_rows(small.dataset("product", "holdout.parquet"), ROWS, ""))
    assert figures["full_precision"]["n"] == figures["expert"]["n"]

    with pytest.raises(UserError, match="product: gate missed: mention"):  # random weights keep no claim
        gate(small, "product", profile)
    held_to_nothing = type(profile)(**{**profile.__dict__, "gates": []})
    gate(small, "product", held_to_nothing)

    audit(small, "product", profile, Plan(examples=12, in_questions=2, in_answers=2, seen=1, references=7, rows=8))
    # what was not compared is not packed
    with pytest.raises(UserError, match=r"parity\.json: there is no .*\n  then run: dvc repro parity@product"):
        package(small, "product", profile, base)
    compared = parity(small, "product", profile)
    manifest = package(small, "product", profile, base)
    assert manifest["parity"].items() <= compared.items()
    wanted = {"lora_id", "keywords", "base_model", "recommended_scale", "adapter_file"}
    assert wanted <= set(json.loads(small.expert("product", "manifest.json").read_text()))
    tar = small.expert("product", "product.tar")
    first = tar.read_bytes()
    package(small, "product", profile, base)
    assert tar.read_bytes() == first  # equal inputs, equal bytes
    with tarfile.open(tar) as inside:
        assert f"{manifest['lora_id']}/adapter.gguf" in inside.getnames()
        card = inside.extractfile(f"{manifest['lora_id']}/README.md").read().decode()
    assert manifest["audit"]["says"][-1] in card and "not a guarantee" in card
    assert ModelCard(card).data.library_name == "peft"
    with opened(tar, read_base(base)) as packed:  # as a stranger would
        assert packed.warnings == () and packed.manifest.lora_id == manifest["lora_id"]

    gguf, shipped = small.expert("product", "adapter.gguf"), small.expert("product", "adapter.gguf").read_bytes()
    gguf.write_bytes(shipped + b"0")
    with pytest.raises(UserError, match="parity.json: is of another adapter.gguf\n  then run: dmoe parity product"):
        package(small, "product", profile, base)
    gguf.write_bytes(shipped)

    asked = [("Which laptop?", "auto"), ("Which laptop?", "base"), ("Good soup?", "auto")]
    replies = [r for _, r in answers(base, installed(small), asked, beside=False, log=small.work / "logs" / "ask.log")]
    assert [reply[0].who for reply in replies] == ["product", "base", "base"]


def test_a_trained_adapter_loads_into_plain_peft(small):
    import torch
    from peft import PeftModel

    from train.base import load_base

    profile = _train(small)
    model = PeftModel.from_pretrained(load_base(small, profile), str(small.expert("product", "adapter")))
    folder = small.expert("product", "adapter")
    config = read_json(folder / "adapter_config.json")
    assert config["base_model_name_or_path"] == profile.model
    assert config["target_modules"] == sorted(config["target_modules"])  # no set's order: equal bytes
    assert not any(
        str(small.root).encode() in path.read_bytes() for path in folder.iterdir()
    )  # no place of this machine
    trained = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert len(trained) == 7 * model.config.num_hidden_layers and all(torch.count_nonzero(p) for p in trained)


def test_training_twice_gives_the_same_adapter_byte_for_byte(small):
    _train(small)
    weights = small.expert("product", "adapter") / "adapter_model.safetensors"
    first = weights.read_bytes()
    train(small, "product", read_profile(small, "pocket"))
    assert weights.read_bytes() == first


def test_a_loss_on_anything_but_the_reply_stops_before_the_first_step(small):
    """A chat template that puts words of its own behind the prompt would be learnt; the labels show it."""
    path = small.root / "models" / "pocket" / "chat_template.jinja"
    broken = path.read_text().replace("{{- m.content + '<|im_end|>", "{{- m.content + ' over and out<|im_end|>")
    assert broken != path.read_text()
    path.write_text(broken)
    profile = read_profile(small, "pocket")
    generate(small, "product", read_params(small), read_profile(small, "pocket"))
    build(small, "product", profile)
    with pytest.raises(UserError, match="the loss would fall on"):
        train(small, "product", profile)
    assert not small.expert("product", "adapter").exists()


def test_a_mixture_of_experts_base_is_refused_with_the_reason(small):
    config = small.root / "models" / "pocket" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "qwen3_moe", "num_experts": 8}))
    profile = read_profile(small, "pocket")
    generate(small, "product", read_params(small), read_profile(small, "pocket"))
    build(small, "product", profile)
    with pytest.raises(UserError, match="(?s)mixture-of-experts base .* dilutes"):
        train(small, "product", profile)
