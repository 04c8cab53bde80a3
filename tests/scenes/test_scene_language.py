"""What is said of scenes, read back by an independent reader of the sentences."""

import re
from collections import Counter
from itertools import permutations

import numpy as np
import pytest

from mllm_edge.scenes import (
    COLOR_RGB,
    COLORS,
    HELD_OUT_PAIRS,
    LOCATIONS,
    QUESTION_KINDS,
    SHAPES,
    SIZES,
    Background,
    Question,
    Scene,
    SceneObject,
    attributes,
    caption,
    draw_questions,
    edit,
    grounded_caption,
    held_out_questions,
    placed_questions,
    questions,
    referring_expressions,
    sample_scene,
    scene_text,
    telegram,
    terse,
    told_scene,
    without_colors,
)

PLAIN = Background("plain", (60, 60, 60), (60, 60, 60), 0.0, 0)
HELD_OUT_NAMES = [" ".join(pair) for pair in HELD_OUT_PAIRS]


def thing(color="red", shape="square", size="large", x=0.5, y=0.5, radius=0.16, angle=0.0):
    return SceneObject(color, shape, size, x, y, radius, angle, COLOR_RGB[color])


def scenes(split, count, seed=0):
    return [sample_scene(split, index, seed) for index in range(count)]


def rng(number=0):
    return np.random.default_rng(number)


def fits(item, noun):
    """Whether "small red circles" and the like is true of an object."""
    for word in noun.split():
        word = {"crosses": "cross"}.get(word, word.removesuffix("s") if word != "cross" else word)
        if word not in ("object", item.color, item.shape, item.size):
            return False
    return True


def the(scene, noun):
    found = [i for i, item in enumerate(scene.objects) if fits(item, noun)]
    assert len(found) == 1, f"ambiguous: {noun}"
    return found[0]


def grid_cell(item):
    for value in (item.x, item.y):
        assert min(abs(value - 1 / 3), abs(value - 2 / 3)) >= 0.04 - 1e-9
    return LOCATIONS[3 * int(item.y * 3) + int(item.x * 3)]


def sole(scene, place):
    """The only object in a cell of the grid."""
    cell = divmod(LOCATIONS.index(place), 3)
    (index,) = [i for i, o in enumerate(scene.objects) if (int(o.y * 3), int(o.x * 3)) == cell]
    return index


AT = r"(?:at|in|on) the ((?:top|bottom)(?: left| right)?|left|right|center)"


def answer_of(scene, question):
    """Works out (answer, target) from the words of a question alone."""
    if found := re.fullmatch(
        rf"(What|Which) (shape|color) is the object {AT}\?", question.replace("is the color of", "color is")
    ):
        index = sole(scene, found[3])
        return getattr(scene.objects[index], found[2]), index
    if found := re.fullmatch(r"(?:What|Which) shape is the (.+)\?", question):
        return scene.objects[the(scene, found[1])].shape, the(scene, found[1])
    if found := re.fullmatch(rf"(?:What|Which object) is {AT}\?", question):
        index = sole(scene, found[1])
        return f"{scene.objects[index].color} {scene.objects[index].shape}", index
    if found := re.fullmatch(r"(?:What color is|What is the color of) the (.+)\?", question):
        return scene.objects[the(scene, found[1])].color, the(scene, found[1])
    if found := re.fullmatch(r"How many (.+) (?:are there|can you see)\?", question):
        return str(sum(fits(item, found[1]) for item in scene.objects)), None
    if found := re.fullmatch(r"Where (?:is|can you see) the (.+)\?", question):
        return grid_cell(scene.objects[the(scene, found[1])]), the(scene, found[1])
    if found := re.fullmatch(r"(?:Is there|Can you see) an? (.+)\?", question):
        fitting = [i for i, item in enumerate(scene.objects) if fits(item, found[1])]
        return ("yes" if fitting else "no"), (fitting[0] if len(fitting) == 1 else None)
    found = re.fullmatch(r"Is the (.+) (to the left of|to the right of|above|below) the (.+)\?", question)
    assert found, f"unreadable: {question}"
    first, second = the(scene, found[1]), the(scene, found[3])
    one, other = scene.objects[first], scene.objects[second]
    lead = {
        "to the left of": other.x - one.x,
        "to the right of": one.x - other.x,
        "above": other.y - one.y,
        "below": one.y - other.y,
    }[found[2]]
    assert abs(lead) >= 0.12
    return ("yes" if lead > 0 else "no"), first


