"""The model that the Python API and the command line talk to, and its dialogues."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, TypedDict, cast

from PIL import Image

from mllm_edge.bundle.manifest import Manifest
from mllm_edge.errors import BadInput
from mllm_edge.machine.facts import peak_rss
from mllm_edge.runtime.answer import Answer, Tokens
from mllm_edge.runtime.answers.masks import LOGITS, SEG, Grounding, MaskWork
from mllm_edge.runtime.boxes import Box, check_boxes
from mllm_edge.runtime.decoding.loop import (
    Completion,
    Decoding,
    Script,
    TextPipeline,
    script_embeds,
    script_keys,
    settings_for,
)
from mllm_edge.runtime.decoding.sampling import check_settings
from mllm_edge.runtime.engines.interface import Floats, LanguageModel
from mllm_edge.runtime.engines.lazy import LazyStage
from mllm_edge.runtime.images import ImageSource, load_image
from mllm_edge.runtime.memory import Residence
from mllm_edge.runtime.prompt import BOX_SLOT, Piece, Span, answer_parts, piece_ids, render, render_raw
from mllm_edge.runtime.tensors import ImageEncoder, Picture, Region

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

Images = ImageSource | Sequence[ImageSource] | None
Boxes = Sequence[Sequence[float]] | None


class DecodingOptions(TypedDict, total=False):
    """How to decode; what is not given, or None, is the bundle's default.

    Attributes:
        max_tokens: most tokens to generate.
        temperature: 0 is greedy.
        top_p: keep the likeliest tokens up to this probability; 1 is off.
        top_k: keep this many of the likeliest tokens; 0 is off.
        repeat_penalty: above 1 discourages tokens that were just generated.
        seed: the same seed gives the same answer.
        stop: strings that end the answer, instead of the template's.
    """

    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    repeat_penalty: float | None
    seed: int
    stop: Sequence[str] | None


class Model:
    """A loaded bundle. Not thread-safe: it holds one KV cache, and one answer is decoded at a time.

    Attributes:
        manifest: what `bundle.json` says.
        stages: stages by name; one that not every question needs is loaded by the first that does.
        language_model: the stage that steps.
        load_ms: milliseconds that loading took.
        residence: which parts stay in memory.
        target: where it runs: "cpu", "cuda", "trt" or "ort-rtx".
    """

    def __init__(
        self,
        manifest: Manifest,
        stages: dict[str, LazyStage],
        language_model: LanguageModel,
        load_ms: float,
        opened: contextlib.ExitStack,
        residence: Residence,
        target: str,
    ):
        self.residence, self.target = residence, target
        self.manifest, self.stages, self.language_model, self.load_ms = manifest, stages, language_model, load_ms
        self._encoder = ImageEncoder(manifest, stages)
        self._pipeline = TextPipeline(language_model)
        self.opened = opened
        self._grounding: Grounding | None = None
        if any(spec.name == LOGITS for stage in manifest.stages for spec in stage.outputs):
            self._grounding = Grounding(manifest, stages, self._encoder, language_model)
            opened.callback(self._grounding.close)

    @property
    def gives_masks(self) -> bool:
        """Whether answers may have masks."""
        return self._grounding is not None

    def generate(
        self,
        prompt: str,
        image: Images = None,
        boxes: Boxes = None,
        *,
        raw: bool = False,
        teacher_forced: str | Sequence[int] | None = None,
        **options: Unpack[DecodingOptions],
    ) -> Answer:
        """Answer a question about any number of pictures.

        Args:
            prompt: the question. Each `<image>` in it takes one picture; without any, pictures go to the front. Each
                placeholder of a region (`<bbox>`) takes one box.
            image: a path, the bytes of a file, a PIL image, a uint8 array [H,W,3], or a list of these.
            boxes: x1,y1,x2,y2 each, in pixels of the last picture.
            raw: `prompt` is the whole text, placeholders and control strings included; no template, no system text.
            teacher_forced: an answer with [SEG], as text or ids, whose masks are wanted; nothing is generated.
            **options: see `DecodingOptions`.

        Raises:
            BadInput: an unusable picture, box or option, placeholders that do not go with pictures or boxes, or a
                prompt that is longer than the context.
        """
        return _last(self.stream(prompt, image, boxes, raw=raw, teacher_forced=teacher_forced, **options))

    def stream(
        self,
        prompt: str,
        image: Images = None,
        boxes: Boxes = None,
        *,
        raw: bool = False,
        teacher_forced: str | Sequence[int] | None = None,
        **options: Unpack[DecodingOptions],
    ) -> Iterator[str | Answer]:
        """Like `generate`, in pieces: strings of whole characters, then the `Answer` as the last item."""
        decoding = self._decoding(raw, **options)
        turn = self._turn(
            [], image, boxes, lambda *counts: self._pieces(prompt, raw, *counts), decoding, teacher_forced
        )
        for item in turn:
            yield item if isinstance(item, str) else item.answer

    def chat(self, **options: Unpack[DecodingOptions]) -> Chat:
        """A dialogue of several turns, each decoded with `options`. Pictures are read once."""
        return Chat(self, self._decoding(False, **options))

    def encode_image(self, image: ImageSource) -> Floats:
        """A picture's embeddings in the language model's space, float32 [N,D], cached by its pixels."""
        return self._encoder.encode(load_image(image), {}).embeds

    def tokenize(self, text: str) -> list[int]:
        """Ids of a piece of text, without BOS; control strings count as text."""
        return self.language_model.tokenize(text)

    def prompt_embeds(self, prompt: str, image: Images = None, *, raw: bool = False) -> Floats:
        """What the language model reads for a prompt, float32 [T,D], BOS and pictures included."""
        pictures = _pictures(image)
        ids = self._ids(self._pieces(prompt, raw, len(pictures), 0), opening=True)
        return script_embeds(self._script(ids, pictures, [], [], {}), self.language_model)

    def close(self) -> None:
        """Free every engine. A second call does nothing."""
        self.opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _decoding(self, raw: bool, seed: int = 0, stop: Sequence[str] | None = None, **given: float | None) -> Decoding:
        settings = settings_for(self.manifest.generation, **given)
        check_settings(settings)
        template = self.manifest.prompt
        before, _ = answer_parts(template)
        strip = not raw and before != "" and before.isspace()
        control = self.language_model.control_tokens
        added = frozenset(control[text] for text in template.added if text in control)
        return Decoding(settings, seed, template.stop if stop is None else stop, strip, added)

    def _turn(
        self,
        history: Script,
        image: Images,
        boxes: Boxes,
        cut: Callable[[int, int], list[Piece]],
        decoding: Decoding,
        teacher_forced: str | Sequence[int] | None = None,
    ) -> Iterator[str | _Turn]:
        """Read `history` and a new turn, then decode. `cut` gives the turn's pieces for a number of pictures and one of
        boxes."""
        start = time.perf_counter()
        boxes = None if boxes is None else [tuple(box) for box in boxes]
        pictures = _pictures(image)
        loaded = self._late_ms()
        timings = {"load": self.load_ms, "preprocess": 1000 * (time.perf_counter() - start)}
        timings |= dict.fromkeys(self.stages, 0.0)
        ids = self._ids(cut(len(pictures), len(boxes or [])), opening=not history)
        looked_at = pictures[-1] if pictures else _last_picture(history)
        regions = check_boxes(boxes, _image_of(looked_at).size) if boxes else []
        image_positions = self._encoder.positions * len(pictures) + _image_positions(history)
        positions = len(script_keys(history)) + self._encoder.positions * len(pictures) + sum(map(len, ids))
        # before any picture is encoded or any position decoded
        longest = self.manifest.language_model.context_length
        most = self._pipeline.fit(positions, image_positions, decoding.settings.max_tokens, longest)
        decoding = replace(decoding, settings=replace(decoding.settings, max_tokens=most))
        script = [*history, *self._script(ids, pictures, history, regions, timings)]
        work = self._grounding.begin(_last_picture(script), timings) if self._grounding else None
        for item in self._completions(script, decoding, work, teacher_forced):
            if isinstance(item, str):
                yield item
                continue
            masks = work.finish(item, self._pipeline.forget) if work else []
            timings |= item.timings
            if (late := self._late_ms() - loaded) > 0:
                timings["late_load"] = late
            timings["total"] = 1000 * (time.perf_counter() - start)
            tokens = Tokens(positions, image_positions, len(item.ids), item.ids)
            memory = {"peak_rss": peak_rss(), "peak_device": None}
            yield _Turn(Answer(item.text, tokens, timings, memory, masks), script, item)

    def _late_ms(self) -> float:
        return sum(stage.load_ms for stage in self.stages.values())

    def _completions(
        self, script: Script, decoding: Decoding, work: MaskWork | None, teacher_forced: str | Sequence[int] | None
    ) -> Iterator[str | Completion]:
        if teacher_forced is None:
            yield from self._pipeline.stream(script, decoding, work.watch if work else None)
            return
        if work is None:
            raise BadInput("this bundle cuts out no masks, so there is nothing to force an answer for; ask it freely")
        given = teacher_forced
        if isinstance(given, str):
            before, _ = answer_parts(self.manifest.prompt)
            given = piece_ids([Span(before + given, True)], self.language_model, self.manifest.prompt)
        given = [int(token) for token in given]
        if any(not 0 <= token < self.language_model.vocabulary for token in given):
            raise BadInput("the forced answer has a region or an unknown token id; leave it out")
        if work.watch.token not in given:
            raise BadInput(f"the forced answer {teacher_forced!r} has no {SEG}; put one where a mask is wanted")
        yield self._pipeline.forced(script, given, decoding, work.watch)

    def _pieces(self, prompt: str, raw: bool, pictures: int, boxes: int) -> list[Piece]:
        template = self.manifest.prompt
        if raw:
            return render_raw(template, prompt, pictures, boxes)
        return render(template, prompt, pictures, boxes=boxes)

    def _ids(self, pieces: list[Piece], opening: bool) -> list[list[int]]:
        """Ids of each piece, with BOS in front where a dialogue opens (once, even if a raw prompt spells it)."""
        ids = [piece_ids(piece, self.language_model, self.manifest.prompt) for piece in pieces]
        bos = self.language_model.bos
        if opening and bos is not None and ids[0][:1] != [bos]:
            ids[0].insert(0, bos)
        if not any(ids):
            raise BadInput("the prompt is empty; ask something")
        return ids

    def _script(
        self,
        ids: list[list[int]],
        pictures: list[Image.Image],
        history: Script,
        boxes: list[Box],
        timings: dict[str, float],
    ) -> Script:
        """The pieces' ids with an encoded picture between each two, and regions where their slots are."""
        seen = [self._encoder.encode(picture, timings) for picture in pictures]
        looked_at = seen[-1] if seen else _last_picture(history)
        regions = iter(self._encoder.regions(looked_at, boxes, timings) if boxes and looked_at else [])
        script: Script = []
        for number, run in enumerate(ids):
            script += seen[number - 1 : number]
            while BOX_SLOT in run:
                at = run.index(BOX_SLOT)
                script += [run[:at], next(regions)]
                run = run[at + 1 :]
            script.append(run)
        return script


