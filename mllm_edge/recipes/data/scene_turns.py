"""Dialogues about scenes."""

from __future__ import annotations

import numpy as np

from mllm_edge.scenes import questions
from mllm_edge.scenes.brief import attributes, telegram, terse
from mllm_edge.scenes.captions import caption
from mllm_edge.scenes.model import Scene, pick
from mllm_edge.scenes.questions import draw_questions, placed_questions, without_colors

DESCRIBE = ("Describe the picture.", "What do you see?", "What is in the picture?")
DESCRIBED = 0.3  # share of scenes with a question for a description
TELEGRAMS = 10  # per sample; also the number of terse questions
RELATIONS = 1  # questions about relations per picture; they are learned last


def dialogue(scene: Scene, rng: np.random.Generator, turns: int) -> list[tuple[str, str]]:
    """A conversation about a scene: up to `turns` questions, most of them asking for a short answer, sometimes a
    description first. Only the first turn carries the picture."""
    asked = draw_questions(questions(scene, rng), rng, turns)
    result = [question.asked(short=rng.random() < 0.6) for question in asked]
    if rng.random() < DESCRIBED or not result:
        result.insert(0, (pick(rng, DESCRIBE), caption(scene, rng)))
    first, *rest = result
    return [("<image>\n" + first[0], first[1]), *rest]


def single_turns(scene: Scene, rng: np.random.Generator, number: int, colors: bool) -> list[tuple[str, str]]:
    """Up to `number` conversations of one turn each about the same scene; none mentions colors unless `colors`."""
    # Each worded twice, and fewer for scenes with few objects: otherwise the kinds with one question per object run out
    # and count questions take their place.
    pool = questions(scene, rng) + questions(scene, rng) + placed_questions(scene, rng)
    asked = list({q.question: q for q in (pool if colors else without_colors(pool))}.values())
    number = min(number, 2 + 2 * len(scene.objects))
    drawn = draw_questions([question for question in asked if question.is_relation], rng, RELATIONS)
    drawn += draw_questions([question for question in asked if not question.is_relation], rng, number - len(drawn))
    turns = [question.asked(short=rng.random() < 0.75) for question in drawn]
    if colors and rng.random() < DESCRIBED:
        turns[-1] = pick(rng, DESCRIBE), caption(scene, rng)
    return [("<image>\n" + question, answer) for question, answer in turns]


def brief_turns(scene: Scene, rng: np.random.Generator, colors: bool, telegrams: bool) -> list[tuple[str, str]]:
    """Telegrams or terse questions about a scene, none twice; none mentions colors unless `colors`."""
    if telegrams:
        things = [[word for word in attributes(item) if colors or word != item.color] for item in scene.objects]
        turns = [telegram(things, rng) for _ in range(TELEGRAMS)]
    else:
        pool = questions(scene, rng) + questions(scene, rng) + placed_questions(scene, rng)
        asked = [question for question in (pool if colors else without_colors(pool)) if not question.is_relation]
        turns = [terse(question) for question in draw_questions(asked, rng, TELEGRAMS)]
    return list(dict.fromkeys(turns))