@pytest.mark.parametrize(
    ("split", "ask"),
    [("train", questions), ("test", questions), ("held_out", held_out_questions), ("train", placed_questions)],
)
def test_answers_follow_from_the_scene(split, ask):
    for index, scene in enumerate(scenes(split, 200)):
        asked = ask(scene, rng(index))
        assert asked == ask(scene, rng(index))
        assert len({q.question for q in asked}) == len(asked)
        for q in asked:
            assert answer_of(scene, q.question) == (q.answer, q.target), q
            assert re.search(rf"\b{q.answer}\b", q.sentence, re.IGNORECASE), q
            assert q.sentence[0].isupper() and q.sentence.endswith(".")


def test_sentences_read_as_english():
    item = thing("orange", "cross", "small", x=0.2, y=0.2, radius=0.08)
    scene = Scene((item, thing("blue", "circle", x=0.8, y=0.5)), PLAIN)
    said = {q.question: q.sentence for number in range(500) for q in questions(scene, rng(number))}
    assert said["What is at the top left?"] == "An orange cross is at the top left."
    assert said["What color is the cross?"] == "The cross is orange."
    assert said["Which shape is the orange object?"] == "The orange object is a cross."
    assert said["How many crosses are there?"] == "There is 1 cross."
    assert said["How many objects are there?"] == "There are 2 objects."
    assert said["Where is the circle?"] == "The circle is on the right."
    assert said["Is there an orange cross?"] == "Yes, there is an orange cross."
    assert said["Is there an orange circle?"] == "No, there is no orange circle."
    assert said["Is the cross to the left of the circle?"] == "Yes, the cross is to the left of the circle."
    assert said["Is the circle above the cross?"] == "No, the circle is not above the cross."


def test_all_kinds_occur_and_yes_is_as_frequent_as_no():
    asked = [(scene, q) for i, scene in enumerate(scenes("train", 300)) for q in questions(scene, rng(i))]
    assert {q.kind for _, q in asked} == set(QUESTION_KINDS)
    relation = [q for _, q in asked if q.kind == "yesno" and q.question.startswith("Is the ")]
    existence = [(s, q) for s, q in asked if q.kind == "yesno" and not q.question.startswith("Is the ")]
    assert 0.45 < sum(q.answer == "yes" for q in relation) / len(relation) < 0.55
    assert sum(q.answer == "yes" for _, q in existence) * 2 == len(existence)
    # Hard: each word is true of some object, and only all of them together of none.
    no = [(s, q.question) for s, q in existence if q.answer == "no" and len(s.objects) > 1]
    nouns = [(s, re.fullmatch(r".* an? (.+)\?", text)[1]) for s, text in no]
    hard = sum(all(any(fits(o, word) for o in s.objects) for word in noun.split()) for s, noun in nouns)
    assert hard / len(nouns) > 0.45
    assert {q.answer for _, q in asked if q.kind == "where"} == set(LOCATIONS)
    assert {q.answer for _, q in asked if q.kind == "count"} == {"0", "1", "2", "3", "4"}


def test_train_language_never_names_a_held_out_pair():
    for index, scene in enumerate(scenes("train", 150)):
        told = told_scene(index)
        said = [
            scene_text(index),
            told.text,
            *(" ".join(words) for words in told.things),
            *(f"{q.question} {q.sentence}" for q in told.questions),
            caption(scene, rng(index)),
            edit(scene, rng(index)).instruction,
        ]
        said += [f"{q.question} {q.sentence}" for ask in (questions, placed_questions) for q in ask(scene, rng(index))]
        said += [expression for expression, _ in referring_expressions(scene, rng(index))]
        assert not [name for name in HELD_OUT_NAMES if name in " ".join(said)]


def test_held_out_questions_need_the_held_out_pair():
    assert held_out_questions(sample_scene("test", 0), rng()) == []
    existence = Counter()
    for index, scene in enumerate(scenes("held_out", 100)):
        asked = held_out_questions(scene, rng(index))
        assert {q.kind for q in asked} <= {"what", "color", "where", "yesno"}
        for q in asked:
            about = q.target is not None and scene.objects[q.target].pair in HELD_OUT_PAIRS
            assert about or any(name in q.question for name in HELD_OUT_NAMES)
            if not q.question.startswith("Is the ") and q.kind == "yesno":
                existence[q.answer] += 1
    assert existence["yes"] == existence["no"] >= 100


