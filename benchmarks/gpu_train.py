"""How fast a LoRA expert trains on one GPU, on Qwen3-14B's shape: the packed way beside TRL's SFTTrainer as it comes.

The base has random weights (speed and memory do not depend on them), the rows random tokens, 60 to 140 a row, half of
them learned. Ours: 16 examples a step laid end to end without padding, attention within each row, logits and loss on
learned tokens alone, PEFT's needless casts left out, no checkpointing; other rows of the table change one of these.
Stock: SFTTrainer with its defaults (8 padded examples, checkpointing) on the same rows; transformers' Trainer where
there is no TRL. Before the table, on a tiny shape: are the gradients and losses those of the plain way?
Not measured: what the adapter learns, reading a base from a disk, several GPUs.
The file stands alone: torch, transformers and peft are all it needs; trl and flash_attn are used where they are.
Run: python benchmarks/gpu_train.py   (one H200: under 8 minutes; without a GPU, on a tiny shape: one)
"""

import os

# Libraries read these as they start. Steps differ in length, which would break blocks of fixed size into pieces.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import gc
import logging
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import distributions
from importlib.util import find_spec
from itertools import accumulate, cycle, islice
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor
from torch.nn import functional as F

SEED = 17
EXAMPLES, STOCK_EXAMPLES = 16, 8  # of a step; 8 is SFTTrainer's own
CHUNK, CHUNKS, WARM_UP = 64, 5, 2  # examples in a timed chunk, timed chunks, chunks before them
EXPERT_ROWS, EXPERT_EPOCHS = 1000, 3
SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size",
)  # fmt: skip
SHAPES = {
    "14b": (5120, 17408, 40, 40, 8, 128, 151936),
    "8b": (4096, 12288, 36, 32, 8, 128, 151936),
    "tiny": (128, 384, 2, 4, 2, 32, 2000),
}
# Dense bf16 FLOP/s by the words of the card's name; the first whose words all occur counts.
PEAKS = {
    "H200 NVL": 835e12, "H200": 989e12, "GH200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12,
    "A100": 312e12, "L40S": 362e12, "L4": 121e12, "B200": 2250e12, "4090": 165e12,
}  # fmt: skip
Row = dict[str, list[int]]
Batch = tuple[dict[str, Any], Tensor]  # what the model takes, and the targets
Varlen = Callable[..., Tensor] | None
LORA = partial(LoraConfig, r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
say = partial(print, flush=True)


@dataclass(frozen=True)
class Setting:
    """One way to train; the defaults are ours."""

    name: str
    examples: int = EXAMPLES
    attention: str = "rows"
    cast: bool = False  # PEFT's cast of each input to the adapter's float32
    checkpointing: bool = False
    fused: bool = False
    compiled: bool = False


class Figures(NamedTuple):
    rate: float  # useful tokens a second
    step: float  # seconds
    memory: float  # GB


def why(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0][:200]}"


