"""LION's tokenizers, and its questions about scenes with their answers, by task."""

from __future__ import annotations

import json
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mllm_edge.errors import BadInput
from mllm_edge.models.lion.layouts import QUESTION
from mllm_edge.models.lion.prompts import CAPTION_QUESTIONS, REC_QUESTIONS, REG_QUESTIONS, SOFT, TAGGED
from mllm_edge.recipes.data.grounded import region_caption
from mllm_edge.runtime.boxes import spelled
from mllm_edge.scenes import Scene, boxes, pick, questions, referring_expressions
from mllm_edge.scenes.captions import full_caption
from mllm_edge.scenes.model import COLORS, SHAPES
from mllm_edge.scenes.questions import draw_questions

TOKENIZER = "tokenizer.json"
QUESTIONS = 8  # of one picture, in one prompt
FAINT = 0.1  # weight of an id that teaches nothing
PACKED = 0.8  # share of pictures that are asked so: a question then costs a third
OFTEN = {"caption": 1, "vqa": 4, "rec": 3, "reg": 1}  # of tasks: the hardest takes the most questions
TAGS = (*COLORS, *SHAPES, "small", "large")
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def train_tokenizers(folder: Path, sizes: tuple[int, int], texts: Sequence[str]) -> None:
    """Write `tokenizer.json`, pieces as T5 has them, and `question/tokenizer.json`, words as BERT has them.

    Args:
        folder: where to.
        sizes: of the two vocabularies.
        texts: what they are made from.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    pieces = Tokenizer(models.BPE(unk_token=UNKNOWN))
    pieces.normalizer = normalizers.Replace("\n", " ")  # T5 knows no line breaks either
    pieces.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="always"),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    pieces.decoder = decoders.Metaspace(prepend_scheme="always")
    letters = list(string.ascii_letters + string.digits + string.punctuation)
    special = [PAD, END, UNKNOWN, SOFT]
    pieces.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=sizes[0], special_tokens=special, initial_alphabet=letters)
    )
    words = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words.decoder = decoders.WordPiece()
    words.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=sizes[1], special_tokens=list(WORDS), initial_alphabet=letters)
    )
    (folder / QUESTION).mkdir(parents=True, exist_ok=True)
    pieces.save(str(folder / TOKENIZER))
    words.save(str(folder / QUESTION / TOKENIZER))
    for place, roles in ((folder, {"eos_token": END, "pad_token": PAD}), (folder / QUESTION, {"pad_token": "[PAD]"})):
        (place / "tokenizer_config.json").write_text(json.dumps(roles, indent=2) + "\n", encoding="utf-8")


class Words:
    """Both tokenizers of a folder.

    Raises:
        BadInput: there are none.
    """

    def __init__(self, folder: Path):
        from tokenizers import Tokenizer

        for path in (folder / TOKENIZER, folder / QUESTION / TOKENIZER):
            if not path.is_file():
                raise BadInput(f"{path} is missing; train the recipe lion-language first")
        self._pieces = Tokenizer.from_file(str(folder / TOKENIZER))
        self._words = Tokenizer.from_file(str(folder / QUESTION / TOKENIZER))
        self.soft = int(self._pieces.token_to_id(SOFT) or 0)
        self._point = self._pieces.token_to_id(".")
        self._digits = frozenset(self._pieces.token_to_id(digit) for digit in string.digits)

    def prompt(self, text: str) -> list[int]:
        """A whole prompt's ids: the pieces around the soft token are tokenized apart, and an end closes it."""
        before, soft, after = text.rpartition(SOFT)
        ids = [*self._ids(before), self.soft] if soft else []
        return [*ids, *self._ids(after), 1]

    def answer(self, text: str) -> list[int]:
        """An answer's ids with its end."""
        return [*self._ids(text), 1]

    def weights(self, ids: Sequence[int], count: int) -> list[float]:
        """How much each of an answer's ids counts in the loss: as much as `count` answers in all, and of a box hardly
        what is always there, and its third decimals, which nobody can see."""
        made = np.ones(len(ids))
        for at in range(2, len(ids) - 3):
            if ids[at] == self._point and self._digits.issuperset(ids[at + 1 : at + 4]):
                made[[at - 2, at - 1, at, at + 3]] = FAINT
        weights: list[float] = (made * count / made.sum()).tolist()
        return weights

    def question(self, text: str, length: int) -> list[int]:
        """What the Q-Former reads: [CLS], the last words that have room, [SEP], padded to `length`."""
        ids = self._words.encode(text, add_special_tokens=False).ids[-(length - 2) :]
        ids = [2, *ids, 3]
        return ids + [0] * (length - len(ids))

    def text(self, ids: Sequence[int]) -> str:
        """Ids as text, without control tokens."""
        return str(self._pieces.decode([one for one in ids if one > 3])).strip()

    def _ids(self, text: str) -> list[int]:
        found: list[int] = self._pieces.encode(text, add_special_tokens=False).ids
        return found