def test_captions_name_objects_from_left_to_right():
    for index, scene in enumerate(scenes("train", 150)):
        text = caption(scene, rng(index))
        place = 0
        for item in sorted(scene.objects, key=lambda item: item.x):
            place = text.index(" ".join(item.pair), place) + 1  # after the one to its left


def test_grounded_captions_name_every_object_line_by_line():
    for index, scene in enumerate(scenes("train", 150)):
        grounded = grounded_caption(scene, rng(index))
        rows = [(int(scene.objects[i].y * 8), scene.objects[i].x) for _, _, i in grounded.spans]
        assert len(rows) == len(scene.objects)
        assert rows == sorted(rows)
        for start, end, i in grounded.spans:
            article, noun = grounded.text[start:end].lower().split(" ", 1)
            assert article in ("a", "an", "another")
            assert fits(scene.objects[i], noun) and scene.objects[i].shape in noun


def test_caption_of_two_objects():
    scene = Scene((thing("blue", x=0.8, y=0.5), thing("red", "circle", "small", x=0.2, y=0.2, radius=0.08)), PLAIN)
    written = {caption(scene, rng(number)) for number in range(80)}
    assert "A small red circle and a large blue square." in written
    assert "There is a red circle at the top left and a blue square on the right." in written
    assert len(written) == 16
    with pytest.raises(ValueError, match="at least one object"):
        caption(Scene((), PLAIN), rng())


def test_referring_expressions_name_one_object():
    ranks = {"leftmost": ("x", min), "rightmost": ("x", max), "topmost": ("y", min), "bottommost": ("y", max)}
    for index, scene in enumerate(scenes("train", 150)):
        expressions = referring_expressions(scene, rng(index))
        assert {i for _, i in expressions} == set(range(len(scene.objects)))
        for text, i in expressions:
            if found := re.fullmatch(rf"the object {AT}", text):
                assert grid_cell(scene.objects[i]) == found[1]
                assert sum(LOCATIONS[3 * int(o.y * 3) + int(o.x * 3)] == found[1] for o in scene.objects) == 1
            elif (words := text.split(" ", 2))[1] in ranks:
                axis, best = ranks[words[1]]
                group = [k for k, o in enumerate(scene.objects) if fits(o, words[2])]
                assert len(group) > 1 and best(group, key=lambda k: getattr(scene.objects[k], axis)) == i
            else:
                assert the(scene, text.removeprefix("the ")) == i


def read_back(description):
    """The scene that a full caption tells of."""
    found = re.findall(rf"(small|large) ({'|'.join(COLORS)}) ({'|'.join(SHAPES)}) {AT}", description)
    cells = [divmod(LOCATIONS.index(place), 3) for *_, place in found]
    return Scene(
        tuple(
            thing(color, shape, size, x=(column + 0.5) / 3, y=(row + 0.5) / 3)
            for (size, color, shape, _), (row, column) in zip(found, cells, strict=True)
        ),
        PLAIN,
    )


def test_told_scenes_answer_their_questions():
    for index in range(150):
        told = told_scene(index)
        assert told == told_scene(index)
        assert len(told.questions) >= 5
        for q in told.questions:
            assert answer_of(read_back(told.text), q.question)[0] == q.answer, (told.text, q)


def test_told_things_say_what_the_text_says():
    for index in range(50):
        told = told_scene(index)
        assert len(told.things) == len(re.findall(r"\b(?:small|large)\b", told.text))
        for size, color, shape, place in told.things:
            assert re.search(rf"{size} {color} {shape} (at|in|on) the {place}", told.text), told


def test_telegrams_name_one_thing_in_any_order():
    things = [["small", "red", "ring", "top left"], ["large", "blue", "star"]]
    drawn = [" ".join(telegram(things, rng(number))) for number in range(400)]
    orders = [" ".join(order) for words in things for order in permutations(words)]
    assert set(drawn) == set(orders)
    assert telegram([["red", "ring"]], rng()) in {("red", "ring"), ("ring", "red")}


