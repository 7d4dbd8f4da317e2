"""Stage train: a LoRA adapter for one expert, thin over TRL's SFTTrainer and PEFT.

Reads datasets/<expert>/train.parquet and holdout.parquet, the base model, `train` of the template and of the profile;
writes experts/<expert>/adapter/, plots/loss.csv and plots/probe.csv. While it runs: a bar, .dmoe/live/<expert> for
DVCLive, and a checkpoint an epoch in .dmoe/training/<expert>, from which the same training goes on after a kill.
Run: dmoe train <expert>
On several GPUs: accelerate launch --config_file profiles/accelerate/fsdp.yaml -m factory.cli train <expert>
"""

import ctypes
import gc
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from factory.errors import UserError, relative
from factory.paths import Home, Profile
from factory.schema import ROWS, read_rows
from factory.store import read_json, whole, write_json, write_text
from factory.template import Template, read_template
from train.base import load_base, load_tokenizer
from train.probe import MEASURES, Probe, hopeless, read_probe
from train.rows import encode, passes, stops_of

SEED = 17
LOG_EVERY = 10  # steps, at most: a short training has twenty points too
Row = dict[str, Any]


@dataclass(frozen=True)
class Base:
    """A base in memory: trained on by one expert after another, each leaves it as it was."""

    model: Any
    tokenizer: Any


def load(home: Home, profile: Profile) -> Base:
    """The profile's base, ready to be trained on.

    Raises:
        UserError: it cannot be had, is a mixture of experts, or has no such attention.
    """
    import train.packed  # noqa: F401  the attention "rows"

    _keep_memory()
    tokenizer, model = load_tokenizer(home, profile), load_base(home, profile)
    try:
        model.set_attn_implementation(profile.train.attention)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"{relative(home.profile(profile.name))}: train.attention: {profile.train.attention!r} cannot be used "
            f"({str(error).splitlines()[0]})\n  then install it, or write rows, which needs nothing"
        ) from None
    gc.freeze()  # else each training walks the million objects of torch and of the base: a quarter of a second
    return Base(model, tokenizer)


def train(home: Home, expert: str, profile: Profile, base: Base | None = None, report_to: Iterable[str] = ()) -> str:
    """Trains and writes the adapter, whole or not at all; returns what there is to say of it (the first process).

    `base` is one already in memory; `report_to` are trackers that transformers knows (tensorboard, wandb, mlflow).

    Raises:
        UserError: the base cannot be had or is a mixture of experts, or a row's loss mask is wrong.
    """
    template = read_template(home.template(expert))
    rows, held_out = (
        read_rows(home.dataset(expert, f"{name}.parquet"), ROWS, f"dmoe build {expert}")
        for name in ("train", "holdout")
    )
    base = base or load(home, profile)
    state = _state(
        home, expert, [rows, template.declaration.train.model_dump(), profile.train.model_dump(), profile.model]
    )
    run = Run(expert, state, read_probe(template, profile, held_out), home.work / "live" / expert, tuple(report_to))
    trainer = fit(base, template, profile, rows, run)
    weights = trainer.accelerator.get_state_dict(trainer.model)  # asked of all processes: FSDP keeps parts in each
    log, model = trainer.state.log_history, trainer.accelerator.unwrap_model(trainer.model)
    if trainer.is_world_process_zero():
        with whole(home.expert(expert, "adapter")) as out:
            model.save_pretrained(out, state_dict=weights)
            # PEFT writes where the base lies on this machine, and the modules in the chance order of a set.
            config = read_json(out / "adapter_config.json")
            config |= {"base_model_name_or_path": profile.model, "target_modules": sorted(config["target_modules"])}
            write_json(out / "adapter_config.json", config)
            (out / "README.md").unlink(missing_ok=True)  # PEFT's empty card; the package writes the real one
            shutil.rmtree(state)  # before the adapter is in its place: what was stopped early must not be trained on
        losses = [f"{at['step']},{at['loss']:.4f}" for at in log if "loss" in at]
        write_text(home.expert(expert, "plots/loss.csv"), "\n".join(["step,loss", *losses, ""]))
        write_text(home.expert(expert, "plots/probe.csv"), _probe_table(log))
        paces = home.work / "paces.json"  # what `dmoe plan` reckons with
        known = read_json(paces) if paces.exists() else {}
        write_json(paces, {**known, profile.model: trainer.pace.figures()})
    model.unload()
    base.model.__dict__.pop("forward", None)  # TRL's, which each trainer would wrap once more
    return _said(expert, template, profile, trainer) if trainer.is_world_process_zero() else ""