def build(shape: str, device: str, dtype: torch.dtype) -> Any:
    """A Qwen3 of this shape with random weights, made where it stays: no second copy, none on the host."""
    config = transformers.Qwen3Config(
        **dict(zip(SIZES, SHAPES[shape], strict=True)), max_position_embeddings=40960, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip
    torch.manual_seed(SEED)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")


def draw_rows(count: int, vocabulary: int) -> list[Row]:
    """Tokenised rows of random ids, 96 in the mean; about the first half is prompt and has no label."""
    dice, rows = random.Random(SEED), []
    for _ in range(count):
        length = round(dice.triangular(60, 140, 88))
        prompt = round(length * dice.uniform(0.4, 0.6))
        ids = [dice.randrange(2, vocabulary) for _ in range(length)]  # 0 and 1 are stock's padding and end
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def pack(rows: list[Row], device: str) -> Batch:
    """The rows end to end as one row of the model, and the targets of the positions whose logits are kept."""

    def place(tensor: Tensor) -> Tensor:
        return tensor.pin_memory().to(device, non_blocking=True) if device == "cuda" else tensor

    sizes = [len(row["input_ids"]) for row in rows]
    labels = torch.tensor([label for row in rows for label in row["labels"]])
    kept = (labels[1:] != -100).nonzero()[:, 0]  # a row begins with its prompt, so none is asked for the next one's
    bounds = place(torch.tensor([0, *accumulate(sizes)], dtype=torch.int32))
    inputs = {
        "input_ids": place(torch.tensor([[i for row in rows for i in row["input_ids"]]])),
        "position_ids": place(torch.cat([torch.arange(size) for size in sizes])[None]),
        "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": max(sizes), "max_length_k": max(sizes),
        "row_sizes": sizes,  # the same on the host: reading them off the GPU would make every layer wait
        "logits_to_keep": place(kept),
    }  # fmt: skip
    return inputs, place(labels[kept + 1])


def find_varlen(device: str) -> tuple[Varlen, str]:
    """torch's varlen_attn where it works forwards and backwards with grouped heads, and what "rows" therefore is."""
    if device != "cuda":
        return None, "one call a row"
    try:
        from torch.nn.attention.varlen import varlen_attn

        query, key = (torch.randn(8, n, 64, device=device, dtype=torch.bfloat16, requires_grad=True) for n in (4, 2))
        bounds = torch.tensor([0, 3, 8], device=device, dtype=torch.int32)
        out = varlen_attn(query, key, key, bounds, bounds, 5, 5, window_size=(-1, 0), enable_gqa=True)
        out.backward(torch.ones_like(out))
        torch.cuda.synchronize()
    except Exception as error:
        return None, f"one call a row (varlen_attn does not work here: {why(error)})"
    return varlen_attn, "varlen_attn"


def rows_attention(varlen: Varlen) -> Callable[..., tuple[Tensor, None]]:
    """Causal attention within each row, as transformers calls it: q [1, heads, T, D] to [1, T, heads, D]."""

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, *, row_sizes: list[int],
        cu_seq_lens_q: Tensor, max_length_q: int, scaling: float | None = None, **_: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        if varlen and query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
            flat = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]  # [T, heads, D]
            ends = cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q
            return varlen(*flat, *ends, scale=scaling, window_size=(-1, 0), enable_gqa=True)[None], None
        parts = zip(*(tensor.split(row_sizes, 2) for tensor in (query, key, value)), strict=True)
        outs = [F.scaled_dot_product_attention(*p, is_causal=True, scale=scaling, enable_gqa=True) for p in parts]
        return torch.cat(outs, 2).transpose(1, 2), None

    return attention


