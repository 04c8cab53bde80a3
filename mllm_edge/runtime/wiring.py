"""What follows from a manifest's wiring alone: pure functions over tensor names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from mllm_edge.bundle.answers import AnswerEntry, MasksAnswer, PicturesAnswer, RetrievedAnswer
from mllm_edge.bundle.manifest import Prompt, TensorSpec
from mllm_edge.bundle.sources import Labels, Source

LOOP = "loop"  # what a tensor depends on that a kind of answer makes anew in each step


class Wired(Protocol):
    """What has named inputs and outputs: a bundle's stage, or one that is to be exported."""

    @property
    def name(self) -> str: ...
    @property
    def inputs(self) -> list[TensorSpec]: ...
    @property
    def outputs(self) -> list[TensorSpec]: ...


def makers(stages: Iterable[Wired]) -> dict[str, Wired]:
    """The stage that makes each tensor."""
    return {spec.name: stage for stage in stages for spec in stage.outputs}


def needed_for(tensors: Iterable[str], stages: Sequence[Wired]) -> set[str]:
    """Names of the stages that make these tensors."""
    made_by, waiting, found = makers(stages), list(tensors), set[str]()
    while waiting:
        stage = made_by.get(waiting.pop())
        if stage is not None and stage.name not in found:
            found.add(stage.name)
            waiting += [spec.name for spec in stage.inputs]
    return found


def dependencies(stages: Sequence[Wired], sources: Sequence[Source]) -> dict[str, frozenset[str]]:
    """Each tensor with the kinds of sources that it depends on; stages stand in the order in which they can run."""
    found: dict[str, frozenset[str]] = {}
    for source in sources:
        if not isinstance(source, Labels):
            found[source.name] = frozenset([source.kind])
    for stage in stages:
        together = frozenset[str]().union(*(found.get(spec.name, frozenset([LOOP])) for spec in stage.inputs))
        found |= {spec.name: together for spec in stage.outputs}
    return found


def prompt_tensors(prompt: Prompt, sources: Sequence[Source]) -> list[str]:
    """Tensors that a prompt may be made of."""
    words = [source.tensor for source in sources if isinstance(source, Labels)]
    return [*(name for slot in prompt.slots for name in slot.tensors), *words]


def taggers(
    prompt: Prompt, answers: Iterable[AnswerEntry], stages: Sequence[Wired], sources: Sequence[Source]
) -> set[str]:
    """Names of the stages that serve only the words of `Labels`."""
    words = [source.tensor for source in sources if isinstance(source, Labels)]
    others = [name for slot in prompt.slots for name in slot.tensors]
    others += [name for entry in answers for name in answer_tensors(entry, stages)]
    return needed_for(words, stages) - needed_for(others, stages)


def answer_tensors(entry: AnswerEntry, stages: Sequence[Wired]) -> list[str]:
    """Tensors that an answer is made of, without those that change in its loop."""
    if isinstance(entry, MasksAnswer):
        return [entry.logits]
    if isinstance(entry, RetrievedAnswer):
        return [name for name in (entry.query, entry.decision) if name]
    if isinstance(entry, PicturesAnswer):
        loop = {entry.latent, entry.timestep}
        read = [spec.name for stage in stages if stage.name == entry.unet for spec in stage.inputs]
        return [name for name in (*read, entry.decision) if name and name not in loop]
    return []


def ready_ahead(tensors: Iterable[str], stages: Sequence[Wired], depends: dict[str, frozenset[str]]) -> list[str]:
    """What stages make for these tensors without states: it can be made while text is still generated."""
    made_by, waiting, found = makers(stages), list(tensors), dict[str, None]()
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        stage = made_by.get(name)
        if stage is None or name in seen:
            continue
        seen.add(name)
        if not depends[name] & {"states", LOOP}:
            found[name] = None
        else:
            waiting += [spec.name for spec in stage.inputs]
    return list(found)
