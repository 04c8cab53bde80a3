"""Questions about scenes with unambiguous answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, product

import numpy as np

from mllm_edge.scenes.model import ALL_COLORS, COLORS, HELD_OUT_PAIRS, SHAPES, SIZES, Scene, pick, shuffled
from mllm_edge.scenes.phrases import (
    RELATION_MARGIN,
    Description,
    at_location,
    capitalized,
    full_description,
    location,
    matches,
    sole_occupants,
    unique_descriptions,
    with_article,
)

# Appended to a question to ask for `Question.answer` rather than `Question.sentence` (LLaVA's docs/Evaluation.md).
SHORT = "\nAnswer the question using a single word or phrase."
QUESTION_KINDS: tuple[str, ...] = ("what", "color", "count", "where", "yesno")

_RELATIONS: tuple[tuple[str, str, int], ...] = (
    ("to the left of", "x", 1),
    ("to the right of", "x", -1),
    ("above", "y", 1),
    ("below", "y", -1),
)
_HARD_NEGATIVE_RATE = 0.6


@dataclass(frozen=True)
class Question:
    """A question and its only right answer.

    Attributes:
        kind: One of `QUESTION_KINDS`.
        question: The question.
        answer: Short form: "red", "red circle", "2", "top left", "yes".
        sentence: The answer as a full sentence.
        target: Index of the object it is about; None if it is about none or several.
    """

    kind: str
    question: str
    answer: str
    sentence: str
    target: int | None

    @property
    def is_relation(self) -> bool:
        """Whether it asks for the relation of two objects."""
        return self.question.startswith("Is the ")

    def asked(self, short: bool) -> tuple[str, str]:
        """Returns question and answer as a turn of a dialogue: `short` asks for a word or phrase."""
        return (self.question + SHORT, self.answer) if short else (self.question, self.sentence)


def questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Returns questions of every kind that the scene allows.

    No question is ambiguous: "the circle" is unique, places and relations hold with a margin. Half of
    the answers on existence are "yes" (many of the others are hard: the color and the shape both occur,
    but not together), and half of those on relations. A scene without a held-out pair gets no question
    that names one, not even to be answered with "no".

    Args:
        scene: The scene.
        rng: Chooses templates, descriptions and negatives.

    Returns:
        Questions grouped by kind in the order of `QUESTION_KINDS`, none twice.
    """
    makers = (_whats, _colors, _counts, _wheres, _existences, _relations)
    return _distinct([question for make in makers for question in make(scene, rng)])


def placed_questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Returns questions on the shape alone and the color alone of whatever is at a place.

    They separate the two things that "What is at the top left?" asks for at once.

    Args:
        scene: The scene.
        rng: Chooses templates.

    Returns:
        Questions of the kinds "what" and "color" about each object that is alone in its cell.
    """
    found = []
    for place, index in sole_occupants(scene).items():
        item, name = scene.objects[index], f"object {at_location(place)}"
        text = pick(rng, ("What shape is the {}?", "Which shape is the {}?")).format(name)
        found.append(Question("what", text, item.shape, f"The {name} is {with_article(item.shape)}.", index))
        text = pick(rng, ("What color is the {}?", "What is the color of the {}?")).format(name)
        found.append(Question("color", text, item.color, f"The {name} is {item.color}.", index))
    return found


def draw_questions(asked: Sequence[Question], rng: np.random.Generator, number: int) -> list[Question]:
    """Returns up to `number` different questions, all kinds equally likely: a scene allows many more of some kinds."""
    left = list(asked)
    drawn: list[Question] = []
    while left and len(drawn) < number:
        kind = pick(rng, sorted({question.kind for question in left}))
        drawn.append(pick(rng, [question for question in left if question.kind == kind]))
        left.remove(drawn[-1])
    return drawn


def without_colors(asked: Sequence[Question]) -> list[Question]:
    """Returns the questions that neither name a color nor are answered by one."""
    return [q for q in asked if not any(color in f"{q.question} {q.sentence}" for color in ALL_COLORS)]


def held_out_questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Returns the questions that can only be answered from an unseen combination of color and shape.

    Their target has a held-out pair, or their text names one. "Is there a red star?" is asked for as
    many present as absent pairs, so that always answering "yes" scores half.

    Args:
        scene: A scene, usually of the split "held_out".
        rng: Chooses templates, descriptions and negatives.

    Returns:
        Questions of the kinds "what", "color", "where" and "yesno"; none for other scenes.
    """
    if not scene.shows_held_out_pair:
        return []
    makers: tuple[Callable[[Scene, np.random.Generator], list[Question]], ...] = (_whats, _colors, _wheres, _relations)
    asked = [question for make in makers for question in make(scene, rng) if _is_about_held_out(scene, question)]
    present = [pair for pair in HELD_OUT_PAIRS if any(item.pair == pair for item in scene.objects)]
    absent = shuffled(rng, [pair for pair in HELD_OUT_PAIRS if pair not in present])
    asked += [_existence(scene, Description(None, *pair), rng) for pair in present + absent[: len(present)]]
    return _distinct(asked)


def _is_about_held_out(scene: Scene, question: Question) -> bool:
    if question.target is not None and scene.objects[question.target].pair in HELD_OUT_PAIRS:
        return True
    return any(" ".join(pair) in question.question for pair in HELD_OUT_PAIRS)


def _whats(scene: Scene, rng: np.random.Generator) -> list[Question]:
    found = []
    for index, item in enumerate(scene.objects):
        names = [d for d in unique_descriptions(scene, index) if d.shape is None]
        if names:
            name = pick(rng, names)
            text = pick(rng, ("What shape is the {}?", "Which shape is the {}?")).format(name)
            found.append(Question("what", text, item.shape, f"The {name} is {with_article(item.shape)}.", index))
    for place, index in sole_occupants(scene).items():
        answer = " ".join(scene.objects[index].pair)
        text = pick(rng, ("What is {}?", "Which object is {}?")).format(at_location(place))
        sentence = capitalized(f"{with_article(answer)} is {at_location(place)}.")
        found.append(Question("what", text, answer, sentence, index))
    return found