class FusedLora(torch.autograd.Function):
    """x W^T + scaling (x A^T) B^T: the low-rank part is added within its matrix product, forwards and backwards.

    Spares the passes over [T, out] that scale, add and sum gradients. Dropout and biases are not covered.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        rows, a, b = x.reshape(-1, x.shape[-1]), a.to(weight.dtype), b.to(weight.dtype)
        low = rows @ a.T
        ctx.save_for_backward(rows, weight, a, b, low)
        ctx.scaling = scaling
        return (rows @ weight.T).addmm_(low, b.T, alpha=scaling).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, a, b, low = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        down = (flat @ b).mul_(ctx.scaling)
        grad_a, grad_b = down.T @ rows, (flat.T @ low).mul_(ctx.scaling)
        grad_x = None  # the first layer's input is frozen
        if ctx.needs_input_grad[0]:
            grad_x = (flat @ weight).addmm_(down, a).view(*grad.shape[:-1], -1)
        return grad_x, None, grad_a.float(), grad_b.float(), None


def fused_forward(layer: Any, x: Tensor) -> Tensor:
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return FusedLora.apply(x, layer.base_layer.weight, a, b, layer.scaling["default"])


def restore(base: Any) -> None:
    """Undoes what an adapter, a trainer or a compiler left on the base, even a failed one; forgets the memory peak."""
    for name, module in list(base.named_modules()):
        if isinstance(module, LoraLinear):
            parent, _, leaf = name.rpartition(".")
            setattr(base.get_submodule(parent), leaf, module.base_layer)
        module._compiled_call_impl = None
    for attribute in ("peft_config", "forward"):  # TRL puts a forward of its own there
        vars(base).pop(attribute, None)
    base.gradient_checkpointing_disable()
    base.get_input_embeddings()._forward_hooks.clear()  # trainers hang theirs there, some of them twice
    gc.collect()
    if base.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@contextmanager
def adapted(base: Any, setting: Setting) -> Iterator[Any]:
    """The base with an adapter, always the same fresh one, set up as `setting` says. It begins by `restore`."""
    restore(base)
    base.set_attn_implementation(setting.attention)
    torch.manual_seed(SEED)
    model = get_peft_model(base, LORA()).train()
    if setting.checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    if setting.fused:
        for layer in model.modules():
            if isinstance(layer, LoraLinear):
                layer.forward = partial(fused_forward, layer)
    if setting.compiled:
        torch._dynamo.config.recompile_limit = 256  # the layers share their code
        for layer in base.model.layers:
            layer.compile(dynamic=True)
    with disable_input_dtype_casting(model, active=not setting.cast):
        yield model


def loss_of(model: Any, batch: Batch, half: bool) -> Tensor:
    """Mean over the learned tokens. `half`: bf16 autocast."""
    inputs, targets = batch
    with torch.autocast(targets.device.type, torch.bfloat16, enabled=half):
        logits = model(**inputs, use_cache=False).logits[0]
    return F.cross_entropy(logits.float(), targets, reduction="sum") / len(targets)


def optimisation(model: Any, steps: int, **options: Any) -> Callable[[], None]:
    """What follows each backward pass: clipping, AdamW, the cosine."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=4e-4, weight_decay=0.0, **options)
    schedule = transformers.get_cosine_schedule_with_warmup(optimiser, max(1, steps // 20), steps)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()

    return update


def clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def figures(device: str, marks: list[float], tokens: list[int], steps: int) -> Figures:
    """Medians over the chunks of `steps` steps after the warm-up. `marks`: the clock where chunks begin and end.

    Memory: the most that tensors took on the GPU since `restore`; on a CPU what the process holds now.
    """
    timed = [(n, end - begin) for n, begin, end in zip(tokens, marks, marks[1:], strict=False)][WARM_UP:]
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    held = torch.cuda.max_memory_allocated() if device == "cuda" else pages * os.sysconf("SC_PAGE_SIZE")
    return Figures(median(n / s for n, s in timed), median(s for _, s in timed) / steps, held / 1e9)


def measure(setting: Setting, base: Any, rows: list[Row], half: bool) -> Figures:
    device, steps = base.device.type, max(1, CHUNK // setting.examples)
    with adapted(base, setting) as model:
        update = optimisation(model, steps * (WARM_UP + CHUNKS), fused=True)
        supply, tokens, marks = cycle(rows), [], [clock(device)]
        for _ in range(WARM_UP + CHUNKS):
            tokens.append(0)
            for _ in range(steps):
                batch = pack(list(islice(supply, setting.examples)), device)
                loss = loss_of(model, batch, half)
                loss.backward()
                update()
                tokens[-1] += batch[0]["input_ids"].numel()
            marks.append(clock(device))
    if not loss.isfinite():
        raise ArithmeticError("the loss is not finite")
    return figures(device, marks, tokens, steps)


def make_trainer(kind: str, base: Any, rows: list[Row], options: dict[str, Any]) -> Any:
    """SFTTrainer as it comes, or transformers' Trainer with its defaults, whose logits are those of all positions."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = Tokenizer(WordLevel({"<pad>": 0, "<end>": 1}, unk_token="<pad>"))  # asked for, though the rows are ids
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")
    if kind == "SFTTrainer":
        from datasets import Dataset, disable_progress_bars
        from trl import SFTConfig, SFTTrainer

        disable_progress_bars()
        data, arguments = Dataset.from_list(rows), SFTConfig(**options)
        return SFTTrainer(base, arguments, train_dataset=data, processing_class=tokenizer, peft_config=LORA())
    model = get_peft_model(base, LORA())
    model.enable_input_require_grads()
    defaults = {"gradient_checkpointing": True, "learning_rate": 2e-5, "logging_steps": 10}
    arguments = transformers.TrainingArguments(**options, **defaults)
    pad = transformers.DataCollatorForSeq2Seq(tokenizer)
    return transformers.Trainer(model, arguments, data_collator=pad, train_dataset=rows)


def measure_stock(kind: str, base: Any, rows: list[Row], half: bool) -> Figures:
    """A trainer's speed in its own loop: the clock is read before the first step of each chunk."""
    device, steps = base.device.type, CHUNK // STOCK_EXAMPLES
    marks: list[float] = []
    seen: list[Tensor] = []
    restore(base)
    base.set_attn_implementation("sdpa")
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "output_dir": folder, "max_steps": steps * (WARM_UP + CHUNKS) + 1, "save_strategy": "no",
            "report_to": "none", "disable_tqdm": True, "log_level": "error", "bf16": half, "use_cpu": device == "cpu",
        }  # fmt: skip
        trainer = make_trainer(kind, base, rows, options)
        trainer.remove_callback(transformers.PrinterCallback)
        training_step = trainer.training_step

        def counted(model: Any, inputs: dict[str, Tensor], *rest: Any, **more: Any) -> Tensor:
            if len(seen) % steps == 0:
                marks.append(clock(device))
            seen.append(inputs["attention_mask"].sum())
            return training_step(model, inputs, *rest, **more)

        trainer.training_step = counted
        trainer.train()
    tokens = [sum(int(n) for n in seen[i : i + steps]) for i in range(0, len(seen) - 1, steps)]
    return figures(device, marks, tokens, steps)


def matmul_rate(device: str, dtype: torch.dtype, m: int, k: int, n: int) -> float:
    """FLOP/s of a matrix product [m, k] x [k, n]."""
    a, b = torch.randn(m, k, device=device, dtype=dtype), torch.randn(k, n, device=device, dtype=dtype)
    times, seconds = (20 if device == "cuda" else 2), []
    for _ in range(6):
        start = clock(device)
        for _ in range(times):
            a @ b
        seconds.append(clock(device) - start)
    return 2 * m * k * n * times / median(seconds[1:])


def gradients(base: Any, setting: Setting, batch: Batch, half: bool) -> list[Tensor]:
    """Of all LoRA matrices, B not at its zeros: with them A would have no gradient."""
    with adapted(base, setting) as model:
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.02)
        loss_of(model, batch, half).backward()
        return [weight.grad for weight in model.parameters() if weight.requires_grad]


def lone_loss(model: Any, row: Row) -> Tensor:
    """The reference: one example by itself, the logits of all its positions, summed over the learned ones."""
    ids, labels = (torch.tensor(row[key], device=model.device) for key in ("input_ids", "labels"))
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
    return F.cross_entropy(logits, labels[1:], reduction="sum")


def losses(base: Any, steps: list[list[Row]], alone: bool) -> list[float]:
    """Of each step, in float32; `alone`: by the reference, PEFT and AdamW as they come."""
    found = []
    with adapted(base, Setting("", attention="sdpa" if alone else "rows", cast=alone)) as model:
        update = optimisation(model, len(steps), fused=not alone)
        for rows in steps:
            learned = sum(label != -100 for row in rows for label in row["labels"])
            if alone:
                parts = (lone_loss(model, row) / learned for row in rows)
            else:
                parts = [loss_of(model, pack(rows, base.device.type), half=False)]
            found.append(0.0)
            for part in parts:
                part.backward()
                found[-1] += part.item()
            update()
    return found


def apart(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest distance of two tensors, relative to the norm of the wanted one."""
    pairs = zip(found, wanted, strict=True)
    return max(((f.float() - w.float()).norm() / w.float().norm()).item() for f, w in pairs)


def varlen_apart(varlen: Varlen, rows: list[Row]) -> Iterator[float]:
    """varlen_attn beside one call a row, at the heads of the 14B shape in bf16: output, then gradients."""
    inputs, _ = pack(rows, "cuda")
    draw = partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    length, heads, results = sum(inputs["row_sizes"]), (40, 8, 8), []
    tensors, upstream = [draw(1, n, length, 128, requires_grad=True) for n in heads], draw(1, length, 40, 128)
    for kernel in (varlen, None):
        out, _ = rows_attention(kernel)(None, *tensors, None, scaling=128**-0.5, **inputs)
        results.append(([out.detach()], torch.autograd.grad(out, tensors, upstream)))
    return (apart(found, wanted) for found, wanted in zip(*results, strict=True))


def checks(device: str, varlen: Varlen) -> Iterator[tuple[str, float, float]]:
    """What is compared, how far it is apart, how far it may be."""
    rows = draw_rows(4 * EXAMPLES, SHAPES["tiny"][-1])
    steps = [
        rows[i : i + EXAMPLES] for i in range(0, len(rows), EXAMPLES)
    ] * 5  # again and again, or nothing is learned
    batch = pack(steps[0], device)
    for dtype, most_cast, most_fused in ((torch.float32, 1e-6, 1e-5), (torch.bfloat16, 1e-2, 5e-2)):
        base, half = build("tiny", device, dtype), dtype is torch.bfloat16
        kind = "bf16 autocast" if half else "float32"
        plain = gradients(base, Setting("", cast=True), batch, half)
        uncast, fused = (gradients(base, Setting("", fused=fused), batch, half) for fused in (False, True))
        yield f"gradients without PEFT's cast and with it, {kind}, relative", apart(uncast, plain), most_cast
        yield f"gradients of fused LoRA and of PEFT's, {kind}, relative", apart(fused, plain), most_fused
        if not half:
            pairs = zip(losses(base, steps, alone=False), losses(base, steps, alone=True), strict=True)
            yield f"loss in {len(steps)} steps, packed and alone, {kind}", max(abs(p - a) for p, a in pairs), 1e-5
    if varlen:
        for what, found in zip(("output", "gradients"), varlen_apart(varlen, steps[0]), strict=True):
            yield f"varlen_attn and one call a row: {what}, bf16, relative", found, 2e-2


def settings(attention: str, mean_length: float, compiled: bool) -> list[Setting]:
    """In order of importance."""
    ours = partial(Setting, attention=attention)
    return [
        ours("ours"),
        Setting("stock: SFTTrainer"),
        Setting("stock: Trainer"),
        ours("ours, checkpointing", checkpointing=True),
        Setting("ours, transformers' sdpa and mask", attention="sdpa"),
        ours("ours, PEFT's cast left in", cast=True),
        *(ours(f"ours, {tokens:,} tokens a step", examples=round(tokens / mean_length)) for tokens in (4096, 8192)),
        ours("ours, fused LoRA", fused=True),
        Setting("ours, no mask function", attention="bare_rows"),
        Setting("ours, no mask function, fused LoRA", attention="bare_rows", fused=True),
        *([ours("ours, layers compiled", compiled=True)] if compiled else []),
    ]


def run_all(base: Any, wanted: list[Setting], rows: list[Row], half: bool, until: float) -> dict[str, Figures]:
    """Name -> figures, of what fits before `until`; what does not, or fails, is named at once."""
    found: dict[str, Figures] = {}
    longest = 0.0
    for setting in wanted:
        start, (who, _, kind) = time.monotonic(), setting.name.partition(": ")
        if kind == "Trainer" and "stock: SFTTrainer" in found:
            continue  # it only stands in
        if start + 1.2 * longest > until:
            say(f"{setting.name}: not run, the time is up")
            continue
        try:
            take = partial(measure_stock, kind) if who == "stock" else partial(measure, setting)
            found[setting.name] = take(base, rows, half)
        except torch.OutOfMemoryError:
            say(f"{setting.name}: does not fit into the memory")
        except Exception as error:
            say(f"{setting.name}: not measured ({why(error)})")
        longest = max(longest, time.monotonic() - start)
    return found


def aligned(lines: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )


def report(found: dict[str, Figures], flops_a_token: float, peak: float, mean_length: float, memory: str) -> None:
    """The table; then what is wanted of ours on a 14B shape and one H200, beside what was found."""
    of_stock = next((figure.rate for name, figure in found.items() if name.startswith("stock")), None)
    titles = ("useful tokens/s", "MFU by 4N", memory, "s a step", "experts an hour", "x stock")
    lines = {}
    for name, (rate, step, held) in found.items():
        hourly = 3600 * rate / (EXPERT_ROWS * mean_length * EXPERT_EPOCHS)
        cells = f"{rate:,.0f}", f"{rate * flops_a_token / peak:.1%}", f"{held:.1f}", f"{step:.3f}", f"{hourly:,.0f}"
        lines[name] = (*cells, f"{rate / of_stock:.2f}" if of_stock else "-")
    say("\n" + aligned([("", *titles), *((name, *cells) for name, cells in lines.items())]))
    say("\nuseful: without padding. 4N: 4 x all parameters x useful tokens, recomputing is not counted.")
    say(f"an expert: {EXPERT_ROWS:,} rows of {mean_length:.0f} tokens, {EXPERT_EPOCHS} epochs, the base resident;")
    say("its probing, saving and data are not in it. Medians of several chunks after a warm-up.\n")
    ours = dict(zip(titles, lines.get("ours", "-" * len(titles)), strict=True))
    wanted = {titles[0]: ">= 7,000", titles[1]: ">= 43 %", memory: "<= 90", titles[5]: ">= 2", titles[4]: ">= 40"}
    leanest = min((figure.memory for name, figure in found.items() if name.startswith("ours")), default=float("nan"))
    compared = [(title, limit, ours[title]) for title, limit in wanted.items()]
    compared.append((f"{memory}, the leanest of ours", "< 70", f"{leanest:.1f}"))
    say(aligned([("ours", "wanted (14B, one H200)", "found"), *compared]))


def announce(card: str, base: Any, shape: str, tokens: int) -> float:
    """Tells what a matrix product reaches here, and returns the FLOP/s that MFU refers to."""
    device, dtype, sizes = base.device.type, base.dtype, (tokens, *SHAPES[shape][:2])
    size = 8192 if device == "cuda" else 1024
    big, own = matmul_rate(device, dtype, size, size, size), matmul_rate(device, dtype, *sizes)
    words = set(card.replace("-", " ").split()) if dtype is torch.bfloat16 else set()
    known = next((flops for name, flops in PEAKS.items() if set(name.split()) <= words), None)
    say(f"a matrix product reaches {big / 1e12:.3g} TFLOP/s ({size:,} cubed), {own / 1e12:.3g} ({sizes}, as in a step)")
    say(f"peak that MFU refers to: {(known or big) / 1e12:.3g} TFLOP/s, {'the card' if known else 'the former'}'s")
    return known or big


def main() -> None:
    started, gpu = time.monotonic(), torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="14b" if gpu else "tiny")
    parser.add_argument("--attention", choices=("rows", "sdpa", "flash_attention_2"), default="rows")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16" if gpu else "float32")
    parser.add_argument("--minutes", type=float, default=7, help="no further row is begun that would end later")
    parser.add_argument("--compile", action="store_true", help="one more row, with torch.compile of the layers")
    asked = parser.parse_args()
    if asked.attention == "flash_attention_2" and not find_spec("flash_attn"):
        say("flash_attn is not installed: rows instead of flash_attention_2")
        asked.attention = "rows"
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_float32_matmul_precision("highest")  # some images switch TF32 on, and the checks in float32 would fail

    device = "cuda" if gpu else "cpu"
    card = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    varlen, kernel = find_varlen(device)
    # With a mask function, even one that gives none, transformers looks for packed rows in position_ids, and for that
    # waits once a step for all that the GPU has still to do. "bare_rows" is "rows" without it.
    for name in ("rows", "bare_rows"):
        transformers.AttentionInterface.register(name, rows_attention(varlen))
    transformers.AttentionMaskInterface.register("rows", lambda *_, **__: None)
    versions = {str(d.metadata["Name"]).lower().replace("-", "_"): d.version for d in distributions()}
    packages = [name for name in ("torch", "transformers", "peft", "trl", "flash_attn") if name in versions]
    say(f'{card}; {", ".join(f"{name} {versions[name]}" for name in packages)}; attention "rows": {kernel}\n')

    passed = []
    for what, distance, most in checks(device, varlen):
        passed.append(distance <= most)
        say(f"{'ok    ' if passed[-1] else 'FAILED'}  {what}: {distance:.1e}, allowed {most:.0e}")

    start = time.monotonic()
    base = build(asked.shape, device, getattr(torch, asked.dtype))
    clock(device)
    parameters, rows = sum(p.numel() for p in base.parameters()), draw_rows(640, base.config.vocab_size)
    mean_length = fmean(len(row["input_ids"]) for row in rows)
    say(f"\n{asked.shape}: {parameters:,} parameters in {asked.dtype}, made in {time.monotonic() - start:.0f} s")
    peak = announce(card, base, asked.shape, round(EXAMPLES * mean_length))
    wanted = settings(asked.attention, mean_length, asked.compile)
    found = run_all(base, wanted, rows, asked.dtype == "bfloat16", started + 60 * asked.minutes)
    report(found, 4 * parameters, peak, mean_length, "peak, GB" if gpu else "RSS, GB")
    say(f"\n{time.monotonic() - started:.0f} s in all")
    if not all(passed):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
