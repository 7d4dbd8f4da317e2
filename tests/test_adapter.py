"""The trained adapter in PEFT: loaded, or told in one line."""

import shutil

import pytest

from factory.errors import UserError
from factory.paths import Home
from train.adapter import load_adapter, needed


@pytest.fixture
def base(tiny_base):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)


@pytest.fixture
def home(tiny_adapters, tmp_path):
    shutil.copytree(tiny_adapters[0], Home(tmp_path).expert("tea", "adapter"))
    return Home(tmp_path)


def test_it_is_switched_on_and_changes_what_the_base_says(home, base):
    import torch

    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        alone = base(ids).logits.clone()
        model = load_adapter(home, "tea", base)
        assert not model.training and not torch.equal(model(ids).logits, alone)


def test_without_one_the_command_that_makes_it_is_named(tmp_path, base):
    with pytest.raises(UserError, match=r"adapter_config\.json: there is no such file\n  then run: dmoe train tea"):
        needed(Home(tmp_path), "tea")
    with pytest.raises(UserError, match="then run: dmoe train tea"):
        load_adapter(Home(tmp_path), "tea", base)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_damaged_one_is_told_in_a_line(home, base, name):
    path = home.expert("tea", "adapter") / name
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"experts/tea/adapter: cannot be loaded \(.+\)\n  then run: dmoe train tea"):
        load_adapter(home, "tea", base)