def test_attributes_leave_out_an_unclear_place():
    assert attributes(thing("red", "ring", x=0.1, y=0.1)) == ["large", "red", "ring", "top left"]
    assert attributes(thing("red", "ring", x=1 / 3, y=0.1)) == ["large", "red", "ring"]


def test_terse_questions_keep_the_words_that_matter():
    def asked(text: str) -> str:
        return terse(Question("what", text, "red", "It is red.", 0))[0]

    assert asked("What color is the small ring?") == "What color small ring?"
    assert asked("How many red stars can you see?") == "How many red stars?"
    assert asked("Is there a large object?") == "large object?"
    assert asked("Which object is at the top left?") == "object top left?"
    for index in range(60):
        scene = sample_scene("train", index)
        for q in questions(scene, rng(index)):
            text, answer = terse(q)
            kept = [word for word in re.findall(r"\w+", q.question) if word in {*COLORS, *SHAPES, *SIZES, "object"}]
            assert all(word in text for word in kept)
            assert answer == q.answer


def test_questions_without_colors_are_the_same_in_any_paint():
    scene = Scene(
        (thing("red", "ring", x=0.2, y=0.2), thing("blue", "star", "small", x=0.8, y=0.8, radius=0.08)), PLAIN
    )
    said = {q.question for number in range(100) for q in without_colors(questions(scene, rng(number)))}
    assert {"How many rings are there?", "Where is the star?"} <= said
    assert [text for text in said if text.startswith("Is the ")]
    assert not [text for text in said if any(color in text for color in COLORS) or text.startswith("What is at")]
    assert not [text for text in said if "color" in text]


def test_drawn_questions_are_of_all_kinds_and_different():
    scene = sample_scene("train", 1)
    asked = questions(scene, rng())
    drawn = draw_questions(asked, rng(), len(asked) + 5)
    assert sorted(q.question for q in drawn) == sorted(q.question for q in asked)
    kinds = Counter(draw_questions(asked, rng(number), 1)[0].kind for number in range(1000))
    assert set(kinds) == {q.kind for q in asked}
    assert max(kinds.values()) < 1.4 * min(kinds.values())


def test_text_dialogues_can_be_answered_from_the_text():
    """Reads the description back and answers the questions from what it says alone."""
    dialogues = 0
    for index in range(250):
        text = scene_text(index)
        assert text == scene_text(index)
        if "Question:" not in text:
            continue
        dialogues += 1
        description, *turns = text.split(" Question: ")
        told = read_back(description)
        for turn in turns:
            question, answer = turn.split(" Answer: ")
            assert re.search(rf"\b{answer_of(told, question)[0]}\b", answer, re.IGNORECASE), text
    assert dialogues > 120


def test_vocabulary_is_small():
    words = {word for i in range(400) for word in re.findall(r"[a-z0-9]+", scene_text(i).lower())}
    assert 60 < len(words) < 110


def test_other_names_change_nothing_else():
    renamed = 0
    for index in range(150):
        known, renamed_scene = told_scene(index), told_scene(index, other_names=True)
        (text, asked), (other, renamed_questions) = ((t.text, t.questions) for t in (known, renamed_scene))
        renamed += text != other
        words, others = (re.findall(r"\w+", re.sub(r"\b[Aa]n?\b", "a", told)) for told in (text, other))
        names = dict(zip(words, others, strict=True))
        changed = {old: new for old, new in names.items() if old != new}
        assert set(changed) <= {*COLORS, *SHAPES}
        assert len(set(names.values())) == len(names)
        said_of_things = [[" ".join(changed.get(w, w) for w in word.split()) for word in t] for t in known.things]
        assert renamed_scene.things == said_of_things
        assert [q.kind for q in renamed_questions] == [q.kind for q in asked]
        for q, other_q in zip(asked, renamed_questions, strict=True):
            assert other_q.answer == " ".join(changed.get(word, word) for word in q.answer.split()), (q, other_q)
        said = " ".join([other, *(f"{q.question} {q.sentence}" for q in renamed_questions)])
        assert not [name for name in HELD_OUT_NAMES if name in said]
        assert not re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]", said)
    assert renamed > 145  # a draw may leave the names that occur as they are
