"""A toy system on an encoder-decoder: T5 in three ONNX graphs, beams, a stage that reads question, task and picture.

Expectations come from transformers' own T5 and its `generate`, not from our modules.
"""

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from toys import PATCHES, PIXEL_SPEC, PIXELS, Patches, letters, noise_picture, register, seeded

import mllm_edge
from mllm_edge.bundle.manifest import Generation, Prompt, Slot, TensorSpec, Tokenizer
from mllm_edge.bundle.read import read_manifest
from mllm_edge.bundle.sources import Task, Text
from mllm_edge.errors import BadInput
from mllm_edge.export.export import export
from mllm_edge.models.plan import Checkpoint, ExportPlan, LanguageModelExport, StageExport
from mllm_edge.runtime.preprocess import preprocess

WIDTH, HEADS, HEAD, LAYERS, VOCABULARY, CONTEXT, QUESTION = 32, 2, 16, 2, 33, 64, 12


class Dims:
    """The counts of the toy."""

    vocabulary, width, context, layers, kv_width, attention_width = VOCABULARY, WIDTH, CONTEXT, LAYERS, WIDTH, WIDTH
    weights = product_weights = prompt_weights = 50_000


def t5() -> transformers.T5ForConditionalGeneration:
    torch.manual_seed(5)
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        d_kv=HEAD,
        d_ff=48,
        num_layers=LAYERS,
        num_decoder_layers=LAYERS,
        num_heads=HEADS,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
        initializer_factor=1.0,
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "shared" not in name:
                weight.normal_(std=0.4 if "lm_head" in name else 0.3)  # answers that differ
        model.lm_head.weight[1] *= 2  # and end
    return model


class Embed(nn.Module):
    def __init__(self, model: Any):
        super().__init__()
        self.table = model.shared

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids)  # [B,T,D]


def _heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, HEAD)).transpose(1, 2)  # [B,T,D] -> [B,H,T,d]


class Encoder(nn.Module):
    """T5's encoder, then keys and values of each decoder layer's cross attention."""

    def __init__(self, model: Any):
        super().__init__()
        self.encoder = model.encoder
        self.cross = nn.ModuleList(block.layer[1].EncDecAttention for block in model.decoder.block)

    def forward(self, embeds: Tensor) -> tuple[Tensor, ...]:
        states = self.encoder(inputs_embeds=embeds).last_hidden_state
        return tuple(_heads(part(states)) for attention in self.cross for part in (attention.k, attention.v))


class Decoder(nn.Module):
    """T5's decoder over given keys and values (Raffel et al. 2020; transformers modeling_t5.py)."""

    def __init__(self, model: Any):
        super().__init__()
        self.decoder, self.head = model.decoder, model.lm_head

    def forward(
        self,
        embeds: Tensor,
        length: Tensor,
        cross_key_0: Tensor,
        cross_value_0: Tensor,
        cross_key_1: Tensor,
        cross_value_1: Tensor,
        past_key_0: Tensor,
        past_value_0: Tensor,
        past_key_1: Tensor,
        past_value_1: Tensor,
    ) -> tuple[Tensor, ...]:
        cross = [(cross_key_0, cross_value_0), (cross_key_1, cross_value_1)]
        past = [(past_key_0, past_value_0), (past_key_1, past_value_1)]
        x = embeds  # [B,T,D]
        here = length[:, None] + torch.arange(embeds.shape[1])[:, None]  # [T,1]
        held = torch.arange(past_key_0.shape[2])[None]  # [1,C]
        there = torch.cat([held, here.T], 1)  # [1,C+T]
        unseen = torch.cat([(held >= length).expand(len(here), -1), here < here.T], 1)  # [T,C+T]
        first = self.decoder.block[0].layer[0].SelfAttention
        buckets = first._relative_position_bucket(
            there - here, False, first.relative_attention_num_buckets, first.relative_attention_max_distance
        )
        bias = first.relative_attention_bias(buckets).permute(2, 0, 1)[None]  # [1,H,T,C+T]
        bias = bias.masked_fill(unseen, torch.finfo(torch.float32).min)
        new: list[Tensor] = []
        for block, (keys, values), (k, v) in zip(self.decoder.block, past, cross, strict=True):
            own, other = block.layer[0], block.layer[1]
            y = own.layer_norm(x)
            new += [_heads(own.SelfAttention.k(y)), _heads(own.SelfAttention.v(y))]
            keys, values = torch.cat([keys, new[-2]], 2), torch.cat([values, new[-1]], 2)  # [B,H,C+T,d]
            x = x + own.SelfAttention.o(_attended(own.SelfAttention.q(y), keys, values, bias))
            x = x + other.EncDecAttention.o(_attended(other.EncDecAttention.q(other.layer_norm(x)), k, v, 0.0))
            x = block.layer[2](x)
        hidden = self.decoder.final_layer_norm(x)
        return self.head(hidden[:, -1]), hidden, *new


