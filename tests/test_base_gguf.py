"""A base of our own architecture becomes a GGUF; every other one is refused with what to do instead."""

import json
import shutil
from dataclasses import replace

import pytest

from factory.errors import UserError
from factory.paths import read_profile
from train.base import refuse_mixture
from train.base_gguf import export_base, full_gguf


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts", "n_routed_experts"])
def test_a_mixture_of_experts_is_refused_with_the_reason(key, tmp_path):
    refuse_mixture({"model_type": "qwen3", key: 1}, "here")
    with pytest.raises(UserError, match=r"^here: a mixture-of-experts base [\s\S]* dilutes the adapter"):
        refuse_mixture({"model_type": "qwen3_moe", key: 128}, "here")
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {key: 8}}))
    with pytest.raises(UserError, match="mixture-of-experts"):
        export_base(tmp_path, tmp_path / "out.gguf")


def test_another_architecture_is_refused_with_what_to_do_instead(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UserError, match=r"model_type: 'llama' is not converted here.*base\.gguf"):
        export_base(tmp_path, tmp_path / "out.gguf")


def test_a_base_with_a_missing_file_is_refused(tiny_base, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no model\*\.safetensors"):
        export_base(folder, tmp_path / "out.gguf")
    shutil.copy(tiny_base / "config.json", folder / "model.safetensors")
    with pytest.raises(UserError, match="damaged safetensors"):
        export_base(folder, tmp_path / "out.gguf")


def test_the_unquantised_base_is_the_named_one_or_made_from_the_folder_and_none_where_nothing_is_quantised(
    checkout, tiny_base
):
    shutil.copytree(tiny_base, checkout.root / "models" / "pocket", dirs_exist_ok=True)
    profile = read_profile(checkout, "pocket")
    assert full_gguf(checkout, profile) is None
    quantised = replace(profile, gguf="models/base-Q8_0.gguf")
    made = full_gguf(checkout, quantised)
    assert made.parent == checkout.work and made.read_bytes()[:4] == b"GGUF"
    named = replace(quantised, gguf_full="models/base-BF16.gguf")
    with pytest.raises(UserError, match=r"base\.gguf_full: there is no models/base-BF16\.gguf"):
        full_gguf(checkout, named)
    (checkout.root / "models" / "base-BF16.gguf").write_bytes(b"GGUF")
    assert full_gguf(checkout, named) == checkout.root / "models" / "base-BF16.gguf"
    assert full_gguf(checkout, replace(quantised, model="far/away")) is None
