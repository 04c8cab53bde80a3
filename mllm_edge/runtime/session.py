"""Loading a bundle, and the model that the Python API and the command line talk to."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, TypedDict, cast

from PIL import Image

from mllm_edge import bundle
from mllm_edge.bundle import Manifest
from mllm_edge.errors import BadInput, MllmEdgeError
from mllm_edge.runtime.answer import Answer, Tokens, peak_rss
from mllm_edge.runtime.image_encoder import ImageEncoder, Picture
from mllm_edge.runtime.images import ImageSource, load_image
from mllm_edge.runtime.prompt import Piece, Span, answer_parts, piece_ids, render, render_raw
from mllm_edge.runtime.sampling import check_settings
from mllm_edge.runtime.stage import (
    LANGUAGE_MODEL_ENGINES,
    STAGE_ENGINES,
    Floats,
    LanguageModel,
    Options,
    Stage,
    check_engines,
)
from mllm_edge.runtime.text import Completion, Decoding, Script, TextPipeline, script_embeds, script_keys, settings_for
from mllm_edge.runtime.threads import usable_cores

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

DEFAULT_CONTEXT = 4096  # positions, where the bundle allows more: the KV cache of a longer one must be asked for

Images = ImageSource | Sequence[ImageSource] | None


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


def load(
    folder: str | os.PathLike[str],
    target: str | None = None,
    threads: int | None = None,
    kv_type: str = "f16",
    context: int | None = None,
    verify_hash: bool = True,
) -> Model:
    """Load a bundle. The manifest, its files' hashes and all dims are checked before any engine starts.

    Args:
        folder: the bundle.
        target: run on "cpu" or "cuda" whatever the bundle was made for; then an engine without it is an error. By
            default the bundle's own target, and what cannot run there runs on the CPU, with a warning.
        threads: CPU threads; by default the physical cores that this process may use.
        kv_type: element type of the KV cache: "f32", "f16" or "q8_0".
        context: positions, at most the bundle's; by default the bundle's, up to 4096.
        verify_hash: compare SHA-256 of every file.

    Returns:
        A `Model`; use it as a context manager or call `close`.

    Raises:
        BadInput: the bundle or an argument is not usable.
        MllmEdgeError: an engine or the target is not available on this machine.
        MissingPackage: an engine is not installed.
    """
    start = time.perf_counter()
    folder = Path(folder)
    manifest = bundle.read(folder, verify_hash)
    check_engines(manifest.stages, manifest.language_model)
    options = _options(manifest, target, threads, kv_type, context)
    with contextlib.ExitStack() as opened:
        stages: dict[str, Stage] = {}
        for entry in manifest.stages:
            stages[entry.name] = STAGE_ENGINES[entry.engine](bundle.locate(folder, entry.file), entry, options)
            opened.callback(stages[entry.name].close)
        decoder = manifest.language_model
        language_model = LANGUAGE_MODEL_ENGINES[decoder.engine](bundle.locate(folder, decoder.file), decoder, options)
        opened.callback(language_model.close)
        return Model(manifest, stages, language_model, 1000 * (time.perf_counter() - start), opened.pop_all())


def _options(manifest: Manifest, target: str | None, threads: int | None, kv_type: str, context: int | None) -> Options:
    wanted, longest = target or manifest.target, manifest.language_model.context_length
    if wanted not in bundle.TARGETS:
        raise BadInput(f"there is no target {wanted!r}; use {', '.join(bundle.TARGETS)}")
    if wanted == "trt" and manifest.target != "trt":
        raise MllmEdgeError(f"the bundle was made for {manifest.target}; export it with --target trt")
    if threads is not None and threads < 1:
        raise BadInput(f"threads is {threads}; it must be at least 1")
    if context is not None and not 1 <= context <= longest:
        raise BadInput(f"context is {context}; this bundle takes 1 to {longest}")
    return Options(
        target=wanted,
        strict=target is not None,
        threads=threads or usable_cores(),
        kv_type=kv_type,
        context=context or min(longest, DEFAULT_CONTEXT),
    )


class Model:
    """A loaded bundle. Not thread-safe: it holds one KV cache, and one answer is decoded at a time.

    Attributes:
        manifest: what `bundle.json` says.
        stages: engines by stage name.
        language_model: the stage that steps.
        load_ms: milliseconds that loading took.
    """

    def __init__(
        self,
        manifest: Manifest,
        stages: dict[str, Stage],
        language_model: LanguageModel,
        load_ms: float,
        opened: contextlib.ExitStack,
    ):
        self.manifest, self.stages, self.language_model, self.load_ms = manifest, stages, language_model, load_ms
        self._encoder = ImageEncoder(manifest, stages)
        self._pipeline = TextPipeline(language_model)
        self._opened = opened

    def generate(
        self, prompt: str, image: Images = None, *, raw: bool = False, **options: Unpack[DecodingOptions]
    ) -> Answer:
        """Answer a question about any number of pictures.

        Args:
            prompt: the question. Each `<image>` in it takes one picture; without any, pictures go to the front.
            image: a path, the bytes of a file, a PIL image, a uint8 array [H,W,3], or a list of these.
            raw: `prompt` is the whole text, placeholders and control strings included; no template, no system text.
            **options: see `DecodingOptions`.

        Raises:
            BadInput: an unusable picture or option, placeholders that do not go with the pictures, or a prompt that
                is longer than the context.
        """
        return _last(self.stream(prompt, image, raw=raw, **options))

    def stream(
        self, prompt: str, image: Images = None, *, raw: bool = False, **options: Unpack[DecodingOptions]
    ) -> Iterator[str | Answer]:
        """Like `generate`, in pieces: strings of whole characters, then the `Answer` as the last item."""
        decoding = self._decoding(raw, **options)
        for item in self._turn([], image, lambda count: self._pieces(prompt, count, raw), decoding):
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
        ids = self._ids(self._pieces(prompt, len(pictures), raw), opening=True)
        return script_embeds(self._script(ids, pictures, {}), self.language_model)

    def close(self) -> None:
        """Free every engine. A second call does nothing."""
        self._opened.close()

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
        return Decoding(settings, seed, template.stop if stop is None else stop, strip)

    def _turn(
        self, history: Script, image: Images, cut: Callable[[int], list[Piece]], decoding: Decoding
    ) -> Iterator[str | _Turn]:
        """Read `history` and a new turn, then decode. `cut` gives the turn's pieces for a number of pictures."""
        start = time.perf_counter()
        pictures = _pictures(image)
        timings = {"load": self.load_ms, "preprocess": 1000 * (time.perf_counter() - start)}
        timings |= dict.fromkeys(self.stages, 0.0)
        ids = self._ids(cut(len(pictures)), opening=not history)
        image_positions = self._encoder.positions * len(pictures) + _image_positions(history)
        positions = len(script_keys(history)) + self._encoder.positions * len(pictures) + sum(map(len, ids))
        # before any picture is encoded or any position decoded
        longest = self.manifest.language_model.context_length
        most = self._pipeline.fit(positions, image_positions, decoding.settings.max_tokens, longest)
        decoding = replace(decoding, settings=replace(decoding.settings, max_tokens=most))
        script = [*history, *self._script(ids, pictures, timings)]
        for item in self._pipeline.stream(script, decoding):
            if isinstance(item, str):
                yield item
                continue
            timings |= item.timings
            timings["total"] = 1000 * (time.perf_counter() - start)
            tokens = Tokens(positions, image_positions, len(item.ids), item.ids)
            memory = {"peak_rss": peak_rss(), "peak_device": None}
            yield _Turn(Answer(item.text, tokens, timings, memory), script, item)

    def _pieces(self, prompt: str, pictures: int, raw: bool) -> list[Piece]:
        template = self.manifest.prompt
        return render_raw(template, prompt, pictures) if raw else render(template, prompt, pictures)

    def _ids(self, pieces: list[Piece], opening: bool) -> list[list[int]]:
        """Ids of each piece, with BOS in front where a dialogue opens (once, even if a raw prompt spells it)."""
        ids = [piece_ids(piece, self.language_model) for piece in pieces]
        bos = self.language_model.bos
        if opening and bos is not None and ids[0][:1] != [bos]:
            ids[0].insert(0, bos)
        if not any(ids):
            raise BadInput("the prompt is empty; ask something")
        return ids

    def _script(self, ids: list[list[int]], pictures: list[Image.Image], timings: dict[str, float]) -> Script:
        """The pieces' ids with an encoded picture between each two."""
        script: Script = [ids[0]]
        for picture, run in zip(pictures, ids[1:]):
            script += [self._encoder.encode(picture, timings), run]
        return script


class Chat:
    """A dialogue. A turn that fails or is interrupted leaves it as it was."""

    def __init__(self, model: Model, decoding: Decoding):
        self._model, self._decoding = model, decoding
        self._history: Script = []

    def ask(self, text: str, image: Images = None) -> Answer:
        """Ask, perhaps about new pictures; earlier turns and their pictures are remembered. See `Model.generate`."""
        return _last(self.stream(text, image))

    def stream(self, text: str, image: Images = None) -> Iterator[str | Answer]:
        """Like `ask`, in pieces: strings, then the `Answer`."""
        template, opening = self._model.manifest.prompt, not self._history
        turn = self._model._turn(
            self._history, image, lambda count: render(template, text, count, opening), self._decoding
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
        ending = [Span(completion.rest, False), Span(after, True)]
        return completion.kept + piece_ids(ending, self._model.language_model)


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
    return sum(len(part.embeds) for part in script if isinstance(part, Picture))
