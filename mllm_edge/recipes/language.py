"""Recipe task `language`: the small LLaMA learns the language of scenes, and its tokenizer is trained with it."""

from __future__ import annotations

import shutil
import string
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mllm_edge.errors import BadInput
from mllm_edge.models.llava import CONFIGS, PROMPTS, llama
from mllm_edge.recipes.conversation import (
    Sample,
    Vocabulary,
    encode_dialogue,
    next_token_loss,
    pad,
    predictions,
    share_prefix,
    visibility,
)
from mllm_edge.recipes.recipe import Recipe
from mllm_edge.recipes.scenes import SHORT, pick, scene_text, told_scene
from mllm_edge.recipes.weights import save_part

TOKENIZER = "tokenizer.model"
DESCRIBE = ("Describe the picture.", "What do you see?", "What is in the picture?")
DESCRIBED = 0.3  # share of scenes of which a description is asked too
CORPUS = 2_000  # texts that the tokenizer is trained on
VALIDATION = 10_000_000  # texts from here on are never trained on
ASKED = 0.85  # share of samples that are questions about a text; the others are texts


def train_tokenizer(path: Path, size: int, texts: Iterator[str]) -> None:
    """Train a LLaMA-style SentencePiece model (BPE, byte fallback, digits split) of `size` pieces.

    Raises:
        BadInput: `size` is more than the texts can fill.
    """
    import sentencepiece

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=texts,
            model_prefix=str(path.with_suffix("")),
            vocab_size=size,
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            character_coverage=1.0,
            allow_whitespace_only_pieces=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise BadInput(f"cannot train a tokenizer of {size} pieces ({error}); give a smaller vocabulary") from None
    path.with_suffix(".vocab").unlink()


def sentencepiece_vocabulary(path: Path) -> Vocabulary:
    """The tokenizer file as the trainers use it."""
    import sentencepiece

    if not path.is_file():
        raise BadInput(f"{path} is missing; run the recipe that trains the language model first")
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    eos: int = model.eos_id()
    return Vocabulary(model.encode, {model.id_to_piece(eos): eos}, model.bos_id(), pad=0)


class LanguageModel(nn.Module):
    """The decoder with its loss."""

    def __init__(self, decoder: nn.Module):
        super().__init__()
        self.language_model = decoder

    def forward(
        self, ids: Tensor, labels: Tensor, mask: Tensor, branches: Tensor | None = None, positions: Tensor | None = None
    ) -> dict[str, Tensor]:
        seen = visibility(mask, branches)
        logits = self.language_model(input_ids=ids, attention_mask=seen, position_ids=positions).logits
        with torch.no_grad():
            guesses, truths = predictions(logits, labels)
            right = (guesses.argmax(-1) == truths).float().mean()
        return {"loss": next_token_loss(logits, labels), "token_accuracy": right}


def plain_attention(decoder: Any) -> Any:
    """Choose the attention to train with: on a CPU plain products, whose gradients in bf16 take half the time of
    torch's fused kernel there."""
    if not torch.cuda.is_available():
        decoder.set_attn_implementation("eager")
    return decoder


class LanguageTask:
    """Next-token training on the language of scenes, in two forms.

    Texts packed to `data.length` tokens, and `data.questions` questions about a scene told in words, in the chat
    template and masked as in the stages that follow: there the decoder learns to look things up, which the loss on
    texts alone, most of whose words nothing foretells, hardly rewards.
    """

    def __init__(self, recipe: Recipe):
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.dims = CONFIGS[recipe.config]
        self.length = int(recipe.data.get("length", 256))
        self.questions = int(recipe.data.get("questions", 8))
        self.prompt = PROMPTS[self.dims.template]
        self.tokenizer = Path(recipe.out) / TOKENIZER
        if not self.tokenizer.is_file():
            self.tokenizer.parent.mkdir(parents=True, exist_ok=True)
            train_tokenizer(self.tokenizer, self.dims.language.vocabulary, self._corpus())
        self.vocabulary = sentencepiece_vocabulary(self.tokenizer)
        self.model = LanguageModel(plain_attention(llama(self.dims.language)))

    def _corpus(self) -> Iterator[str]:
        """Scene texts, and between them the words of the chat template. Newlines stay out: as in LLaMA's vocabulary
        they are bytes."""
        template = self.prompt.first.format(system=self.prompt.system, text=SHORT.strip())
        for index in range(CORPUS):
            yield scene_text(index, self.recipe.seed)
            if index % 4 == 0:
                yield told_scene(index, self.recipe.seed, other_names=True)[0]
            if index % 20 == 0:
                yield template
        yield string.ascii_letters + string.digits + string.punctuation

    def parameters(self) -> list[dict[str, Any]]:
        return [{"params": list(self.model.parameters())}]

    def sample(self, index: int) -> Sample:
        rng = np.random.default_rng([self.recipe.seed, 15, index])
        return self._asked(index, rng) if rng.random() < ASKED else self._told(index)

    def _asked(self, index: int, rng: np.random.Generator) -> Sample:
        text, questions = told_scene(index, self.recipe.seed, other_names=True)
        turns = [question.asked(short=rng.random() < 0.75) for question in questions[: self.questions]]
        if rng.random() < DESCRIBED:
            turns[-1] = pick(rng, DESCRIBE), text
        return share_prefix([self._turn(text, *turn) for turn in turns])

    def _turn(self, text: str, question: str, answer: str) -> Sample:
        turns = [(f"{text}\n{question}", answer)]
        return encode_dialogue(self.prompt, turns, self.vocabulary, 0, self.dims.language.context)

    def _told(self, index: int) -> Sample:
        ids: list[int] = []
        number = index * 8  # a sample never needs more than 8 texts, so samples share none
        while len(ids) < self.length:
            ids += [1, *self.vocabulary.ids(scene_text(number, self.recipe.seed)), 2]
            number += 1
        ids = ids[: self.length]
        return Sample(ids, ids)

    def collate(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        return pad(samples, self.vocabulary.pad)

    @torch.no_grad()
    def evaluate(self, samples: int) -> dict[str, float]:
        """Loss per token on texts past those of training, and the share of exact short answers about such texts
        (teacher-forced: every token of the answer is the most likely)."""
        device = next(self.model.parameters()).device
        loss: list[float] = []
        exact: list[float] = []
        for index in range(VALIDATION // 8, VALIDATION // 8 + samples):
            text, questions = told_scene(index, self.recipe.seed)
            asked = self._turn(text, *questions[0].asked(short=True))
            for sample, values, name in ((self._told(index), loss, "loss"), (asked, exact, "token_accuracy")):
                batch = {key: value.to(device) for key, value in self.collate([sample]).items()}
                values.append(float(self.model(**batch)[name]))
        return {
            "validation_loss": round(sum(loss) / samples, 4),
            "validation_exact": round(sum(value == 1 for value in exact) / samples, 4),
        }

    def save(self, folder: Path, state: dict[str, Tensor]) -> None:
        save_part(folder, "language_model", asdict(self.dims.language), state, "language_model.", self.recipe.dtype)
        if folder != self.tokenizer.parent:
            shutil.copy(self.tokenizer, folder / TOKENIZER)
