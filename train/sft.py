"""Stage train: a LoRA adapter for one expert, thin over TRL's SFTTrainer and PEFT.

Reads datasets/<expert>/train.parquet, the base model, `train` of the template and of the profile;
writes experts/<expert>/adapter/ and plots/loss.csv. Run: dmoe train <expert>
"""

import ctypes
import sys
from pathlib import Path
from typing import Any

from factory.errors import UserError
from factory.paths import Home, Profile
from factory.schema import ROWS, read_rows
from factory.store import read_json, whole, write_json, write_text
from factory.template import Template, read_template
from train.base import load_base, load_tokenizer

SEED = 17
THINK = "<think>\n\n</think>\n\n"


def train(home: Home, expert: str, profile: Profile) -> None:
    """Trains and writes the adapter, whole or not at all.

    Raises:
        UserError: the base cannot be had or is a mixture of experts, or a row's loss mask is wrong.
    """
    template = read_template(home.template(expert))
    rows = read_rows(home.dataset(expert, "train.parquet"), ROWS, f"dmoe build {expert}")
    with whole(home.expert(expert, "adapter")) as out:
        trainer = fit(home, template, profile, rows, out.parent / "state")
        trainer.model.save_pretrained(out)
        # PEFT writes where the base lies on this machine, and the modules in the chance order of a set.
        config = read_json(out / "adapter_config.json")
        config |= {"base_model_name_or_path": profile.model, "target_modules": sorted(config["target_modules"])}
        write_json(out / "adapter_config.json", config)
        (out / "README.md").unlink(missing_ok=True)  # PEFT's empty card; the package writes the real one
    losses = [f"{at['step']},{at['loss']:.4f}" for at in trainer.state.log_history if "loss" in at]
    write_text(home.expert(expert, "plots/loss.csv"), "\n".join(["step,loss", *losses, ""]))


def fit(home: Home, template: Template, profile: Profile, rows: list[dict[str, Any]], state: Path) -> Any:
    """The expert's recipe on `rows`; returns the trainer, whose `model` is the base with the adapter (a PEFT model).

    `state` is a folder that the trainer may use.

    Raises:
        UserError: the base cannot be had or is a mixture of experts, or a row's loss mask is wrong.
    """
    from peft import LoraConfig
    from peft.helpers import disable_input_dtype_casting
    from transformers import set_seed
    from trl import SFTTrainer

    _keep_memory()
    set_seed(SEED)
    tokenizer = load_tokenizer(home, profile)
    model = load_base(home, profile)
    wanted = template.declaration.train
    lora = LoraConfig(
        r=wanted.rank, lora_alpha=wanted.alpha, lora_dropout=profile.train["dropout"], target_modules="all-linear",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model, processing_class=tokenizer, peft_config=lora, train_dataset=_dataset(rows),
        args=_arguments(template, profile, len(rows), state),
    )  # fmt: skip
    prove_labels(trainer, rows, tokenizer)
    with disable_input_dtype_casting(trainer.model):
        trainer.train()
    return trainer


def _keep_memory() -> None:
    """Tells glibc to keep freed memory: giving it back and faulting it in again costs a quarter of a CPU step."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-4, 0)  # M_MMAP_MAX: no block by mmap
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: nothing back to the kernel


def _dataset(rows: list[dict[str, Any]]) -> Any:
    from datasets import Dataset

    return Dataset.from_list([{"prompt": row["prompt"], "completion": row["completion"]} for row in rows])


def _arguments(template: Template, profile: Profile, rows: int, state: Path) -> Any:
    """TRL's arguments; what does not depend on template or profile is said here, with its reason."""
    import torch
    from trl import SFTConfig

    gpu, wanted = torch.cuda.is_available(), profile.train
    epochs = template.declaration.train.epochs * wanted["epochs_factor"]
    steps = epochs * -(-rows // wanted["examples_per_step"])
    return SFTConfig(
        output_dir=str(state), save_strategy="no", report_to="none", logging_steps=10, log_level="warning",
        num_train_epochs=epochs, per_device_train_batch_size=wanted["examples_per_step"],
        learning_rate=wanted["learning_rate"], warmup_steps=round(wanted["warmup"] * steps), lr_scheduler_type="cosine",
        weight_decay=0.0, seed=SEED, data_seed=SEED, completion_only_loss=True, max_length=None,
        train_sampling_strategy="group_by_length",  # rows of one length share a batch: little padding
        bf16=gpu, use_cpu=not gpu, activation_checkpointing=False, dataloader_pin_memory=gpu,
    )  # fmt: skip


def prove_labels(trainer: Any, rows: list[dict[str, Any]], tokenizer: Any) -> None:
    """Checks the batches that the trainer itself would make, before the first step.

    Of every row the prompt must be a strict prefix, and the loss must fall on exactly the empty
    think block, the output and the end-of-turn token.

    Raises:
        UserError: with the first row that is wrong.
    """
    for tokens, row in zip(trainer.train_dataset, rows, strict=True):
        batch = trainer.data_collator([tokens])
        ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
        first = next((i for i, label in enumerate(labels) if label != -100), len(labels))
        learned = tokenizer.decode([i for i, label in zip(ids, labels, strict=True) if label != -100])
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
        wanted = row["output"] + tokenizer.eos_token
        if tokenizer.decode(ids[:first]) != prompt or learned.strip().removeprefix(THINK) != wanted:
            raise UserError(
                f"row {row['row_id']}: the loss would fall on {learned!r}, not on {wanted!r} after {prompt!r}\n"
                f"  then check the chat template of the base model"
            )
