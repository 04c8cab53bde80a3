"""A tensor is made when it is asked for: from sources and stages, and never twice for what it depends on."""

from __future__ import annotations

import functools
import threading
import time
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from mllm_edge.bundle.manifest import Manifest, Slot
from mllm_edge.bundle.sources import Constant, Labels
from mllm_edge.errors import BadInput
from mllm_edge.runtime.engines.interface import Array, Floats, lasting, settle
from mllm_edge.runtime.engines.lazy import LazyStage
from mllm_edge.runtime.sources import READERS, Held, constant
from mllm_edge.runtime.turn import InputPicture, Need, Rows, Turn
from mllm_edge.runtime.wiring import LOOP, dependencies, makers, needed_for, prompt_tensors, ready_ahead

CACHE_BYTES = 64 << 20  # about three pictures of a 7B bundle with masks, seven of one without

Key = tuple[Hashable, ...]


class Tensors:
    """Runs the stages that lead to a tensor. Safe to be called from two threads; one waits for the other."""

    def __init__(self, manifest: Manifest, stages: Mapping[str, LazyStage], held: Held):
        self._stages, self._held = stages, held
        self._sources = {source.name: source for source in manifest.sources if not isinstance(source, Labels)}
        self._entries, self._makers = manifest.stages, makers(manifest.stages)
        self._depends = dependencies(manifest.stages, manifest.sources)
        self._spliced = set(prompt_tensors(manifest.prompt, manifest.sources))
        # A tensor is kept where something that depends on more is made of it: another question may need it again.
        self._kept = self._spliced | {
            spec.name
            for entry in manifest.stages
            for spec in entry.inputs
            if self._depends.get(spec.name, {LOOP}) != self._depends[entry.outputs[0].name]
        }
        self._cache: OrderedDict[Key, Array] = OrderedDict()
        self._lock = threading.RLock()
        self._thread = ThreadPoolExecutor(1, "ahead")

    def need(self, turn: Turn, name: str) -> Array:
        """A tensor of this turn.

        Raises:
            BadInput: nothing gives it, or a source of it is missing in this turn.
            MllmEdgeError: a stage fails.
        """
        with self._lock:
            if name not in self._depends and name not in turn.values:
                raise BadInput(f"the bundle's stages give no {name}; export the bundle again")
            made: dict[str, Array] = {}
            found = self._get(turn, name, made)
            used = {key: array for tensor, array in made.items() if (key := self._key(turn, tensor)) in self._cache}
            self._forget(set(used))
            return found

    def bound(self, turn: Turn) -> Need:
        """`need` for a turn."""
        return functools.partial(self.need, turn)

    def ahead(self, turn: Turn, names: Iterable[str]) -> None:
        """Start to make what tensors are made of and what does not depend on the answer's states."""
        for name in ready_ahead(names, self._entries, self._depends):
            self._thread.submit(self.need, turn, name)

    def can_make(self, name: str) -> bool:
        """Whether a source or a stage gives a tensor."""
        return name in self._depends

    def depends_on(self, name: str) -> frozenset[str]:
        """The kinds of sources that a tensor depends on."""
        return self._depends.get(name, frozenset())

    def rows_of(self, name: str) -> int:
        """How many positions a tensor of a prompt takes, from its shape alone."""
        spec = next((spec for entry in self._entries for spec in entry.outputs if spec.name == name), None)
        if spec is None and isinstance(source := self._sources[name], Constant):
            return int(constant(source, self._held).shape[-2])
        assert spec is not None  # as the manifest's check says
        return next((size for size in spec.shape[-2:-1] if isinstance(size, int)), 0)

    def rows(self, slot: Slot, turn: Turn, pictures: Iterable[InputPicture]) -> list[Rows]:
        """What replaces the placeholders of a slot, in their order: one for each picture, for each box, or one."""
        if slot.of == "pixels":
            return [self._whole(slot, replace(turn, picture=picture)) for picture in pictures]
        if slot.of == "boxes":
            parts = [np.asarray(self.need(turn, name)) for name in slot.tensors] if turn.boxes else []  # [n,D] each
            keys = [self._rows_key(slot, replace(turn, boxes=[box])) for box in turn.boxes]
            return [Rows(key, np.stack([part[at] for part in parts]), slot.of) for at, key in enumerate(keys)]
        return [self._whole(slot, turn)]

    def _whole(self, slot: Slot, turn: Turn) -> Rows:
        parts = [np.asarray(self.need(turn, name)) for name in slot.tensors]  # [1,N,D] or [N,D] each
        embeds: Floats = np.concatenate([part.reshape(-1, part.shape[-1]) for part in parts]).astype(
            np.float32, copy=False
        )
        return Rows(self._rows_key(slot, turn), embeds, slot.of)

    def _rows_key(self, slot: Slot, turn: Turn) -> Key:
        return tuple(self._key(turn, name) for name in slot.tensors)

    def _key(self, turn: Turn, name: str) -> Key | None:
        """What a tensor depends on, with its name; None for one that is made anew each time."""
        depends = self._depends.get(name, frozenset([LOOP]))
        if depends & {"states", LOOP} or (turn.values and not self._made_of(name).isdisjoint(turn.values)):
            return None
        on = {
            "pixels": turn.picture and turn.picture.key,
            "boxes": tuple(turn.boxes),
            "text": turn.question,
            "task": turn.task,
        }
        return (name, *(on[kind] for kind in sorted(depends) if kind in on))

    def _made_of(self, name: str) -> set[str]:
        """A tensor, and all that it is made of."""
        above = needed_for([name], self._entries)
        return {name, *(spec.name for entry in self._entries if entry.name in above for spec in entry.inputs)}

    def _get(self, turn: Turn, name: str, made: dict[str, Array]) -> Array:
        if name in turn.values:
            return turn.values[name]
        if name in made:
            return made[name]
        key = self._key(turn, name)
        if key is not None and key in self._cache:
            self._cache.move_to_end(key)
            made[name] = self._cache[key]
            return made[name]
        if name in self._sources:
            source = self._sources[name]
            start = time.perf_counter()
            made[name] = READERS[source.kind](source, turn, self._held)
            if source.kind == "pixels":
                turn.add_time("preprocess", 1000 * (time.perf_counter() - start))
        elif name in self._makers:
            self._run(turn, name, made)
        else:
            raise BadInput(
                f"{name} is made in the course of an answer and was asked for before; export the bundle again"
            )
        if key is not None and name in self._kept:
            made[name] = self._cache[key] = lasting(made[name], on_host=name in self._spliced)
        return made[name]

    def _run(self, turn: Turn, name: str, made: dict[str, Array]) -> None:
        """Put the outputs of the stage that makes a tensor into `made`, and on the way all that they are made from."""
        entry = self._makers[name]
        inputs = {spec.name: self._get(turn, spec.name, made) for spec in entry.inputs}
        stage = self._stages[entry.name]
        stage.load()
        start = time.perf_counter()
        outputs = stage(**inputs)
        settle(outputs)
        turn.add_time(entry.name, 1000 * (time.perf_counter() - start))
        for output, array in outputs.items():
            key = self._key(turn, output)
            if key is not None and output in self._kept and output != name:
                array = self._cache[key] = lasting(array, on_host=output in self._spliced)
            made[output] = array

    def _forget(self, used: set[Key | None]) -> None:
        """Drop the tensors that were not used for longest, none of those that this turn used just now."""
        held = sum(array.nbytes for array in self._cache.values())
        for key in [key for key in self._cache if key not in used]:
            if held <= CACHE_BYTES:
                return
            held -= self._cache.pop(key).nbytes

    def close(self) -> None:
        """Wait for what was started ahead."""
        self._thread.shutdown()
