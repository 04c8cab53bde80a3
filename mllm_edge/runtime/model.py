"""The model that the Python API and the command line talk to, and its dialogues."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypedDict

from mllm_edge.bundle.manifest import Manifest, Prompt, Slot
from mllm_edge.errors import BadInput
from mllm_edge.runtime.answer import Answer
from mllm_edge.runtime.asked import Asked, BoxList, Images, task_of
from mllm_edge.runtime.decoding.loop import Decoding, script_embeds
from mllm_edge.runtime.engines.interface import Floats, LanguageModel
from mllm_edge.runtime.engines.lazy import LazyStage
from mllm_edge.runtime.images import ImageSource
from mllm_edge.runtime.interleaved import Question, words_and_pictures
from mllm_edge.runtime.memory import MemoryPlan
from mllm_edge.runtime.pipeline import Dialogue, Pipeline
from mllm_edge.runtime.sources import Held
from mllm_edge.runtime.turn import Drawing

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class DecodingOptions(TypedDict, total=False):
    """How to decode; what is not given, or None, is the bundle's default.

    Attributes:
        max_tokens: most tokens to generate.
        temperature: 0 is greedy.
        top_p: keep the likeliest tokens up to this probability; 1 is off.
        top_k: keep this many of the likeliest tokens; 0 is off.
        repeat_penalty: above 1 discourages tokens that were just generated.
        seed: the same seed gives the same answer; 0 to 2**64 - 1.
        stop: strings that end the answer, instead of the template's.
        beams: sequences of a beam search; 1 samples.
        length_penalty: of a beam search; above 0 favors long answers.
        min_tokens: tokens before which no answer ends, and no picture comes.
        group_scale: above 1 makes tokens likelier that others always follow, such as those of a picture; only for
            bundles that have such.
    """

    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    repeat_penalty: float | None
    seed: int
    stop: Sequence[str] | None
    beams: int | None
    length_penalty: float | None
    min_tokens: int | None
    group_scale: float | None


class Model:
    """A loaded bundle. Not thread-safe: it holds one sequence, and one answer is decoded at a time.

    Attributes:
        manifest: what `bundle.json` says.
        stages: stages by name; one that not every question needs is loaded by the first that does.
        language_model: the part that steps.
        tokenizer: the language model's.
        load_ms: milliseconds that loading took.
        memory: which parts stay in memory.
        target: where it runs: "cpu", "cuda", "trt" or "ort-rtx".
    """

    def __init__(
        self,
        manifest: Manifest,
        stages: dict[str, LazyStage],
        language_model: LanguageModel,
        held: Held,
        load_ms: float,
        opened: contextlib.ExitStack,
        memory: MemoryPlan,
        target: str,
    ):
        self.memory, self.target, self.opened = memory, target, opened
        self.manifest, self.stages, self.language_model, self.load_ms = manifest, stages, language_model, load_ms
        self._pipeline = Pipeline(manifest, stages, language_model, held, load_ms)
        opened.callback(self._pipeline.close)
        self.tokenizer = self._pipeline.tokenizer

    def generate(
        self,
        prompt: Question,
        image: Images = None,
        boxes: BoxList = None,
        *,
        task: str = "",
        tags: Sequence[str] | None = None,
        raw: bool = False,
        drawing: Drawing | None = None,
        teacher_forced: str | Sequence[int] | None = None,
        **options: Unpack[DecodingOptions],
    ) -> Answer:
        """Answer a question about any number of pictures.

        Args:
            prompt: the question. Each placeholder of a picture (`<image>`) in it takes one; without any, pictures go to
                the front. Each placeholder of a box takes one box. Or a list of texts and pictures in any order, where
                a str is a text and a picture's path a `Path`.
            image: a path, the bytes of a file, a PIL image, a uint8 array [H,W,3], or a list of these.
            boxes: x1,y1,x2,y2 each, in pixels of the last picture.
            task: one of the bundle's tasks; by default the one that the question's words suggest (`task_of`).
            tags: words for what is in the picture, where the prompt holds such; by default the bundle's tagger finds
                them.
            raw: `prompt` is the whole text, placeholders and control strings included; no template, no system text.
            drawing: how to make pictures, where the bundle does.
            teacher_forced: an answer, as text or ids, whose masks or pictures are wanted; nothing is generated.
            **options: see `DecodingOptions`.

        Raises:
            BadInput: an unusable picture, box or option, placeholders that do not go with pictures or boxes, or a
                prompt that is longer than the context.
        """
        more: Any = {
            "task": task,
            "tags": tags,
            "raw": raw,
            "drawing": drawing,
            "teacher_forced": teacher_forced,
            **options,
        }
        return _last(self.stream(prompt, image, boxes, **more))

    def stream(
        self,
        prompt: Question,
        image: Images = None,
        boxes: BoxList = None,
        *,
        task: str = "",
        tags: Sequence[str] | None = None,
        raw: bool = False,
        drawing: Drawing | None = None,
        teacher_forced: str | Sequence[int] | None = None,
        **options: Unpack[DecodingOptions],
    ) -> Iterator[str | Answer]:
        """Like `generate`, in pieces: strings of whole characters, then the `Answer` as the last item."""
        more: Any = {"task": task, "tags": tags, "raw": raw, "answer": teacher_forced}
        asked = _asked(self.manifest.prompt, prompt, image, boxes=boxes, drawing=drawing or Drawing(), **more)
        for item in self._pipeline.turn(Dialogue([], None), asked, self._pipeline.decoding(raw, **options)):
            yield item if isinstance(item, str) else item.answer

    def chat(self, **options: Unpack[DecodingOptions]) -> Chat:
        """A dialogue of several turns, each decoded with `options`. Pictures are read once."""
        return Chat(self._pipeline, self._pipeline.decoding(False, **options))

    def task_of(self, prompt: str, task: str = "") -> str:
        """The task of a question: `task`, else the one that its words suggest, else the bundle's first; "" where the
        bundle has none to choose. Raises BadInput for a task that it has not."""
        return task_of(self.manifest, prompt, task)

    def question(self, name: str, what: str = "") -> str:
        """One of the bundle's own questions, for `generate`: "describe", "segment" or "locate" (`what`), or "region"
        (of one box).

        Raises:
            BadInput: the bundle has no such question, or `what` is missing or of no use.
        """
        questions = self.manifest.prompt.questions
        if name not in questions:
            has = f"it has {', '.join(questions)}" if questions else "ask it in words"
            raise BadInput(f"this bundle has no question {name!r}; {has}")
        if bool(what.strip()) != ("{what}" in questions[name]):
            raise BadInput(f"the question {name} {'does not take' if what.strip() else 'needs'} what it is about")
        return questions[name].replace("{what}", what.strip())

    def look(self, image: ImageSource) -> list[Floats]:
        """A picture's embeddings in the language model's space, one float32 [N,D] for each placeholder that a picture
        has, cached by its pixels. What a question about it will need is then known."""
        return self._pipeline.look(image)

    def query(self, text: str) -> Floats:
        """What these words look for among pictures, float32 [d]: the tensor that an answer would be retrieved by, were
        these words the question and its first group of tokens the whole answer. Not of length 1; `Index.nearest` takes
        it.

        Raises:
            BadInput: the bundle retrieves nothing, or the words do not fit its context.
        """
        return self._pipeline.query(text)

    def decided(self, text: str) -> dict[str, float]:
        """How likely these words ask to "retrieve" a picture and to "generate" one, were they the question and its
        first group of tokens the whole answer; nothing is drawn or looked for.

        Raises:
            BadInput: the bundle does not decide between them, or the words do not fit its context.
        """
        return self._pipeline.decided(text)

    def tokenize(self, text: str) -> list[int]:
        """Ids of a piece of text, without BOS; control strings count as text."""
        return self.tokenizer.tokenize(text)

    def prompt_embeds(self, prompt: Question, image: Images = None, *, raw: bool = False, task: str = "") -> Floats:
        """What the language model reads for a prompt, float32 [T,D], BOS and pictures included."""
        script = self._pipeline.prompt(_asked(self.manifest.prompt, prompt, image, task=task, raw=raw))
        return script_embeds(script, self.language_model)

    def prompt_parts(self, prompt: Question, image: Images = None) -> list[list[int] | Slot]:
        """A prompt as runs of ids and the slots that rows of tensors replace, BOS included."""
        return self._pipeline.parts(_asked(self.manifest.prompt, prompt, image))

    def close(self) -> None:
        """Free every engine. A second call does nothing."""
        self.opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Chat:
    """A dialogue. A turn that fails or is interrupted leaves it as it was."""

    def __init__(self, pipeline: Pipeline, decoding: Decoding):
        self._pipeline, self._decoding = pipeline, decoding
        self._dialogue = Dialogue([], None)

    def ask(
        self,
        text: Question,
        image: Images = None,
        boxes: BoxList = None,
        task: str = "",
        drawing: Drawing | None = None,
        tags: Sequence[str] | None = None,
    ) -> Answer:
        """Ask, perhaps about new pictures; earlier turns and their pictures are remembered. See `Model.generate`."""
        return _last(self.stream(text, image, boxes, task, drawing, tags))

    def stream(
        self,
        text: Question,
        image: Images = None,
        boxes: BoxList = None,
        task: str = "",
        drawing: Drawing | None = None,
        tags: Sequence[str] | None = None,
    ) -> Iterator[str | Answer]:
        """Like `ask`, in pieces: strings, then the `Answer`."""
        more: Any = {"boxes": boxes, "task": task, "tags": tags, "drawing": drawing or Drawing()}
        asked = _asked(self._pipeline.manifest.prompt, text, image, **more)
        for item in self._pipeline.turn(self._dialogue, asked, self._decoding):
            if isinstance(item, str):
                yield item
            else:
                self._dialogue = item.dialogue
                yield item.answer


def _asked(template: Prompt, prompt: Question, image: Images, **more: Any) -> Asked:
    words, pictures = words_and_pictures(prompt, image, template, more.get("raw", False))
    return Asked(words, pictures, **more)


def _last(items: Iterator[str | Answer]) -> Answer:
    *_, answer = items
    assert isinstance(answer, Answer)  # the last item of a stream
    return answer
