"""What several test modules share: a tiny random base with the pocket base's tokenizer, and adapters for it."""

import shutil
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
POCKET = ROOT / "models" / "pocket"


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    """A folder with a random Qwen3 of two layers, sharp enough that its greedy text is never a tie."""
    if not (POCKET / "tokenizer.json").exists():
        pytest.skip("models/pocket has no tokenizer yet; run: make pocket")
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM, logging

    logging.disable_progress_bar()
    torch.set_num_threads(1)  # several in a test run would only wait for one another
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("tiny") / "base"
    config = Qwen3Config(
        vocab_size=9000, hidden_size=64, num_hidden_layers=2, intermediate_size=128, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, tie_word_embeddings=True, max_position_embeddings=2048,
        bos_token_id=None, eos_token_id=None, pad_token_id=None, initializer_range=0.2,
    )  # fmt: skip
    Qwen3ForCausalLM(config).half().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(POCKET / name, folder)
    return folder


@pytest.fixture(scope="session")
def tiny_gguf(tiny_base):
    from train.base_gguf import export_base

    out = tiny_base.parent / "base.gguf"
    export_base(tiny_base, out)
    return out


@pytest.fixture(scope="session")
def tiny_adapters(tiny_base):
    """Two PEFT folders for the tiny base, each strong enough to change what it says."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folders = []
    for seed, name in enumerate(("red", "blue")):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
        lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
        with warnings.catch_warnings():  # PEFT 0.21 asks transformers for a property that it has renamed
            warnings.simplefilter("ignore", FutureWarning)
            model = get_peft_model(model, lora)
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.3)
        folders.append(tiny_base.parent / name)
        model.save_pretrained(folders[-1])
    return folders


@pytest.fixture(scope="session")
def tiny_ggufs(tiny_base, tiny_adapters):
    import json

    from train.export import export_adapter

    config = json.loads((tiny_base / "config.json").read_text())
    for folder in tiny_adapters:
        out = folder.with_suffix(".gguf")
        export_adapter(folder, config, out, {"adapter.lora.task_name": folder.name})
    return [folder.with_suffix(".gguf") for folder in tiny_adapters]


@pytest.fixture(scope="session")
def home():
    """The project itself."""
    from factory.paths import Home

    return Home(ROOT)


@pytest.fixture
def checkout(home, tmp_path):
    """A copy of what people edit, with the pocket base's tokenizer and no revision pinned; nothing is built in it."""
    from factory.paths import Home

    for name in ("params.yaml", "profiles", "templates", "seeds"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    (tmp_path / "models" / "pocket").mkdir(parents=True)
    for name in ("tokenizer.json", "config.json"):
        shutil.copy(POCKET / name, tmp_path / "models" / "pocket")
    profile = tmp_path / "profiles" / "pocket.yaml"
    lines = profile.read_text().splitlines(keepends=True)
    profile.write_text("".join("  revision: null\n" if "revision:" in line else line for line in lines))
    return Home(tmp_path)


@pytest.fixture(scope="session")
def made(home, tmp_path_factory):
    """A checkout whose three experts' data are made by the embedded teacher; tests do not change it."""
    from factory.build import build
    from factory.generate import generate
    from factory.paths import Home, read_params, read_profile

    root = tmp_path_factory.mktemp("made")
    for name in ("params.yaml", "profiles", "templates", "seeds", "models"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, root / name)
    made = Home(root)
    params = read_params(made)
    profile = read_profile(made, params.profile)
    for expert in params.experts:
        generate(made, expert, params, profile)
        build(made, expert, profile)
    return made