@dataclass(frozen=True)
class LionTurn:
    """A question with its answer, and its task; boxes are text in both. The answer says `count` things."""

    task: str
    question: str
    answer: str
    count: int = 1


def tags_of(scene: Scene) -> list[str]:
    """Colors, shapes and sizes that a scene has, in the order of `TAGS`."""
    there = {word for item in scene.objects for word in (item.color, item.shape, item.size)}
    return [tag for tag in TAGS if tag in there]


def prompted(question: str, tags: Sequence[str] | None) -> str:
    """What the T5 reads of words; without tags the question alone."""
    return question if tags is None else TAGGED.format(tags=", ".join(tags)) + question


def turns(scene: Scene, task: str, rng: np.random.Generator, number: int) -> list[LionTurn]:
    """Up to `number` turns of one task about a scene."""
    if task == "caption":
        things = len(scene.objects)
        return [LionTurn(task, asked, full_caption(scene, rng), things) for asked in CAPTION_QUESTIONS[:number]]
    if task == "vqa":
        drawn = draw_questions(questions(scene, rng), rng, number)
        return [LionTurn(task, *question.asked(short=rng.random() < 0.75)) for question in drawn]
    if task == "rec":
        return [turn for turn, _ in located(scene, rng)[:number]]
    return [
        LionTurn(task, pick(rng, REG_QUESTIONS).format(box=place), region_caption(item))
        for item, place in list(zip(scene.objects, _places(scene), strict=True))[:number]
    ]


def packed(asked: Sequence[LionTurn]) -> LionTurn:
    """Turns of one task as a single one, "A: ... B: ...", so that a picture's rows are encoded once for all."""
    lettered = list(zip(string.ascii_uppercase, asked))
    question = " ".join(f"{letter}: {turn.question}" for letter, turn in lettered)
    answer = " ".join(f"{letter}: {turn.answer}" for letter, turn in lettered)
    return LionTurn(asked[0].task, question, answer, sum(turn.count for turn in asked))


def one_of(tasks: Sequence[str], rng: np.random.Generator) -> str:
    """One of these tasks, each as `OFTEN` as it is to be."""
    often = np.array([OFTEN[task] for task in tasks])
    return str(rng.choice(list(tasks), p=often / often.sum()))


def together(asked: Sequence[LionTurn], rng: np.random.Generator) -> list[LionTurn]:
    """Turns about one picture `packed` into one, in any order; of captions the first alone."""
    if len(asked) < 2 or asked[0].task == "caption":
        return list(asked[:1])
    return [packed([asked[i] for i in rng.permutation(len(asked))])]


def located(scene: Scene, rng: np.random.Generator) -> list[tuple[LionTurn, int]]:
    """Questions where things are, with the number of the object; none where nothing can be told apart."""
    places = _places(scene)
    return [
        (LionTurn("rec", pick(rng, REC_QUESTIONS).format(what=expression), places[target]), target)
        for expression, target in referring_expressions(scene, rng)
    ]


def _places(scene: Scene) -> list[str]:
    """The boxes of the objects, as LION writes them."""
    return [spelled(box, scene.extent(1000)) for box in boxes(scene, 1000)]


def corpus(scenes: Iterator[Scene], seed: int) -> Iterator[str]:
    """Texts of every task, for the tokenizers."""
    for number, scene in enumerate(scenes):
        rng = np.random.default_rng([seed, 91, number])
        for task in ("caption", "vqa", "rec", "reg"):
            for turn in turns(scene, task, rng, 4):
                yield f"{prompted(turn.question, tags_of(scene))} {turn.answer}".replace(SOFT, " ")