class Chat:
    """A dialogue. A turn that fails or is interrupted leaves it as it was."""

    def __init__(self, model: Model, decoding: Decoding):
        self._model, self._decoding = model, decoding
        self._history: Script = []
        # Once, and not behind an answer, when the language model may have been let go.
        _, after = answer_parts(model.manifest.prompt)
        self._after = piece_ids([Span(after, True)], model.language_model, model.manifest.prompt)

    def ask(self, text: str, image: Images = None, boxes: Boxes = None) -> Answer:
        """Ask, perhaps about new pictures; earlier turns and their pictures are remembered. See `Model.generate`."""
        return _last(self.stream(text, image, boxes))

    def stream(self, text: str, image: Images = None, boxes: Boxes = None) -> Iterator[str | Answer]:
        """Like `ask`, in pieces: strings, then the `Answer`."""
        template, opening = self._model.manifest.prompt, not self._history
        turn = self._model._turn(
            self._history,
            image,
            boxes,
            lambda pictures, regions: render(template, text, pictures, opening, regions),
            self._decoding,
        )
        for item in turn:
            if isinstance(item, str):
                yield item
            else:
                self._history = [*item.script, self._closed(item.completion)]
                yield item.answer

    def _closed(self, completion: Completion) -> list[int]:
        """The answer's ids, closed as the template closes an assistant's turn."""
        _, after = answer_parts(self._model.manifest.prompt)
        if completion.tail and completion.tail == after:
            return completion.ids  # the model closed it itself, token by token
        if not completion.rest:
            return completion.kept + self._after
        ending = [Span(completion.rest, False), Span(after, True)]
        return completion.kept + piece_ids(ending, self._model.language_model, self._model.manifest.prompt)


class _Turn(NamedTuple):
    answer: Answer
    script: Script
    completion: Completion


def _last(items: Iterator[str | Answer]) -> Answer:
    *_, answer = items
    assert isinstance(answer, Answer)  # the last item of a stream
    return answer


def _pictures(image: Images) -> list[Image.Image]:
    if image is None:
        return []
    many = image if isinstance(image, (list, tuple)) else [image]
    return [load_image(one) for one in cast("Sequence[ImageSource]", many)]


def _image_positions(script: Script) -> int:
    return sum(len(part.embeds) for part in script if isinstance(part, Picture) and not isinstance(part, Region))


def _last_picture(script: Script) -> Picture | None:
    """The picture that masks and boxes are of."""
    return next((p for p in reversed(script) if isinstance(p, Picture) and not isinstance(p, Region)), None)


def _image_of(picture: Image.Image | Picture | None) -> Image.Image:
    if picture is None:
        raise BadInput("boxes were given but no picture; give the picture that they are of")
    return picture.image if isinstance(picture, Picture) else picture
