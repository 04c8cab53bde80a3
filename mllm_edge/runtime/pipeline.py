"""A question's way through the parts of a bundle: prompt, text, and what the answer holds beside text."""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple, cast

import numpy as np
from PIL import Image

from mllm_edge.bundle.answers import AnswerEntry, BoxesAnswer, PicturesAnswer, RetrievedAnswer
from mllm_edge.bundle.manifest import Manifest, Prompt, Slot
from mllm_edge.bundle.sources import Labels, States
from mllm_edge.errors import BadInput, MllmEdgeError
from mllm_edge.machine.facts import peak_rss
from mllm_edge.runtime import prompt as prompt_parts
from mllm_edge.runtime.answer import Answer, Part, Tokens
from mllm_edge.runtime.answers.decision import chances
from mllm_edge.runtime.answers.index import retrieving
from mllm_edge.runtime.answers.kinds import KINDS
from mllm_edge.runtime.answers.phrases import groups
from mllm_edge.runtime.asked import Asked, Counts, Images, completed
from mllm_edge.runtime.boxes import check_boxes
from mllm_edge.runtime.decoding.loop import Completion, Decoding, Loop, Script, Watch, script_keys, settings_for
from mllm_edge.runtime.decoding.rules import Rule, at_least, favored, group_members, never, one_box
from mllm_edge.runtime.decoding.sampling import check_seed, check_settings
from mllm_edge.runtime.decoding.tokenizers import named
from mllm_edge.runtime.engines.interface import Floats, LanguageModel
from mllm_edge.runtime.engines.lazy import LazyLanguageModel, LazyStage
from mllm_edge.runtime.images import ImageSource, load_image, pixel_hash
from mllm_edge.runtime.prompt import WORDS, Span, answer_parts, ids_of, render, render_raw, tokenized
from mllm_edge.runtime.sources import Held
from mllm_edge.runtime.tensors import Tensors
from mllm_edge.runtime.turn import InputPicture, Need, Ranking, Rows, Turn
from mllm_edge.runtime.wiring import answer_tensors


class Dialogue(NamedTuple):
    """What was read of a dialogue, and the picture that it looks at."""

    script: Script
    picture: InputPicture | None


class Done(NamedTuple):
    answer: Answer
    dialogue: Dialogue


