"""Training and fine-tuning by recipes: `train("llava-finetune", ["steps=100"])`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm_edge.errors import BadInput, MissingPackage, look_up

if TYPE_CHECKING:
    from mllm_edge.recipes.recipe import Recipe
    from mllm_edge.recipes.trainer import Report, Task


# Settings that only some tasks read
FOR_SOME = {
    "connector_lr": ("llava-pretrain", "llava-finetune", "glamm"),
    "lora": ("llava-finetune", "glamm"),
    "connector": ("llava-pretrain", "llava-finetune"),
    "tokens": ("llava-pretrain", "llava-finetune"),
}


class Watched(dict[str, Any]):
    """A recipe's `init` or `data`, which knows what was looked up, so that nothing is ignored in silence."""

    def __init__(self, settings: dict[str, Any]):
        super().__init__(settings)
        self._read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self._read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self._read.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self._read.add(str(key))
        return super().__contains__(key)

    def unread(self) -> list[str]:
        """The keys with a value that nothing asked for."""
        return [key for key, value in self.items() if value not in (None, "") and key not in self._read]


def _task(recipe: Recipe) -> Task:
    from mllm_edge.recipes.tasks.diffusion import DiffusionTask
    from mllm_edge.recipes.tasks.encoder import EncoderTask
    from mllm_edge.recipes.tasks.gill import GillTask
    from mllm_edge.recipes.tasks.gill_decision import GillDecisionTask
    from mllm_edge.recipes.tasks.gill_encoder import GillEncoderTask
    from mllm_edge.recipes.tasks.gill_language import GillLanguageTask
    from mllm_edge.recipes.tasks.glamm import GlammTask
    from mllm_edge.recipes.tasks.language import LanguageTask
    from mllm_edge.recipes.tasks.lion import LionTask
    from mllm_edge.recipes.tasks.lion_align import LionAlignTask
    from mllm_edge.recipes.tasks.lion_language import LionLanguageTask
    from mllm_edge.recipes.tasks.llava import LlavaTask
    from mllm_edge.recipes.tasks.naming import NamingTask
    from mllm_edge.recipes.tasks.sam import SamTask
    from mllm_edge.recipes.tasks.scene_classifier import SceneClassifierTask
    from mllm_edge.recipes.tasks.tagger import TaggerTask
    from mllm_edge.recipes.tasks.vae import VaeTask

    tasks: dict[str, Callable[[Recipe], Task]] = {
        "diffusion": DiffusionTask,
        "encoder": EncoderTask,
        "gill": GillTask,
        "gill-decision": GillDecisionTask,
        "gill-encoder": GillEncoderTask,
        "gill-language": GillLanguageTask,
        "glamm": GlammTask,
        "language": LanguageTask,
        "lion-align": LionAlignTask,
        "lion-language": LionLanguageTask,
        "lion-stage1": lambda r: LionTask(r, 1),
        "lion-stage2": lambda r: LionTask(r, 2),
        "lion-stage3": lambda r: LionTask(r, 3),
        "naming": NamingTask,
        "sam": SamTask,
        "scene-classifier": SceneClassifierTask,
        "tagger": TaggerTask,
        "vae": VaeTask,
        "llava-pretrain": lambda r: LlavaTask(r, "pretrain"),
        "llava-finetune": lambda r: LlavaTask(r, "finetune"),
    }
    make = look_up("task of a recipe", recipe.task, tasks)
    for setting, users in FOR_SOME.items():
        if getattr(recipe, setting) and recipe.task not in users:
            raise BadInput(f"{setting} changes nothing in the task {recipe.task}; remove it")
    init, data = Watched(recipe.init), Watched(recipe.data)
    task = make(dataclasses.replace(recipe, init=init, data=data))
    for place, settings in (("init", init), ("data", data)):
        for key in settings.unread():
            raise BadInput(f"{place}.{key} changes nothing here; correct its name, or remove it ({place}.{key}=)")
    return task


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
