"""Tensors pass from safetensors to GGUF one at a time; what is damaged, or does not fit, is named."""

import numpy as np
import pytest

from factory.errors import UserError
from train.tensors import Planned, read, stored, write


@pytest.fixture
def save(tmp_path):
    import torch
    from safetensors.torch import save_file

    def made(**values):
        save_file({name: torch.as_tensor(value) for name, value in values.items()}, tmp_path / "a.safetensors")
        return tmp_path / "a.safetensors"

    return made


def gguf(path, *planned):
    from gguf import GGUFReader, GGUFWriter

    write(GGUFWriter(path, "llama"), planned)
    return {tensor.name: tensor for tensor in GGUFReader(path).tensors}


def plan(values, kind):
    return Planned("a", values.shape, kind, lambda: values, "file: tensor a")


def test_every_float_is_read_as_torch_reads_it(save):
    import torch

    values = torch.randn(3, 5)
    file = save(c=values, b=values.half(), a=values.bfloat16(), d=torch.tensor(2.0))
    a, b, c, d = [read(tensor) for tensor in stored(file)]
    assert np.array_equal(a, values.bfloat16().float().numpy())
    assert np.array_equal(b, values.half().numpy())
    assert np.array_equal(c, values.numpy())
    assert (d.shape, float(d)) == ((), 2.0)


def test_a_damaged_file_a_missing_one_and_one_of_whole_numbers_are_refused(save, tmp_path):
    file = save(a=np.arange(4, dtype=np.int64))
    with pytest.raises(UserError, match=r"a\.safetensors: tensor a is I64, not F16, BF16 or F32"):
        stored(file)
    file = save(a=np.ones(4, np.float32))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="damaged safetensors"):
        stored(file)
    with pytest.raises(UserError, match="there is no such file"):
        stored(tmp_path / "b.safetensors")


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_a_tensor_arrives_as_the_gguf_package_itself_would_write_it(kind, tmp_path):
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    values = np.random.RandomState(0).standard_normal((6, 64)).astype(np.float32)
    tensor = gguf(tmp_path / "a.gguf", plan(values, kind))["a"]
    assert tensor.data.tobytes() == quantize(values, GGMLQuantizationType[kind]).tobytes()
    assert (tensor.tensor_type.name, tensor.shape.tolist()) == (kind, [64, 6])


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_what_is_not_finite_or_does_not_fit_is_named(kind, tmp_path):
    values = np.ones((1, 32), np.float32)
    values[0, 3] = np.nan
    with pytest.raises(UserError, match="^file: tensor a holds NaN or infinity; train again"):
        gguf(tmp_path / "a.gguf", plan(values, kind))
    values[0, 3] = np.finfo(np.float32).max
    if kind == "F32":
        gguf(tmp_path / "a.gguf", plan(values, kind))
    else:
        with pytest.raises(UserError, match=f"^file: tensor a does not fit into {kind.lower()}; use a wider type"):
            gguf(tmp_path / "a.gguf", plan(values, kind))