def _attended(query: Tensor, keys: Tensor, values: Tensor, bias: Any) -> Tensor:
    scores = _heads(query) @ keys.transpose(-1, -2) + bias  # T5 does not scale; [B,H,T,S]
    return (scores.softmax(-1) @ values).transpose(1, 2).flatten(2)  # [B,T,D]


class Seer(nn.Module):
    """A picture's rows, moved by the question's and the task's embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = Patches(WIDTH)
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.tasks = nn.Embedding(2, WIDTH)

    def forward(self, toy_pixels: Tensor, question: Tensor, task: Tensor) -> Tensor:
        heard = (self.words(question) * (question != 0).unsqueeze(-1)).sum(1, keepdim=True)  # [1,1,D]
        return self.patches(toy_pixels) + heard + self.tasks(task)[:, None]  # [1,N,D]


class Reference:
    """transformers' T5 as verification asks it."""

    def __init__(self) -> None:
        self.model = t5()

    def embed(self, ids: Sequence[int]) -> np.ndarray:
        return self.model.shared.weight[list(ids)].detach().numpy()

    @torch.no_grad()
    def forced(self, prompt: np.ndarray, tokens: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        given = torch.tensor([[0, *tokens]])
        result = self.model(
            inputs_embeds=torch.from_numpy(prompt)[None], decoder_input_ids=given, output_hidden_states=True
        )
        return result.logits[0].numpy(), result.decoder_hidden_states[-1][0].numpy()

    def generate(self, prompt: np.ndarray, most: int, is_end: Callable[[int], bool] = lambda _: False) -> list[int]:
        tokens: list[int] = []
        while len(tokens) < most and not (tokens and is_end(tokens[-1])):
            tokens.append(int(self.forced(prompt, tokens)[0][-1].argmax()))
        return tokens


def plan(checkpoint: Checkpoint) -> ExportPlan:
    def cache(name: str, batch: int | str, length: str) -> list[TensorSpec]:
        return [
            TensorSpec(f"{name}_{kind}_{layer}", "float32", [batch, HEADS, length, HEAD])
            for layer in range(LAYERS)
            for kind in ("key", "value")
        ]

    ids = TensorSpec("ids", "int64", ["beams", "tokens"])
    encoder = TensorSpec("embeds", "float32", [1, "prompt", WIDTH])
    fp32 = ("fp32",)
    embeds, length = TensorSpec("embeds", "float32", ["beams", "tokens", WIDTH]), TensorSpec("length", "int64", [1])
    decoder = [embeds, length, *cache("cross", 1, "prompt"), *cache("past", "beams", "capacity")]
    outputs = [
        TensorSpec("logits", "float32", ["beams", VOCABULARY]),
        TensorSpec("hidden", "float32", ["beams", "tokens", WIDTH]),
        *cache("new", "beams", "tokens"),
    ]
    parts = [
        StageExport("embed", lambda: Embed(t5()), [ids], [embeds], fp32),
        StageExport("encoder", lambda: Encoder(t5()), [encoder], cache("cross", 1, "prompt"), fp32),
        StageExport("decoder", lambda: Decoder(t5()), decoder, outputs, fp32),
    ]
    seer = StageExport(
        "seer",
        seeded(Seer, 3),
        [PIXEL_SPEC, TensorSpec("question", "int64", [1, QUESTION]), TensorSpec("task", "int64", [1])],
        [TensorSpec("rows", "float32", [1, PATCHES, WIDTH])],
    )
    return ExportPlan(
        tasks=["short", "long"],
        sources=[PIXELS, Text("question", "letters", QUESTION, cut="right"), Task("task", {"short": 0, "long": 1})],
        stages=[seer],
        tokenizers=[Tokenizer("letters", "json", "tokenizer.json", ends=["</s>"])],
        language_model=LanguageModelExport(
            Dims(), checkpoint.tokenizer, Reference, kind="seq2seq", parts=parts, start=0, tokenizer_name="letters"
        ),
        prompt=Prompt(
            "toy", "", "{text}</s>", "{text}</s>", "{text}", [], [Slot("<image>", "pixels", ["rows"], joint="<image>")]
        ),
        generation=Generation(max_tokens=16),
        licences={},
        files={"tokenizer.json": checkpoint.tokenizer / "tokenizer.json"},
        question="what is it?",
        examples={
            "question": np.array([_question("what is it?")], np.int64),
            "task": np.array([0], np.int64),
        },
    )


def _question(text: str) -> list[int]:
    """By hand: a space is 2, a is 3, and so on; `</s>` 1 at the end; padded with 0."""
    order = " abcdefghijklmnopqrstuvwxyz.,:?"
    ids = [2 + order.index(letter) for letter in text][: QUESTION - 1]
    return [*ids, 1, *[0] * (QUESTION - 1 - len(ids))]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        folder = letters(tmp_path_factory.mktemp("letters"))
        register(patch, Dims(), plan)
        return export("toy", str(folder), quant="fp32", out=tmp_path_factory.mktemp("seq2seq") / "toy.bundle")


def prompt(question: str, task: int, picture: np.ndarray) -> Tensor:
    """What T5's encoder reads, by hand: [1,N+T,D]."""
    with torch.no_grad():
        pixels = torch.from_numpy(preprocess(Image.fromarray(picture), PIXELS))
        rows = seeded(Seer, 3)()(pixels, torch.tensor([_question(question)]), torch.tensor([task]))
        order = " abcdefghijklmnopqrstuvwxyz.,:?"
        ids = torch.tensor([[2 + order.index(letter) for letter in question] + [1]])
        return torch.cat([rows, t5().shared(ids)], 1)


def test_every_row_of_parity_passes(bundle: Path) -> None:
    rows = {row.name: row for row in read_manifest(bundle).parity}
    assert set(rows) == {"seer", "language_model", "end_to_end"}
    assert all(row.passed for row in rows.values())
    assert rows["language_model"].measured["cosine"] > 0.99999
    assert rows["end_to_end"].tolerance == {"agreement": 1.0}


@pytest.mark.parametrize("task", ["short", "long"])
@pytest.mark.parametrize("seed", range(4))
def test_three_beams_are_those_of_transformers(bundle: Path, seed: int, task: str) -> None:
    question, picture = ["what is it?", "how many?", "where: a, b", "the red one."][seed], noise_picture(seed)
    for penalty in (1.0, 0.5, 2.0):
        expected = (
            t5()
            .generate(
                inputs_embeds=prompt(question, ["short", "long"].index(task), picture),
                num_beams=3,
                max_new_tokens=16,
                do_sample=False,
                length_penalty=penalty,
                eos_token_id=1,
                pad_token_id=0,
            )[0, 1:]
            .tolist()
        )
        while expected and expected[-1] == 0:
            expected.pop()
        with mllm_edge.load(bundle, threads=1) as model:
            answer = model.generate(question, picture, task=task, beams=3, length_penalty=penalty, max_tokens=16)
        assert answer.tokens.ids == expected


def test_greedy_is_that_of_transformers_and_depends_on_question_task_and_picture(bundle: Path) -> None:
    seen = set()
    with mllm_edge.load(bundle, threads=1) as model:
        for question, task, number in (
            ("what?", "short", 0),
            ("who?", "short", 0),
            ("what?", "long", 0),
            ("what?", "short", 1),
        ):
            picture = noise_picture(number)
            expected = (
                t5()
                .generate(
                    inputs_embeds=prompt(question, ["short", "long"].index(task), picture),
                    max_new_tokens=12,
                    do_sample=False,
                    num_beams=1,
                    eos_token_id=1,
                )[0, 1:]
                .tolist()
            )
            assert model.generate(question, picture, task=task, max_tokens=12).tokens.ids == expected
            seen.add(tuple(expected))
    assert len(seen) > 1


def test_it_runs_without_llama_cpp_torch_and_transformers(bundle: Path, tmp_path: Path) -> None:
    Image.fromarray(noise_picture(0)).save(tmp_path / "noise.png")
    program = (
        "import sys\n"
        "for name in ('llama_cpp', 'torch', 'transformers', 'onnx', 'gguf'): sys.modules[name] = None\n"
        "from mllm_edge.cli import main\n"
        f"sys.exit(main(['run', {str(bundle)!r}, 'what is it?', '--image', {str(tmp_path / 'noise.png')!r}, "
        "'--task', 'long', '--beams', '3', '--threads', '1', '--json']))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert '"text"' in done.stdout


def test_what_cannot_be_asked_is_said(bundle: Path) -> None:
    with mllm_edge.load(bundle, threads=1) as model:
        with pytest.raises(BadInput, match="there is no task 'tall'; this bundle has short, long"):
            model.generate("what?", noise_picture(0), task="tall")
        with pytest.raises(BadInput, match="beams is 0; it must be 1"):
            model.generate("what?", noise_picture(0), beams=0)
        with pytest.raises(BadInput, match="the prompt has 1 <image> placeholder"):
            model.generate("<image>what?")
