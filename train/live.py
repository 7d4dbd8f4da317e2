"""What looks on while an adapter is trained: a bar with its figures, DVCLive, the probe that may stop it.

MFU is said as 4N: a token of LoRA training takes four operations a weight of the base, two forward and two backward,
of what the machine can do at most. Of a GPU that is its maker's figure for dense bfloat16; of a CPU or an unknown
GPU, what a large matrix product reaches here.
"""

import math
import resource
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from factory.progress import Meter
from train.probe import MEASURES, Probe

# dense bfloat16 operations a second, by a part of the GPU's name: the makers' data sheets
PEAKS = {
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12,
    "4090": 165e12,
}  # fmt: skip

PROBE_STEPS = 10  # at least, between two probes


@cache
def peak(device: str, dtype: torch.dtype) -> float:
    """Operations a second that `device` can do at most."""
    known = device.startswith("cuda") and dtype is torch.bfloat16 and data_sheet(torch.cuda.get_device_name(device))
    return known or reached(device, dtype)


def data_sheet(gpu: str) -> float | None:
    """Dense bfloat16 operations a second of a GPU of that name, as its maker says; None: not in the table."""
    return next((operations for part, operations in PEAKS.items() if part in gpu), None)


def reached(device: str, dtype: torch.dtype, tries: int = 4) -> float:
    """Operations a second of the fastest of some large matrix products, measured here."""
    size = 8192 if device.startswith("cuda") else 1024
    a = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(tries):
        began = time.perf_counter()
        float((a @ a)[0, 0])  # waits for the GPU
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def memory() -> float:
    """Bytes at most so far: of the GPU's allocator, else of this process."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(most * (1 if sys.platform == "darwin" else 1024))


class Pace:
    """Tokens a second of all processes, none of them padding, and their share of the peak; pauses do not count."""

    def __init__(self, weights: int, device: str, dtype: torch.dtype, processes: int) -> None:
        self.weights, self.processes = weights, processes
        self.peak = peak(device, dtype) * processes
        self.tokens = 0  # of this process
        self._seconds, self._since = 0.0, 0.0

    def go(self) -> None:
        """Training begins, or goes on after a pause."""
        self._since = time.perf_counter()

    def pause(self) -> None:
        """What follows is no training: a probe, a checkpoint."""
        self._seconds += time.perf_counter() - self._since
        self._since = 0.0

    def figures(self) -> dict[str, float]:
        """So far: tokens/s, mfu (0 to 1), memory in GB."""
        seconds = self._seconds + (time.perf_counter() - self._since if self._since else 0.0)
        rate = self.tokens * self.processes / seconds if seconds else 0.0
        return {
            "tokens_per_second": round(rate, 1),
            "mfu": round(4 * self.weights * rate / self.peak, 4),
            "memory_gb": round(memory() / 1e9, 3),
        }


class Bar(TrainerCallback):  # type: ignore[misc]
    """Keeps the pace, and shows one bar on stderr with its figures below; of the first process alone."""

    def __init__(self, name: str, pace: Pace) -> None:
        self.name, self.pace, self.loss = name, pace, float("nan")
        self._meter: Meter | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self._meter = Meter(self.name, state.max_steps).__enter__()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.pace.go()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.pace.pause()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        self.loss = logs.get("loss", self.loss)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._meter:
            self._meter.show(state.global_step, f"loss {self.loss:.3f}, {said(self.pace.figures())}")

    def end(self) -> None:
        """Takes the bar away, however training ended."""
        if self._meter:
            self._meter.__exit__()
        self._meter = None


def said(figures: dict[str, float]) -> str:
    """Figures of a pace, for people."""
    return f"{figures['tokens_per_second']:,.0f} tokens/s, MFU {figures['mfu']:.0%} (4N), {figures['memory_gb']:.1f} GB"


class Probing(TrainerCallback):  # type: ignore[misc]
    """Asks the probe after each epoch, logs what it finds, and stops the training once the claim is safely kept.

    Epochs of a few steps are probed some at a time, and always the last one: to ask would take longer than to train.
    """

    def __init__(self, probe: Probe, trainer: Any) -> None:
        self.probe, self.trainer = probe, trainer

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        every = math.ceil(PROBE_STEPS * args.num_train_epochs / state.max_steps)  # epochs
        if round(state.epoch) % every and state.global_step < state.max_steps:
            return
        with self.trainer.accelerator.autocast():
            found = self.probe.ask(
                self.trainer.accelerator.unwrap_model(self.trainer.model), self.trainer.processing_class
            )
        self.trainer.log({f"probe_{name}_{part}": value for name, f in found.items() for part, value in f.items()})
        control.should_training_stop = control.should_training_stop or self.probe.settled(found)


def probes(log: list[dict[str, float]]) -> list[tuple[float, dict[str, dict[str, float]]]]:
    """What `Probing` has logged: epoch, then each measure's rate, low and high."""
    found = []
    for at in (at for at in log if "probe_right_rate" in at):
        figures = {m: {part: at[f"probe_{m}_{part}"] for part in ("rate", "low", "high")} for m in MEASURES}
        found.append((at["epoch"], figures))
    return found


def to_dvclive(folder: Path) -> list[Any]:
    """Writes what is logged as DVCLive does, for `dvc plots show` and editors; commits nothing, tracks nothing.

    One callback; none in a git repository without a commit, where DVCLive cannot work.
    """
    from dvclive import Live  # type: ignore[attr-defined]
    from scmrepo.exceptions import SCMError
    from transformers.integrations import DVCLiveCallback

    try:
        return [DVCLiveCallback(Live(str(folder), save_dvc_exp=False, dvcyaml=None))]
    except SCMError as error:
        sys.stderr.write(f"DVCLive logs nothing ({error}); it begins with the first commit\n")
        return []
