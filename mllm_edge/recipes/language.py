"""Recipe task `language`: the small LLaMA learns the language of scenes, and its tokenizer is trained with it."""

from __future__ import annotations

import shutil
import string
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mllm_edge.errors import BadInput
from mllm_edge.models.llava import CONFIGS, PROMPTS, llama
from mllm_edge.recipes.conversation import Sample, Vocabulary, next_token_loss, pad
from mllm_edge.recipes.recipe import Recipe
from mllm_edge.recipes.scenes import SHORT, scene_text
from mllm_edge.recipes.weights import save_part

TOKENIZER = "tokenizer.model"
CORPUS = 2_000  # texts that the tokenizer is trained on
VALIDATION = 10_000_000  # texts from here on are never trained on


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

    def forward(self, ids: Tensor, labels: Tensor, mask: Tensor) -> dict[str, Tensor]:
        logits = self.language_model(input_ids=ids, attention_mask=mask).logits
        return {"loss": next_token_loss(logits, labels)}


class LanguageTask:
    """Next-token training on scene texts packed to `data.length` tokens."""

    def __init__(self, recipe: Recipe):
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.dims = CONFIGS[recipe.config]
        self.length = int(recipe.data.get("length", 192))
        self.tokenizer = Path(recipe.out) / TOKENIZER
        if not self.tokenizer.is_file():
            self.tokenizer.parent.mkdir(parents=True, exist_ok=True)
            train_tokenizer(self.tokenizer, self.dims.language.vocabulary, self._corpus())
        self.vocabulary = sentencepiece_vocabulary(self.tokenizer)
        self.model = LanguageModel(llama(self.dims.language))

    def _corpus(self) -> Iterator[str]:
        """Scene texts, and between them the words of the chat template. Newlines stay out: as in LLaMA's vocabulary
        they are bytes."""
        prompt = PROMPTS[self.dims.template]
        template = prompt.first.format(system=prompt.system, text=SHORT.strip())
        for index in range(CORPUS):
            yield scene_text(index, self.recipe.seed)
            if index % 20 == 0:
                yield template
        yield string.ascii_letters + string.digits + string.punctuation

    def parameters(self) -> list[dict[str, Any]]:
        return [{"params": list(self.model.parameters())}]

    def sample(self, index: int) -> Sample:
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
        """Loss per token on texts past those of training."""
        device = next(self.model.parameters()).device
        batch = self.collate([self.sample(VALIDATION // 8 + i) for i in range(samples)])
        return {"validation_loss": round(float(self.model(**{k: v.to(device) for k, v in batch.items()})["loss"]), 4)}

    def save(self, folder: Path, state: dict[str, Tensor]) -> None:
        save_part(folder, "language_model", asdict(self.dims.language), state, "language_model.", self.recipe.dtype)
        if folder != self.tokenizer.parent:
            shutil.copy(self.tokenizer, folder / TOKENIZER)
