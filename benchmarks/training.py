"""How fast is the pocket base trained, beside TRL's SFTTrainer as it comes, and is the loss that of a plain loop?

The same rows, the same adapter (rank 16, every linear layer), eight examples a step, two cores. Useful tokens are
those of the rows, without padding. Every arm runs in a process of its own, three times in turn; medians are shown.
The limit is what a matrix product of 1,024 x 1,024 reaches here, at four operations a weight and token (4N).
Run: python benchmarks/training.py [STEPS, 30]   (ten minutes; needs datasets/product: dvc repro build@product)
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

from rich.console import Console
from rich.table import Table

from factory.paths import find_home, read_profile
from factory.progress import track
from factory.schema import ROWS, read_rows
from factory.template import read_template

RUNS, WARM = 3, 6  # steps that do not count
ARMS = {
    "stock": "SFTTrainer's defaults: padded, activation checkpointing, bfloat16 autocast",
    "stock, dropout": "... with the profile's dropout",
    "ours": "this project's recipe without dropout",
    "ours, dropout": "... as the profile has it",
    "with TRL's loss": "logits in chunks, entropy and accuracy as well",
    "with sdpa": "transformers' attention: a mask of all tokens by all tokens",
    "with torch's dropout": "a serial generator",
    "with the input cast": "PEFT's own cast of every input to float32",
    "with checkpointing": "activations computed twice",
    "with memory given back": "glibc's default",
}


def arm(name: str, steps: int) -> dict[str, float]:
    """One arm, in this process: useful tokens/s after the first steps, and all that it saw."""
    import torch

    home = find_home()
    profile = read_profile(home, "pocket")
    rows = read_rows(home.dataset("product", "train.parquet"), ROWS, "dvc repro build@product")
    keys: dict[str, Any] = {"probe": 0, "epochs_factor": 0.5}  # the template asks for two
    if "dropout" not in name:
        keys["dropout"] = 0.0
    keys |= {"with sdpa": {"attention": "sdpa"}, "with checkpointing": {"checkpointing": True}}.get(name, {})
    profile = _with(profile, **keys)
    rows = rows[: steps * profile.train.examples_per_step]
    with tempfile.TemporaryDirectory() as folder:
        trainer = _stock(home, profile, rows, folder) if name.startswith("stock") else None
        times, tokens = _timed(trainer, name, home, profile, rows, Path(folder))
    seconds = times[-1] - times[WARM]
    return {"tokens_per_second": sum(tokens[WARM:-1]) / seconds, "threads": torch.get_num_threads()}


def _with(profile: Any, **keys: Any) -> Any:
    from dataclasses import replace

    return replace(profile, train=profile.train.model_copy(update=keys))


def _stock(home: Any, profile: Any, rows: list[dict[str, Any]], folder: str) -> Any:
    """TRL as it comes, but for: the CPU is used, nothing is reported, the same adapter."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    return SFTTrainer(
        model=str(home.root / profile.model),
        args=SFTConfig(
            folder, use_cpu=True, report_to="none", num_train_epochs=1, disable_tqdm=True, save_strategy="no"
        ),
        peft_config=LoraConfig(
            r=16, lora_alpha=32, lora_dropout=profile.train.dropout, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        train_dataset=Dataset.from_list([{"prompt": r["prompt"], "completion": r["completion"]} for r in rows]),
    )


def _timed(trainer: Any, name: str, home: Any, profile: Any, rows: Any, folder: Path) -> tuple[list[float], list[int]]:
    """When each step began, and how many useful tokens it held."""
    from contextlib import ExitStack, nullcontext

    from transformers import Trainer
    from trl import SFTTrainer

    from train import packed, sft

    times: list[float] = []
    tokens: list[int] = []
    step = Trainer.training_step

    def timed(self: Any, model: Any, inputs: Any, *others: Any, **more: Any) -> Any:
        times.append(time.perf_counter())
        mask = inputs.get("attention_mask")
        tokens.append(int(mask.sum()) if mask is not None else inputs["input_ids"].numel())
        return step(self, model, inputs, *others, **more)

    with ExitStack() as stack:
        stack.enter_context(patch.object(Trainer, "training_step", timed))
        if trainer:
            trainer.train()
            return times, tokens
        if name == "with TRL's loss":
            stack.enter_context(patch.object(packed.PackedTrainer, "compute_loss", SFTTrainer.compute_loss))
        if name == "with torch's dropout":
            stack.enter_context(patch.object(packed, "use_fast_dropout", lambda model: None))
        if name == "with the input cast":
            stack.enter_context(patch("peft.helpers.disable_input_dtype_casting", lambda model: nullcontext()))
        if name == "with memory given back":
            stack.enter_context(patch.object(sft, "_keep_memory", lambda: None))
        template = read_template(home.template("product"))
        sft.fit(sft.load(home, profile), template, profile, rows, sft.Run(name, folder))
    return times, tokens