class Pipeline:
    """The parts of one bundle, asked one question at a time."""

    def __init__(
        self,
        manifest: Manifest,
        stages: Mapping[str, LazyStage],
        language_model: LanguageModel,
        held: Held,
        load_ms: float,
    ):
        self.manifest, self._stages, self._language_model, self._load_ms = manifest, stages, language_model, load_ms
        self._entry = manifest.tokenizer(manifest.language_model.tokenizer)
        self.tokenizer = held.tokenizers[self._entry.name]
        self._tensors = Tensors(manifest, stages, held)
        self.close = self._tensors.close
        self._loop = Loop(language_model, self.tokenizer)
        self._states = [source for source in manifest.sources if isinstance(source, States)]
        self._ids = {token: self._token(token) for source in self._states for token in source.tokens}
        groups = manifest.generation.groups
        self._groups = {self._token(first): [self._token(one) for one in rest] for first, rest in groups.items()}
        # Once, and not after an answer, when the tokenizer may be busy: the end of an assistant's turn.
        self._after = ids_of(answer_parts(manifest.prompt)[1], self.tokenizer, self._entry.added)

    def _token(self, token: str) -> int:
        known = named(self.tokenizer)
        if token not in known:
            raise BadInput(f"the bundle's language model has no token {token}; export the bundle again")
        return known[token]

    def look(self, image: ImageSource) -> list[Floats]:
        """See `Model.look`."""
        picture = _pictures(image)
        turn = self._new_turn(Asked(""), picture[-1], {})
        slots = [slot for slot in self.manifest.prompt.slots if slot.of == "pixels"]
        return [rows.embeds for slot in slots for rows in self._tensors.rows(slot, turn, picture)]

    def prompt(self, asked: Asked) -> Script:
        """What the language model reads for a question that opens a dialogue."""
        return self._opening(asked)[1]

    def query(self, text: str) -> Floats:
        """See `Model.query`."""
        entry = retrieving(self.manifest)
        return np.asarray(self._of_group(text, entry.states)(entry.query), np.float32).reshape(-1)

    def decided(self, text: str) -> dict[str, float]:
        """See `Model.decided`."""
        for entry in self.manifest.answers:
            if isinstance(entry, (RetrievedAnswer, PicturesAnswer)) and entry.decision and entry.states:
                return chances(self._of_group(text, entry.states), entry.decision)
        raise BadInput(f"this bundle ({', '.join(self.manifest.tasks)}) does not decide how a picture is got")

    def _of_group(self, text: str, states: str) -> Need:
        """What makes the tensors of an answer that is one group of tokens of `states`, and nothing else."""
        tokens = next(source.tokens for source in self._states if source.name == states)
        forced = [self._ids[token] for token in tokens]
        turn, script = self._opening(Asked(text))
        positions = len(script_keys(script)) + len(forced)
        self._loop.fit(positions, 0, 1, self.manifest.language_model.context)
        for item in self._completions(script, self.decoding(False), turn, forced):
            if not isinstance(item, str):
                turn.ids, turn.states = item.kept, item.states
        if not self._alongside:
            self._loop.release()
        for _ in groups(turn, states):
            return self._tensors.bound(turn)
        raise MllmEdgeError(f"{', '.join(tokens)} are no whole group of {states}; export the bundle again")

    def _opening(self, asked: Asked) -> tuple[Turn, Script]:
        """A question that opens a dialogue, and what the language model reads of it."""
        pictures = _pictures(asked.images)
        asked = completed(asked, self.manifest, pictures[-1] if pictures else None)
        turn = self._new_turn(asked, pictures[-1] if pictures else None, {})
        parts = self._parts(asked, turn, _counts(asked, pictures), opening=True)
        return turn, self._script(parts, turn, pictures)

    def parts(self, asked: Asked) -> list[list[int] | Slot]:
        """The runs of ids and the slots of a question that opens a dialogue."""
        pictures = _pictures(asked.images)
        asked = completed(asked, self.manifest, pictures[-1] if pictures else None)
        turn = self._new_turn(asked, pictures[-1] if pictures else None, {})
        return self._parts(asked, turn, _counts(asked, pictures), opening=True)

    def decoding(self, raw: bool, seed: int = 0, stop: Sequence[str] | None = None, **given: float | None) -> Decoding:
        settings = settings_for(self.manifest.generation, **given)
        check_settings(settings)
        check_seed(seed)
        template, known = self.manifest.prompt, named(self.tokenizer)
        before, _ = answer_parts(template)
        alone = self.manifest.language_model.kind == "seq2seq"  # the answer is a text of its own
        strip = alone or (not raw and before != "" and before.isspace())
        added = frozenset(known[text] for text in self._entry.added if text in known)
        members = group_members(self._groups)
        rules = [never(members)] if members else []
        if settings.group_scale != 1:
            if not self._groups:
                raise BadInput(
                    f"group_scale is {settings.group_scale:g}, and this bundle has no tokens that others "
                    "follow, such as those of a picture; leave it out"
                )
            rules.append(favored(list(self._groups), settings.group_scale))
        if settings.min_tokens:
            ends = [token for token in range(self.tokenizer.vocabulary) if self.tokenizer.is_end(token)]
            rules.append(at_least(settings.min_tokens, [*ends, *self._groups]))
        stop = template.stop if stop is None else stop
        return Decoding(settings, seed, stop, strip, added, self._groups, rules, template.late_stop)

    def turn(self, dialogue: Dialogue, asked: Asked, decoding: Decoding) -> Iterator[str | Done]:
        """Read the dialogue and what is asked now, decode, and make the answer's other parts."""
        start = time.perf_counter()
        # 1. What is asked: pictures are read, boxes checked.
        pictures = _pictures(asked.images)
        timings = {"load": self._load_ms, "preprocess": 1000 * (time.perf_counter() - start)}
        timings |= dict.fromkeys(self._stages, 0.0)
        loaded = self._lazy_ms()
        picture = pictures[-1] if pictures else dialogue.picture
        asked = completed(asked, self.manifest, picture)
        turn = self._new_turn(asked, picture, timings)
        parts = self._parts(asked, turn, _counts(asked, pictures), opening=not dialogue.script)
        # 2. Whether it fits, before any picture is encoded or any position decoded.
        image_positions = _picture_rows(dialogue.script) + sum(self._size(p) for p in parts if _is_picture(p))
        positions = len(script_keys(dialogue.script)) + sum(map(self._size, parts))
        most = decoding.settings.max_tokens
        most = self._loop.fit(positions, image_positions, most, self.manifest.language_model.context)
        rules = [*decoding.rules, *self._task_rules(turn.task)]
        decoding = replace(decoding, settings=replace(decoding.settings, max_tokens=most), rules=rules)
        # 3. The prompt's embeddings, then the text.
        script = [*dialogue.script, *self._script(parts, turn, pictures)]
        for item in self._completions(script, decoding, turn, asked.answer):
            if isinstance(item, str):
                yield item
                continue
            # 4. What the answer holds beside text.
            turn.text, turn.ids, turn.strip, turn.states = item.text, item.kept, decoding.strip, item.states
            found = self._answers(turn)
            timings |= item.timings
            if (lazy := self._lazy_ms() - loaded) > 0:
                timings["lazy_load"] = lazy
            timings["total"] = 1000 * (time.perf_counter() - start)
            tokens = Tokens(positions, image_positions, len(item.ids), item.ids)
            memory = {"peak_rss": peak_rss(), "peak_device": None}
            image = turn.picture.image if turn.picture else None
            following = Dialogue([*script, self._closed(item)], turn.picture)
            yield Done(Answer(item.text, tokens, timings, memory, found, image, turn.task, turn.tags), following)

    def _new_turn(self, asked: Asked, picture: InputPicture | None, timings: dict[str, float]) -> Turn:
        if asked.drawing.index is not None:
            asked.drawing.index.check(self.manifest)
        given = None if asked.boxes is None else [tuple(box) for box in asked.boxes]
        if given and picture is None and self.manifest.prompt.slots_of("boxes"):
            raise BadInput("boxes were given but no picture; give the picture that they are of")
        turn = Turn(
            question=asked.text,
            picture=picture,
            tokenizer=self.tokenizer,
            boxes=check_boxes(given, picture.image.size) if given and picture else [],
            task=asked.task,
            tags=None if asked.tags is None else list(asked.tags),
            drawing=asked.drawing,
            timings=timings,
            marks={source.name: source.tokens for source in self._states},
            added=self._entry.added,
            inputs={stage.name: stage.inputs for stage in self.manifest.stages},
        )
        for entry in self.manifest.answers:
            if isinstance(entry, RetrievedAnswer) and entry.picture:
                turn.ranking = Ranking(entry.states, entry.query, partial(self._embedded, turn, entry.picture))
        return turn

    def _embedded(self, turn: Turn, tensor: str, image: Image.Image) -> Floats:
        """The vector [d] that stands for a picture."""
        apart = replace(turn, picture=InputPicture(pixel_hash(image), image), values={})
        return np.asarray(self._tensors.need(apart, tensor), np.float32).reshape(-1)

    def _task_rules(self, task: str) -> list[Rule]:
        """What an answer may be in a task."""
        found = [entry for entry in self.manifest.answers if isinstance(entry, BoxesAnswer) and task in entry.tasks]
        if not found:
            return []
        number = range(self.tokenizer.vocabulary)
        pieces = [self.tokenizer.piece(token).decode("utf-8", "replace") for token in number]
        return [one_box(pieces, [t for t in number if self.tokenizer.is_end(t)], entry.decimals) for entry in found]

    def _lazy_ms(self) -> float:
        return sum(stage.load_ms for stage in self._stages.values())

    def _parts(self, asked: Asked, turn: Turn, counts: Counts, opening: bool) -> list[list[int] | Slot]:
        """Runs of ids and slots, with BOS in front where a dialogue opens (once, even if a raw prompt spells it)."""
        template, lead = self.manifest.prompt, self._entry.lead
        spans: list[prompt_parts.Part]
        if asked.raw:
            spans = render_raw(template, asked.text, counts, lead)
        else:
            template, fields = self._labeled(turn)
            spans = render(template, asked.text, counts, first=opening, lead=lead, fields=fields)
        parts = tokenized(spans, self.tokenizer, self._entry.added)
        runs, bos = [part for part in parts if isinstance(part, list)], self.tokenizer.bos
        first = next((run for run in runs if run), runs[-1]) if template.bos_with_text else runs[0]
        if opening and bos is not None and first[:1] != [bos]:
            first.insert(0, bos)
        if not any(runs):
            raise BadInput("the prompt is empty; ask something")
        return parts

    def _labeled(self, turn: Turn) -> tuple[Prompt, dict[str, str]]:
        """The template, without what goes around words that nothing gives, and its words by their fields: what the user
        says, else what a tensor becomes."""
        template, found = self.manifest.prompt, {}
        for source in self.manifest.sources:
            if not isinstance(source, Labels):
                continue
            if turn.tags is None and self._tensors.can_make(source.tensor):
                values = np.asarray(self._tensors.need(turn, source.tensor)).reshape(-1)
                turn.tags = [n for n, value, least in zip(source.names, values, source.thresholds) if value > least]
            if turn.tags is None:
                first, following = (text.replace(source.around, "") for text in (template.first, template.next))
                template = replace(template, first=first, next=following)
            else:
                found[source.field] = source.joint.join(turn.tags)
        return template, found

    def _size(self, part: list[int] | Slot) -> int:
        """Positions that a part of a prompt takes."""
        if isinstance(part, list):
            return len(part)
        return len(part.tensors) if part.of == "boxes" else sum(map(self._tensors.rows_of, part.tensors))

    def _script(self, parts: Sequence[list[int] | Slot], turn: Turn, pictures: Sequence[InputPicture]) -> Script:
        """The runs of ids with rows of embeddings in the place of slots."""
        slots = {part.placeholder: part for part in parts if isinstance(part, Slot)}
        # In turn; a constant may stand in several places.
        rows = {name: itertools.cycle(self._tensors.rows(slot, turn, pictures)) for name, slot in slots.items()}
        return [part if isinstance(part, list) else next(rows[part.placeholder]) for part in parts]

    def _completions(
        self, script: Script, decoding: Decoding, turn: Turn, given: str | Sequence[int] | None
    ) -> Iterator[str | Completion]:
        before, at = (
            {self._ids[t]: s.name for s in self._states if s.at == place for t in s.tokens}
            for place in ("before", "token")
        )
        watch = Watch(before, at, lambda name: self._found(turn, name))
        if given is None:
            yield from self._loop.stream(script, decoding, watch)
            return
        if not self._states:
            raise BadInput(
                "this bundle answers with text alone, so there is nothing to force an answer for; ask it freely"
            )
        if isinstance(given, str):
            if placeholders := [slot.placeholder for slot in self.manifest.prompt.slots if slot.placeholder in given]:
                named = ", ".join(placeholders)
                raise BadInput(f"the forced answer has {named}, which only a question can have; leave it out")
            opening, _ = answer_parts(self.manifest.prompt)
            # As the rest of the whole turn: no space of its own before it.
            span = Span(opening + given, True, continues=self.manifest.prompt.first)
            forced = tokenized([span], self.tokenizer, self._entry.added)
            given = cast("list[int]", forced[0])
        given = [int(token) for token in given]
        if any(not 0 <= token < self._language_model.vocabulary for token in given):
            raise BadInput("the forced answer has an unknown token id; leave it out")
        if not set(given) & {*before, *at}:
            tokens = " or ".join(self._ids)
            raise BadInput(f"the forced answer has no {tokens}; put one where it belongs")
        yield self._loop.forced(script, given, decoding, watch)

    @property
    def _alongside(self) -> bool:
        """Whether other stages and the language model may be in memory together."""
        return not isinstance(self._language_model, LazyLanguageModel)

    def _found(self, turn: Turn, name: str) -> None:
        """A token came whose state `name` is: what its answers need of the picture is started."""
        if self._alongside and turn.picture is not None:
            for entry in self.manifest.answers:
                if getattr(entry, "states", None) == name:
                    self._tensors.ahead(turn, answer_tensors(entry, self.manifest.stages))

    def _answers(self, turn: Turn) -> list[Part]:
        """The answer's parts beside text, in the order of their places in it."""
        parts: list[Part] = []
        for entry in self.manifest.answers:
            if (states := getattr(entry, "states", "")) and not turn.states.get(states):
                continue
            if self._lacks_picture(entry, turn):
                count, tokens = len(turn.states[states]), " or ".join(turn.marks[states])
                warnings.warn(
                    f"the answer has {count} {tokens} but there is no picture that its {entry.kind} could be of",
                    RuntimeWarning,
                    stacklevel=2,
                )
                continue
            if not self._alongside:
                self._loop.release()
            parts += KINDS[entry.kind](turn, entry, self._tensors.bound(turn))
        return sorted(parts, key=lambda part: part.span[0])

    def _lacks_picture(self, entry: AnswerEntry, turn: Turn) -> bool:
        needed = answer_tensors(entry, self.manifest.stages)
        return turn.picture is None and any("pixels" in self._tensors.depends_on(name) for name in needed)

    def _closed(self, completion: Completion) -> list[int]:
        """The answer's ids, closed as the template closes an assistant's turn."""
        _, after = answer_parts(self.manifest.prompt)
        if completion.tail and completion.tail == after:
            return completion.ids  # the model closed it itself, token by token
        if not completion.rest:
            return completion.kept + self._after
        ending = [Span(completion.rest, False, continues=WORDS), Span(after, True)]
        (run,) = tokenized(ending, self.tokenizer, self._entry.added)
        return completion.kept + cast("list[int]", run)


def _pictures(image: Images) -> list[InputPicture]:
    if image is None:
        return []
    many = image if isinstance(image, (list, tuple)) else [image]
    loaded = [load_image(one) for one in cast("Sequence[ImageSource]", many)]
    return [InputPicture(pixel_hash(one), one) for one in loaded]


def _is_picture(part: list[int] | Slot) -> bool:
    return isinstance(part, Slot) and part.of == "pixels"


def _picture_rows(script: Script) -> int:
    """Positions of pictures; a box's row stands alone."""
    return sum(len(part.embeds) for part in script if isinstance(part, Rows) and part.of == "pixels")


def _counts(asked: Asked, pictures: Sequence[InputPicture]) -> Counts:
    return {"pixels": len(pictures), "boxes": len(asked.boxes or [])}
