"""Training and fine-tuning by recipes: `train("llava-finetune", ["steps=100"])`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm_edge.errors import MissingPackage, look_up

if TYPE_CHECKING:
    from mllm_edge.recipes.recipe import Recipe
    from mllm_edge.recipes.trainer import Report, Task


def _task(recipe: Recipe) -> Task:
    from mllm_edge.recipes.tasks.encoder import EncoderTask
    from mllm_edge.recipes.tasks.glamm import GlammTask
    from mllm_edge.recipes.tasks.language import LanguageTask
    from mllm_edge.recipes.tasks.llava import LlavaTask
    from mllm_edge.recipes.tasks.naming import NamingTask
    from mllm_edge.recipes.tasks.sam import SamTask

    tasks: dict[str, Callable[[Recipe], Task]] = {
        "encoder": EncoderTask,
        "glamm": GlammTask,
        "language": LanguageTask,
        "naming": NamingTask,
        "sam": SamTask,
        "llava-pretrain": lambda r: LlavaTask(r, "pretrain"),
        "llava-finetune": lambda r: LlavaTask(r, "finetune"),
    }
    return look_up("task of a recipe", recipe.task, tasks)(recipe)


def train(recipe: str, overrides: list[str], resume: bool, report: Report) -> dict[str, Any]:
    """Run a recipe by name or YAML path.

    Args:
        recipe: a name from `available()` or the path of a YAML file.
        overrides: `key=value` settings that replace the recipe's.
        resume: resume from the last saved state.
        report: called with (step, steps, metrics).

    Returns:
        The run's report (the content of `report.json`) and `out`, its folder.

    Raises:
        BadInput: unknown recipe, key or value; missing parts; `out` is taken, or has nothing to resume from.
        MissingPackage: the `train` extra is not installed.
    """
    from mllm_edge.recipes.folder import begin
    from mllm_edge.recipes.recipe import load

    settings = load(recipe, overrides)
    begin(Path(settings.out), resume)
    try:
        from mllm_edge.recipes.trainer import run

        result = run(settings, _task(settings), resume, report)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("mllm_edge"):
            raise
        raise MissingPackage(error.name or "torch", "train") from None
    return {**result, "out": settings.out}
