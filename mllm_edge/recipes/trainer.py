"""The training loop: accelerate handles devices, processes, precision and state; this file the schedule and the log."""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import platform
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from mllm_edge.errors import BadInput, MllmEdgeError, first_line
from mllm_edge.places import writing
from mllm_edge.recipes import folder
from mllm_edge.recipes.origin import LONG, hours, origin, seconds_per_step
from mllm_edge.recipes.recipe import Recipe

MANY = 50  # steps from which on a run's length is worth two rehearsals

Batch = dict[str, Tensor]
Report = Callable[[int, int, dict[str, float]], None]


class Task(Protocol):
    """A training task. `model(**batch)` returns a dict with the scalar `loss` and further scalars to log.

    `sample(i)` depends only on `i` and the recipe, so that a resumed run gets the same data.
    """

    @property
    def model(self) -> nn.Module: ...

    def parameters(self) -> list[dict[str, Any]]:
        """AdamW parameter groups."""
        ...

    def sample(self, index: int) -> Any:
        """The training sample number `index`."""
        ...

    def collate(self, samples: Sequence[Any]) -> Batch:
        """Stack samples into tensors."""
        ...

    def evaluate(self, samples: int) -> dict[str, float]:
        """Metrics on held-out data."""
        ...

    def save(self, folder: Path, state: dict[str, Tensor]) -> None:
        """Write the trained part for later recipes and export."""
        ...


class _Samples(Dataset[Any]):
    """The samples of the remaining steps, in order."""

    def __init__(self, task: Task, start: int, stop: int):
        self.task, self.start, self.stop = task, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int) -> Any:
        return self.task.sample(self.start + index)