def plain(steps: int) -> dict[str, Any]:
    """The greatest difference of a step's loss from a plain loop's: each row alone, no TRL, full logits, float32."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup, set_seed

    from train import sft
    from train.rows import IGNORED

    home = find_home()
    profile = _with(read_profile(home, "pocket"), probe=0, epochs_factor=0.5, dropout=0.0)
    rows = read_rows(home.dataset("product", "train.parquet"), ROWS, "dvc repro build@product")
    rows = rows[: steps * profile.train.examples_per_step]
    batches: list[Any] = []
    with tempfile.TemporaryDirectory() as folder, patch.object(sft, "LOG_EVERY", 1):
        base = sft.load(home, profile)
        template = read_template(home.template("product"))
        trainer = sft.fit(base, template, profile, rows, sft.Run("packed", Path(folder)))
    found = [at["loss"] for at in trainer.state.log_history if "loss" in at]
    for batch in trainer.get_train_dataloader():
        ends = batch["cu_seq_lens_q"].tolist()
        batches.append(
            [(batch["input_ids"][:, a:b], batch["labels"][0, a:b]) for a, b in zip(ends, ends[1:], strict=False)]
        )
    set_seed(sft.SEED)
    model = AutoModelForCausalLM.from_pretrained(profile.model_path(home), dtype=torch.float32)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora).train()
    learnt = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learnt, lr=profile.train.learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(profile.train.warmup * len(batches)), len(batches))
    wanted = []
    for batch in track(batches, "each row alone", len(batches)):
        count = sum(int((labels != IGNORED).sum()) for _, labels in batch)
        total = 0.0
        for ids, labels in batch:
            logits = model(input_ids=ids).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=IGNORED, reduction="sum") / count
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(learnt, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        wanted.append(total)
    worst = max(abs(a - b) for a, b in zip(found, wanted, strict=True))
    return {"worst": worst, "steps": len(found), "first": found[0], "last": found[-1]}


def limit() -> dict[str, float]:
    """Tokens/s if every operation were a large matrix product."""
    import torch

    from train import sft
    from train.live import reached

    home = find_home()
    weights = sft.load(home, read_profile(home, "pocket")).model.num_parameters()
    return {"tokens_per_second": reached("cpu", torch.float32, 20) / (4 * weights), "weights": weights}


def asked(what: str, steps: int) -> dict[str, float]:
    """One arm in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, str(steps), what], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{what}: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main(steps: int) -> None:
    rates: dict[str, list[float]] = {name: [] for name in ARMS}
    todo = [(run, name) for run in range(RUNS) for name in ARMS if run == 0 or not name.startswith("with ")]
    limits = []
    for _, name in track(todo, "arms", len(todo)):
        rates[name].append(asked(name, steps)["tokens_per_second"])
        limits.append(asked("limit", steps)["tokens_per_second"])
    table = Table(
        "arm", "useful tokens/s", "of the limit (4N)", "times stock", "what it is", title="Training, pocket base"
    )
    top, middle = statistics.median(limits), {name: statistics.median(found) for name, found in rates.items()}
    for name, about in ARMS.items():
        stock = middle["stock, dropout" if "dropout" in name else "stock"]
        table.add_row(name, f"{middle[name]:,.0f}", f"{middle[name] / top:.0%}", f"{middle[name] / stock:.2f}", about)
    table.add_row("the limit", f"{top:,.0f}", "100%", "", "a large matrix product, float32")
    console = Console()
    console.print(table)
    same = asked("plain", 16)
    console.print(
        f"loss per step beside a plain loop, {same['steps']} steps from {same['first']:.4f} to {same['last']:.4f}: "
        f"{same['worst']:.1e} apart at most, 1e-5 allowed"
    )


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 30
    if len(sys.argv) < 3:
        main(count)
    else:
        warnings.filterwarnings("ignore")
        what = sys.argv[2]
        found = plain(count) if what == "plain" else limit() if what == "limit" else arm(what, count)
        sys.stdout.write("\n" + json.dumps(found) + "\n")