def _colors(scene: Scene, rng: np.random.Generator) -> list[Question]:
    found = []
    for index, item in enumerate(scene.objects):
        names = [d for d in unique_descriptions(scene, index) if d.color is None]
        if names:
            name = pick(rng, names)
            text = pick(rng, ("What color is the {}?", "What is the color of the {}?")).format(name)
            found.append(Question("color", text, item.color, f"The {name} is {item.color}.", index))
    return found


def _counts(scene: Scene, rng: np.random.Generator) -> list[Question]:
    there = [Description(color=item.color) for item in scene.objects]
    there += [Description(shape=item.shape) for item in scene.objects]
    asked = [
        Description(),
        *dict.fromkeys(there),
        Description(size=pick(rng, SIZES)),
        Description(color=pick(rng, _palette(scene))),
        Description(shape=pick(rng, SHAPES)),
    ]
    found = []
    for description in dict.fromkeys(asked):
        count = len(matches(scene, description))
        plural = _plural(description)
        text = pick(rng, ("How many {} are there?", "How many {} can you see?")).format(plural)
        sentence = f"There is 1 {description}." if count == 1 else f"There are {count} {plural}."
        found.append(Question("count", text, str(count), sentence, None))
    return found


def _wheres(scene: Scene, rng: np.random.Generator) -> list[Question]:
    found = []
    for index, item in enumerate(scene.objects):
        place, names = location(item), unique_descriptions(scene, index)
        if place and names:
            name = pick(rng, names)
            text = pick(rng, ("Where is the {}?", "Where can you see the {}?")).format(name)
            found.append(Question("where", text, place, f"The {name} is {at_location(place)}.", index))
    return found


def _existences(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Asks for up to two things that are present and as many that are not."""
    there = [_said_partly(full_description(item), rng) for item in shuffled(rng, scene.objects)]
    asked = list(dict.fromkeys(there))[:2]
    hard = shuffled(rng, _hard_negatives(scene))
    for _ in range(len(asked)):
        is_hard = bool(hard) and rng.random() < _HARD_NEGATIVE_RATE
        asked.append(hard.pop() if is_hard else _easy_negative(scene, rng))
    return [_existence(scene, description, rng) for description in asked]


def _said_partly(description: Description, rng: np.random.Generator) -> Description:
    """Omits the size, the color, the shape or nothing; color and shape are kept most often."""
    size, color, shape = description.size, description.color, description.shape
    options = (
        Description(None, color, shape),
        Description(None, color, shape),
        Description(size, color, None),
        Description(size, None, shape),
        description,
    )
    return pick(rng, options)


def _hard_negatives(scene: Scene) -> list[Description]:
    """Returns descriptions that fit nothing in the scene although each word fits something in it."""
    words = [(None, *dict.fromkeys(words)) for words in zip(*((o.size, *o.pair) for o in scene.objects), strict=True)]
    return [d for d in (Description(*choice) for choice in product(*words)) if _is_fair_negative(scene, d)]


def _easy_negative(scene: Scene, rng: np.random.Generator) -> Description:
    while True:
        description = _said_partly(Description(pick(rng, SIZES), pick(rng, _palette(scene)), pick(rng, SHAPES)), rng)
        if _is_fair_negative(scene, description):
            return description


def _palette(scene: Scene) -> tuple[str, ...]:
    """Colors to ask for, including the additional ones (as negatives too) if the scene has some."""
    return COLORS if all(item.color in COLORS for item in scene.objects) else ALL_COLORS


def _is_fair_negative(scene: Scene, description: Description) -> bool:
    """Returns whether a description fits nothing and does not reveal a held-out pair."""
    names_held_out = (description.color, description.shape) in HELD_OUT_PAIRS
    return not matches(scene, description) and (scene.shows_held_out_pair or not names_held_out)


def _existence(scene: Scene, description: Description, rng: np.random.Generator) -> Question:
    fitting = matches(scene, description)
    thing = with_article(str(description))
    text = pick(rng, ("Is there {}?", "Can you see {}?")).format(thing)
    sentence = f"Yes, there is {thing}." if fitting else f"No, there is no {description}."
    return Question("yesno", text, "yes" if fitting else "no", sentence, fitting[0] if len(fitting) == 1 else None)


def _relations(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Asks, for each two objects that can be named, one relation that clearly holds or clearly does not."""
    found = []
    for indices in combinations(range(len(scene.objects)), 2):
        first, second = shuffled(rng, indices)
        names = unique_descriptions(scene, first), unique_descriptions(scene, second)
        if not all(names):
            continue
        relation, axis, sign = pick(rng, _RELATIONS)
        lead = sign * (float(getattr(scene.objects[second], axis)) - float(getattr(scene.objects[first], axis)))
        if abs(lead) < RELATION_MARGIN:
            continue
        one, other = (pick(rng, options) for options in names)
        answer = "yes" if lead > 0 else "no"
        negation = "" if lead > 0 else "not "
        sentence = f"{answer.capitalize()}, the {one} is {negation}{relation} the {other}."
        found.append(Question("yesno", f"Is the {one} {relation} the {other}?", answer, sentence, first))
    return found


def _plural(description: Description) -> str:
    noun = str(description)
    return noun + ("es" if noun.endswith("s") else "s")


def _distinct(asked: list[Question]) -> list[Question]:
    return list({question.question: question for question in asked}.values())