def schedule(step: int, steps: int, warmup: float) -> float:
    """Learning-rate factor of optimizer step `step`: linear warm-up over `warmup * steps`, then cosine to zero."""
    rising = max(1, math.ceil(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def native_bf16() -> bool:
    """Whether this machine multiplies bf16 in hardware (CUDA since Ampere, x86 with AVX512-BF16 or AMX)."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(probe and probe())


def run(recipe: Recipe, task: Task, resume: bool, report: Report) -> dict[str, Any]:
    """Train `task` as `recipe` says and save it under `recipe.out`.

    Writes `log.jsonl` (a line per `log_every` steps), `loss.png`, `state/` (to resume from), the task's weights and
    `report.json`.

    Args:
        recipe: the settings; `folder.begin` has taken `recipe.out`.
        task: the task to train.
        resume: resume from `state/`, with the same losses as an uninterrupted run.
        report: called with (step, steps, metrics) during training.

    Returns:
        The content of `report.json`: seed, steps, seconds, metrics.

    Raises:
        BadInput: a batch that does not divide over processes and accumulation.
        MllmEdgeError: the loss became NaN or infinite.
    """
    if recipe.precision not in ("auto", "fp32", "bf16"):
        raise BadInput(f"precision {recipe.precision!r} is not known; use auto, fp32 or bf16")
    # 1. The machine: precision, processes, accumulation.
    _keep_memory()
    bf16 = recipe.precision == "bf16" or (recipe.precision == "auto" and native_bf16())
    accelerator = Accelerator(
        mixed_precision="bf16" if bf16 else "no", gradient_accumulation_steps=recipe.accumulate, cpu=not _has_gpu()
    )
    share = accelerator.num_processes * recipe.accumulate
    if recipe.batch % share:
        raise BadInput(f"batch {recipe.batch} does not divide by processes x accumulate = {share}; change it")
    # 2. What is trained, and by what.
    set_seed(recipe.seed)
    out = Path(recipe.out)
    optimizer = torch.optim.AdamW(task.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: schedule(s, recipe.steps, recipe.warmup))
    model, optimizer = accelerator.prepare(task.model, optimizer)
    accelerator.register_for_checkpointing(scheduler)
    # 3. Where an earlier run stopped, and the samples after it.
    progress = Progress(accelerator, out)
    if resume:
        progress.restore()
    elif accelerator.is_main_process:
        progress.log.write_text("")
    _announce(accelerator, model, task, recipe, progress.step, share)
    batches = accelerator.prepare(
        DataLoader(
            _Samples(task, progress.step * recipe.batch, recipe.steps * recipe.batch),
            batch_size=recipe.batch // share,
            collate_fn=task.collate,
            num_workers=recipe.workers,
        )
    )
    # 4. Steps, logged and saved.
    model.train()
    for metrics in _steps(accelerator, model, optimizer, scheduler, batches, recipe):
        progress.step += 1
        last = progress.step == recipe.steps
        if progress.step % recipe.log_every == 0 or last or progress.step == 1:
            metrics["lr"] = float(scheduler.get_last_lr()[0])
            if not math.isfinite(metrics["loss"]):
                raise MllmEdgeError(f"the loss is {metrics['loss']} at step {progress.step}; lower lr and resume")
            progress.write(metrics)
            report(progress.step, recipe.steps, metrics)
        if progress.step % recipe.save_every == 0 or last:
            progress.save()
    return _finish(accelerator, model, task, recipe, progress, bf16)


def _announce(accelerator: Accelerator, model: nn.Module, task: Task, recipe: Recipe, step: int, share: int) -> None:
    """Warn before a run that takes long on this machine."""
    left, batch = recipe.steps - step, recipe.batch // share
    if left < MANY:
        return
    expected = left * seconds_per_step(accelerator, model, task, batch, recipe.accumulate, recipe.workers)
    if expected > LONG and accelerator.is_main_process:
        warnings.warn(
            f"{left} steps take about {hours(expected)} on this machine; stop at any time and go on with --resume",
            RuntimeWarning,
            stacklevel=2,
        )


def _keep_memory() -> None:
    """Let glibc keep freed memory: on a CPU, remapping the activations costs a tenth of each step or more."""
    if platform.libc_ver()[0] == "glibc" and not _has_gpu():
        libc = ctypes.CDLL(None)
        libc.mallopt(ctypes.c_int(-4), ctypes.c_int(0))  # M_MMAP_MAX: no separate mappings
        libc.mallopt(ctypes.c_int(-1), ctypes.c_int(2**31 - 1))  # M_TRIM_THRESHOLD: never return memory


def _has_gpu() -> bool:
    return torch.cuda.is_available()


def _steps(
    accelerator: Accelerator, model: nn.Module, optimizer: Any, scheduler: Any, batches: Iterable[Batch], recipe: Recipe
) -> Iterable[dict[str, float]]:
    """Yield the metrics of each optimizer step, averaged over its accumulated micro-batches.

    Each micro-batch weighs the same, whatever its number of labels (as in the original scripts).
    """
    totals: dict[str, Tensor] = {}
    for number, batch in enumerate(batches, start=1):
        with accelerator.accumulate(model):
            result: dict[str, Tensor] = model(**batch)
            accelerator.backward(result["loss"])
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.step()
            optimizer.zero_grad()
        for name, value in result.items():
            totals[name] = totals.get(name, torch.zeros((), device=value.device)) + value.detach().float()
        if number % recipe.accumulate == 0:
            scheduler.step()
            mean = {name: value / recipe.accumulate for name, value in totals.items()}
            yield {name: float(accelerator.reduce(value, "mean")) for name, value in mean.items()}
            totals = {}


class Progress:
    """Progress of a run on disk: step, seconds so far, log and resumable state."""

    def __init__(self, accelerator: Accelerator, out: Path):
        self.accelerator, self.out = accelerator, out
        self.log = out / "log.jsonl"
        self.step = 0
        self.before = 0.0
        self.started = time.perf_counter()
        accelerator.register_for_checkpointing(self)

    @property
    def seconds(self) -> float:
        """Training time so far in seconds, earlier parts of a resumed run included."""
        return self.before + time.perf_counter() - self.started

    def state_dict(self) -> dict[str, float]:
        """Saved by accelerate beside the model."""
        return {"step": self.step, "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restored by accelerate."""
        self.step, self.before = int(state["step"]), state["seconds"]

    def write(self, metrics: dict[str, float]) -> None:
        """Append a line to the log."""
        if self.accelerator.is_main_process:
            line = {"step": self.step, "seconds": round(self.seconds, 2)}
            line |= {name: round(value, 6) for name, value in metrics.items()}
            with self.log.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")

    def save(self) -> None:
        """Save the state so that a kill, whenever it comes, loses only the steps since the last save."""
        if self.accelerator.is_main_process:
            folder.fresh_state(self.out)
        self.accelerator.wait_for_everyone()
        with writing(self.out), _one_line(self.out, self.step):
            self.accelerator.save_state(str(self.out / "state.new"))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            folder.keep_state(self.out)
        self.accelerator.wait_for_everyone()

    def restore(self) -> None:
        """Load the last state and drop log lines after its step."""
        self.accelerator.load_state(str(folder.last_state(self.out)))
        if self.accelerator.is_main_process:
            lines = [line for line in self.log.read_text(encoding="utf-8").splitlines() if line]
            kept = [line for line in lines if json.loads(line)["step"] <= self.step]
            folder.replace_text(self.log, "".join(line + "\n" for line in kept))


@contextlib.contextmanager
def _one_line(out: Path, step: int) -> Iterator[None]:
    """PyTorch and safetensors have errors of their own where a disk is full or a folder cannot be written."""
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        raise MllmEdgeError(
            f"{out}: the state of step {step} could not be written ({first_line(error)}); is the disk full? The state "
            "before it is kept, go on with --resume"
        ) from error


def _finish(
    accelerator: Accelerator, model: nn.Module, task: Task, recipe: Recipe, progress: Progress, bf16: bool
) -> dict[str, Any]:
    state = accelerator.get_state_dict(model)
    result: dict[str, Any] = {}
    if accelerator.is_main_process:
        from mllm_edge.recipes.plot import draw_losses

        seconds = progress.seconds
        with writing(progress.out), _one_line(progress.out, progress.step):
            task.save(progress.out, state)
        accelerator.unwrap_model(model).eval()
        result = {
            "task": recipe.task,
            "config": recipe.config,
            "seed": recipe.seed,
            "steps": recipe.steps,
            "batch": recipe.batch,
            "lr": recipe.lr,
            "precision": "bf16" if bf16 else "fp32",
            "device": str(accelerator.device),
            "processes": accelerator.num_processes,
            **origin(accelerator.device),
            "seconds": round(seconds, 1),
            "metrics": task.evaluate(recipe.evaluate) if recipe.evaluate else {},
        }
        (progress.out / "report.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        draw_losses(progress.log, progress.out / "loss.png", title=f"{recipe.task} ({recipe.config})")
    accelerator.wait_for_everyone()
    return result
