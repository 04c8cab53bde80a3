"""What a run's report says of where it was made, and how long a run will take there."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mllm_edge.machine.facts import cpu_name
from mllm_edge.version import __version__

LONG = 2 * 3600  # seconds of training that are announced before they begin


def origin(device: torch.device) -> dict[str, Any]:
    """`machine`, `threads` and `commit` (of the checkout; of an installed package its version) for a report."""
    on_gpu = device.type == "cuda"
    return {
        "machine": torch.cuda.get_device_name(device) if on_gpu else cpu_name(),
        "threads": torch.get_num_threads(),
        "commit": _commit(),
    }


def _commit() -> str:
    """The commit of the checkout that holds this package, with "-dirty" where files were changed."""
    package = Path(__file__).parents[1]
    ours = ["git", "-C", str(package), "ls-files", "--error-unmatch", "__init__.py"]  # not a checkout around a venv
    described = ["git", "-C", str(package), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        for command in (ours, described):
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return f"mllm-edge {__version__}"
    return done.stdout.strip()


def seconds_per_step(accelerator: Any, model: nn.Module, task: Any, batch: int, accumulate: int, workers: int) -> float:
    """Seconds of an optimizer step on this machine, from the second of two rehearsals that change nothing.

    Args:
        accelerator: accelerate's, with `model` prepared by it.
        model: the task's model.
        task: gives the samples.
        batch: samples of a micro-batch.
        accumulate: micro-batches of a step.
        workers: processes that draw samples beside the training.
    """
    with torch.random.fork_rng():
        for _ in range(2):
            start = time.perf_counter()
            samples = task.collate([task.sample(index) for index in range(batch)])
            drawn = time.perf_counter()
            with accelerator.autocast():
                loss = model(**{name: value.to(accelerator.device) for name, value in samples.items()})["loss"]
            accelerator.backward(loss)
            loss.detach().item()  # waits for a GPU
            done = time.perf_counter()
    model.zero_grad()
    drawing, computing = drawn - start, done - drawn
    return accumulate * (max(drawing / workers, computing) if workers else drawing + computing)


def hours(seconds: float) -> str:
    """Such as "3 h 20 min"."""
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min"
