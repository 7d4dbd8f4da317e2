"""A base of our own architecture becomes a GGUF; every other one is refused with what to do instead."""

import json
import shutil

import pytest

from factory.errors import UserError
from train.base import refuse_mixture
from train.base_gguf import export_base


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
