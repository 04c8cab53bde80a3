"""Text scores: exact match, METEOR (nltk's, without WordNet), CIDEr-D, VQA accuracy."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

from mllm_edge.errors import MissingPackage

LONGEST = 4  # n-grams
SIGMA = 6.0  # of CIDEr-D's Gaussian penalty on length differences


def words(text: str) -> list[str]:
    """Lower-case words without punctuation."""
    return re.findall(r"[\w']+", text.lower())


def exact(found: str, wanted: Sequence[str]) -> bool:
    """Whether a text equals one of `wanted`, ignoring case, white space and punctuation."""
    return words(found) in [words(text) for text in wanted]


_NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def vqa(found: str, given: Sequence[str]) -> float:
    """VQA accuracy (Antol et al. 2015): 1 if three of the others said the same, averaged over leaving out each person.

    Words are compared in lower case without punctuation and articles, numbers up to ten as digits.
    """
    said, others = _answer(found), [_answer(text) for text in given]
    if len(others) < 2:
        return float(said in others)
    same = others.count(said)
    return sum(min(1.0, (same - (other == said)) / 3) for other in others) / len(others)


def _answer(text: str) -> list[str]:
    kept = [word for word in words(text) if word not in ("a", "an", "the")]
    return [str(_NUMBERS.index(word)) if word in _NUMBERS else word for word in kept]


def meteor(found: str, wanted: Sequence[str]) -> float:
    """METEOR (Banerjee & Lavie 2005) with exact and stem matches, without synonyms: their lexicon (WordNet) would be a
    download. Scores are a little below the original's.

    Raises:
        MissingPackage: nltk is not installed.
    """
    try:
        from nltk.translate.meteor_score import meteor_score  # type: ignore[import-untyped]
    except ModuleNotFoundError:
        raise MissingPackage("nltk", "eval") from None
    return float(meteor_score([words(text) for text in wanted], words(found), wordnet=_NoSynonyms()))


class _NoSynonyms:
    """In place of nltk's WordNet."""

    def synsets(self, word: str) -> list[str]:
        return []


def cider(found: Sequence[str], wanted: Sequence[Sequence[str]]) -> float:
    """CIDEr-D of a whole set (Vedantam et al. 2015): mean over n of the similarity of n-gram vectors, times 10.

    N-grams common to many pictures' references weigh little (tf-idf), so scores of different sets are not comparable.
    No maintained Python package has it without Java; a test compares this one with hand-computed values.

    Args:
        found: one text per picture.
        wanted: the references of each picture.
    """
    references = [[_grams(text) for text in texts] for texts in wanted]
    frequency: Counter[tuple[str, ...]] = Counter()
    for grams in references:
        frequency.update({gram for counts in grams for gram in counts})
    pictures = math.log(max(len(found), 1))

    def vectors(counts: Counter[tuple[str, ...]]) -> list[dict[tuple[str, ...], float]]:
        found: list[dict[tuple[str, ...], float]] = [{} for _ in range(LONGEST)]
        for gram, count in counts.items():
            found[len(gram) - 1][gram] = count * (pictures - math.log(max(1, frequency[gram])))
        return found

    scores = []
    for text, grams in zip(found, references, strict=True):
        counts = _grams(text)
        mine, length = vectors(counts), _bigrams(counts)
        each = [_similarity(mine, vectors(other), length - _bigrams(other)) for other in grams]
        scores.append(10 * sum(each) / len(each) if each else 0.0)
    return sum(scores) / len(scores) if scores else 0.0


def _similarity(a: list[dict[tuple[str, ...], float]], b: list[dict[tuple[str, ...], float]], longer: int) -> float:
    total = 0.0
    for mine, other in zip(a, b, strict=True):
        shared = sum(min(value, other[gram]) * other[gram] for gram, value in mine.items() if gram in other)
        sizes = math.sqrt(sum(v * v for v in mine.values())) * math.sqrt(sum(v * v for v in other.values()))
        total += shared / sizes if sizes else 0.0
    return total / LONGEST * math.exp(-(longer**2) / (2 * SIGMA**2))


def _grams(text: str) -> Counter[tuple[str, ...]]:
    parts = words(text)
    return Counter(tuple(parts[i : i + n]) for n in range(1, LONGEST + 1) for i in range(len(parts) - n + 1))


def _bigrams(counts: Counter[tuple[str, ...]]) -> int:
    """The length as compared by the reference code: the number of bigrams."""
    return sum(count for gram, count in counts.items() if len(gram) == 2)