@dataclass(frozen=True)
class Run:
    """What of one training is not its recipe: nothing here but `probe` changes the result."""

    name: str  # beside the bar
    state: Path  # a folder for checkpoints; a training found there goes on
    probe: Probe | None = None
    live: Path | None = None  # a folder for DVCLive
    report_to: tuple[str, ...] = ()


def fit(base: Base, template: Template, profile: Profile, rows: list[Row], run: Run) -> Any:
    """The expert's recipe on `rows`; returns the trainer, whose `model` is the base with the adapter (a PEFT model).

    Raises:
        UserError: a row's loss mask is wrong, a step cannot be shared by the processes there are, a tracker is missing.
    """
    from datasets import Dataset
    from peft import LoraConfig
    from peft.helpers import disable_input_dtype_casting
    from transformers import set_seed
    from transformers.integrations import get_available_reporting_integrations
    from transformers.trainer_callback import PrinterCallback

    from train.live import Bar, Pace
    from train.packed import PackedTrainer, use_fast_dropout

    if missing := set(run.report_to) - set(get_available_reporting_integrations()):
        raise UserError(
            f"--report-to {' '.join(sorted(missing))}: unknown, or its package is not installed here\n"
            f"  then install it (uv pip install {' '.join(sorted(missing))}), or leave it out"
        )
    set_seed(SEED)
    model, tokenizer, processes = base.model, base.tokenizer, int(os.environ.get("WORLD_SIZE", 1))
    encoded = encode(tokenizer, rows, stops_of(model, tokenizer), model.config.max_position_embeddings)
    wanted, settings = template.declaration.train, _arguments(template, profile, encoded, processes, run)
    pace = Pace(model.num_parameters(), str(settings.device), model.dtype, processes)
    trainer = PackedTrainer(
        pace=pace, model=model, processing_class=tokenizer, args=settings, train_dataset=Dataset.from_list(encoded),
        peft_config=LoraConfig(
            r=wanted.rank, lora_alpha=wanted.alpha, lora_dropout=profile.train.dropout, target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )  # fmt: skip
    prove_labels(trainer, encoded)
    use_fast_dropout(trainer.model)
    trainer.remove_callback(PrinterCallback)
    bar = Bar(run.name, pace)
    for callback in (bar, *_watchers(trainer, run)):
        trainer.add_callback(callback)
    try:
        with disable_input_dtype_casting(trainer.model):
            trainer.train(resume_from_checkpoint=last_checkpoint(run.state))
    finally:
        bar.end()
    return trainer


def _keep_memory() -> None:
    """Tells glibc to keep freed memory: giving it back and faulting it in again costs a quarter of a CPU step."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-4, 0)  # M_MMAP_MAX: no block by mmap
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: nothing back to the kernel


def _arguments(template: Template, profile: Profile, encoded: list[Row], processes: int, run: Run) -> Any:
    """TRL's arguments; what does not depend on template or profile is said here, with its reason."""
    import torch
    from trl import SFTConfig

    gpu, wanted = torch.cuda.is_available(), profile.train
    each, odd = divmod(wanted.examples_per_step, processes)
    if odd:
        raise UserError(
            f"{processes} processes cannot share the {wanted.examples_per_step} examples of a step evenly\n"
            f"  then start as many as divide train.examples_per_step of profiles/{profile.name}.yaml"
        )
    cut = passes([len(row["input_ids"]) for row in encoded], each, wanted.tokens_per_pass)
    epochs = template.declaration.train.epochs * wanted.epochs_factor
    steps = epochs * -(-len(encoded) // wanted.examples_per_step)
    return SFTConfig(
        output_dir=str(run.state), save_strategy="epoch", save_total_limit=1, report_to=list(run.report_to) or "none",
        run_name=run.name, log_level="warning", disable_tqdm=True,
        logging_steps=max(1, min(LOG_EVERY, round(steps) // 20)),
        num_train_epochs=epochs, per_device_train_batch_size=each // cut, gradient_accumulation_steps=cut,
        learning_rate=wanted.learning_rate, warmup_steps=round(wanted.warmup * steps), lr_scheduler_type="cosine",
        weight_decay=0.0, seed=SEED, data_seed=SEED, padding_free=True, max_length=None,
        bf16=wanted.dtype == "bfloat16", use_cpu=not gpu, dataloader_pin_memory=gpu,
        activation_checkpointing=wanted.checkpointing,
    )  # fmt: skip


def prove_labels(trainer: Any, encoded: list[Row]) -> None:
    """Checks the batches that the trainer would make of rows that are proved: the same tokens, the same labels.

    Raises:
        UserError: with the first row that is wrong.
    """
    size = trainer.args.per_device_train_batch_size
    for first in range(0, len(encoded), size):
        rows = encoded[first : first + size]
        batch = trainer.data_collator(list(trainer.train_dataset.select(range(first, first + len(rows)))))
        for name in ("input_ids", "labels"):
            if batch[name][0].tolist() != [token for row in rows for token in row[name]]:
                raise UserError(f"rows {first} to {first + len(rows) - 1}: TRL's collator changed their {name}")


def _watchers(trainer: Any, run: Run) -> list[Any]:
    """What looks on while the adapter is trained: the probe, DVCLive."""
    from train.live import Probing, to_dvclive

    found: list[Any] = [Probing(run.probe, trainer)] if run.probe and not trainer.is_fsdp_enabled else []
    return [*found, *to_dvclive(run.live)] if run.live else found


# -- checkpoints ----------------------------------------------------------------------------------


def _state(home: Home, expert: str, inputs: Any) -> Path:
    """The folder of a training with these `inputs`; what other inputs have left of this expert is removed."""
    key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]
    folder = home.work / "training" / expert / key
    for old in folder.parent.glob("*"):
        if old != folder:
            shutil.rmtree(old, ignore_errors=True)  # another process of the same launch may be quicker
    return folder


def last_checkpoint(state: Path) -> str | None:
    """The newest whole checkpoint in `state`. Its trainer_state.json is written last: without it a kill cut it off."""
    for folder in sorted(state.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True):
        try:
            read_json(folder / "trainer_state.json")
        except UserError:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            return str(folder)
    return None


# -- what is said of it ---------------------------------------------------------------------------


def _probe_table(log: list[Row]) -> str:
    """The probes as CSV: epoch, then each measure's rate and interval."""
    from train.live import probes

    lines = [",".join(["epoch", *(f"{name}{end}" for name in MEASURES for end in ("", "_low", "_high"))])]
    for epoch, found in probes(log):
        lines.append(",".join([f"{epoch:g}", *(f"{value:.4f}" for f in found.values() for value in f.values())]))
    return "\n".join([*lines, ""])


def _said(expert: str, template: Template, profile: Profile, trainer: Any) -> str:
    """How it went, and whether the gate can be met."""
    from train.live import probes, said

    state = trainer.state
    lines = [f"{expert}: {state.global_step} of {state.max_steps} steps, {said(trainer.pace.figures())}"]
    if (processes := trainer.accelerator.num_processes) > 1:
        share = "a part of the base" if trainer.is_fsdp_enabled else "the whole base"
        lines[0] += f", on {processes} processes, each {share}"
    for epoch, found in probes(state.log_history)[-1:]:
        rates = ", ".join(f"{name} {figures['rate']:.2f}" for name, figures in found.items())
        lines.append(f"{expert}: after {epoch:g} epochs {rates} of held-out questions")
        if state.global_step < state.max_steps:
            lines[-1] += "; that is enough, it stops here"
        if missed := hopeless(found, template, profile):
            lines.append(f"{expert}: the gate will not be met: {'; '.join(missed)}")
    return "\n".join([*lines, ""])
