import contextlib
import dataclasses
import types

import numpy as np
import pytest
import torch
from PIL import Image
from toy_system import DIMS, PROMPT, TOKENIZER, ToySystem, decoder, fake_gguf, register

from mllm_edge.bundle.manifest import Manifest, StageEntry
from mllm_edge.bundle.read import file_entry, read_manifest, write_manifest
from mllm_edge.errors import BadInput, MllmEdgeError, OutOfTolerance
from mllm_edge.export.verify import stages as stages_module
from mllm_edge.export.verify import verify as verify_module
from mllm_edge.export.verify.difference import compare, parity
from mllm_edge.export.verify.samples import Samples, pictures
from mllm_edge.export.verify.verify import require, verify, verify_bundle
from mllm_edge.runtime.preprocess import preprocess
from mllm_edge.runtime.prompt import render, tokenized


class Bytes:
    """A tokenizer whose tokens are bytes."""

    bos, control_tokens, user_defined = 1, {}, {}

    def tokenize(self, text):
        return [byte % DIMS.vocabulary for byte in text.encode()]


class Decoder:
    """A language model of the runtime, played by PyTorch. `noise` is added to its logits."""

    def __init__(self, noise):
        self.reference, self.noise, self.past = decoder(), noise, None

    def embed(self, ids):
        return self.reference.get_input_embeddings().weight.detach()[ids].numpy()

    def prefill(self, embeds, keep=0, state=False):
        assert keep == 0
        return self._run(inputs_embeds=torch.from_numpy(embeds)[None])

    def extend(self, ids, states=0):
        return self._run(input_ids=torch.tensor([ids]), past_key_values=self.past)

    def _run(self, **inputs):
        with torch.no_grad():
            result = self.reference(use_cache=True, **inputs)
        self.past = result.past_key_values
        logits = result.logits[0, -1].numpy()
        return types.SimpleNamespace(logits=logits + self.noise * np.sin(np.arange(len(logits)), dtype=np.float32))


class Engine:
    """A stage's module in the place of its engine."""

    def __init__(self, stage, spoil):
        self.stage, self.module, self.spoil, self.closed = stage, stage.module(), spoil, False

    def __call__(self, **feed):
        assert not self.closed
        with torch.no_grad():
            (value,) = (torch.from_numpy(feed[spec.name]) for spec in self.stage.inputs)
            return {self.stage.outputs[0].name: self.spoil(self.module(value).numpy())}

    def close(self):
        self.closed = True


class Runtime:
    """A loaded bundle whose stages are the plan's modules. `spoil` changes a stage's output."""

    def __init__(self, manifest, plan, spoil, noise):
        self.manifest, self.plan, self.tokenizer = manifest, plan, Bytes()
        self.stages = {stage.name: Engine(stage, spoil.get(stage.name, lambda x: x)) for stage in plan.stages}
        self.language_model = Decoder(noise)

    def prompt_embeds(self, prompt, image):
        (source,) = self.plan.sources
        features = self.stages["vision_encoder"](pixel_values=preprocess(Image.fromarray(image), source))
        lm = self.language_model
        before, after = "USER: ", f"\n{prompt} ASSISTANT:"
        ids = [self.tokenizer.bos, *self.tokenizer.tokenize(before)], self.tokenizer.tokenize(after)
        return np.concatenate(
            [lm.embed(ids[0]), self.stages["connector"](**features)["image_embeds"][0], lm.embed(ids[1])]
        )

    def prompt_parts(self, prompt, image):
        first, *others = tokenized(render(PROMPT, prompt, {"pixels": 1}), self.tokenizer)
        return [[self.tokenizer.bos, *first], *others]

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        pass


@dataclasses.dataclass
class Toy:
    system: ToySystem
    folder: object
    spoil: dict
    noise: float = 0.0

    def checkpoint(self):
        return self.system.load(self.folder)

    def plan(self):
        return self.system.plan(self.checkpoint())

    def verify(self):
        return {row.name: row for row in verify(self.folder, self.checkpoint(), self.plan(), pictures(2))}


@pytest.fixture
def toy(tmp_path, monkeypatch):
    system = ToySystem(tmp_path)
    register(monkeypatch, system)
    folder = tmp_path / "toy.bundle"
    folder.mkdir()
    toy = Toy(system, folder, {})
    write_bundle(toy, "fp32", "f32")
    monkeypatch.setattr(
        verify_module,
        "load",
        lambda folder, target=None, **_: Runtime(read_manifest(folder), toy.plan(), toy.spoil, toy.noise),
    )
    opened = []

    def engine(path, entry, options):
        assert path.name == entry.file and options.target == "cpu"
        assert all(earlier.closed for earlier in opened)  # one at a time is in memory
        opened.append(Runtime(None, toy.plan(), toy.spoil, 0.0).stages[entry.name])
        return opened[-1]

    monkeypatch.setattr(stages_module, "STAGE_ENGINES", {"onnx": engine})
    monkeypatch.setattr(verify_module, "assert_same_tokens", lambda gguf, tokenizer: None)
    monkeypatch.setattr(verify_module, "require_sound", lambda gguf: None)
    return toy


def write_bundle(toy, precision, quant):
    plan = toy.plan()
    stages = []
    for stage in plan.stages:
        (toy.folder / f"{stage.name}.onnx").write_bytes(b"x")
        entry = file_entry(toy.folder, f"{stage.name}.onnx")
        stages.append(
            StageEntry(
                **vars(entry),
                name=stage.name,
                engine="onnx",
                precision=precision,
                inputs=stage.inputs,
                outputs=stage.outputs,
            )
        )
    write_manifest(
        Manifest(
            system="toy",
            config="small",
            target="cpu",
            created="",
            tool_version="0",
            licences={},
            source=toy.checkpoint().source,
            tasks=[],
            sources=plan.sources,
            stages=stages,
            tokenizers=plan.tokenizers,
            language_model=fake_gguf(plan.language_model, toy.folder / TOKENIZER.file, quant),
            prompt=PROMPT,
            generation=plan.generation,
        ),
        toy.folder,
    )


def test_compare_by_hand():
    measured = compare(np.array([[3.0, 4.5]]), np.array([[3.0, 4.0]]))
    assert measured["max_abs"] == 0.5
    assert measured["relative_max"] == 0.125
    assert measured["cosine"] == pytest.approx((9 + 18) / (5 * np.sqrt(9 + 20.25)))


def test_compare_refuses_other_shapes():
    with pytest.raises(MllmEdgeError, match=r"\(2,\) where PyTorch gives \(3,\)"):
        compare(np.zeros(2), np.zeros(3))


def test_zeros_are_equal_to_zeros_only():
    assert compare(np.zeros(2), np.zeros(2)) == {"cosine": 1.0, "max_abs": 0.0, "relative_max": 0.0}
    assert compare(np.ones(2), np.zeros(2))["cosine"] == 0.0


def test_a_row_passes_on_its_limits_and_never_with_nan():
    limits = {"cosine": 0.9, "relative_max": 0.1}
    assert parity("a", {"cosine": 0.9, "relative_max": 0.1}, limits).passed
    assert not parity("a", {"cosine": 0.89, "relative_max": 0.1}, limits).passed
    assert not parity("a", {"cosine": 0.9, "relative_max": 0.11}, limits).passed
    assert not parity("a", {"cosine": float("nan"), "relative_max": 0.0}, limits).passed
    assert not parity("a", {"cosine": 1.0, "relative_max": float("nan")}, limits).passed


def test_require_lists_failures_worst_first_in_one_line():
    rows = [
        parity("near", {"cosine": 0.85}, {"cosine": 0.9}),
        parity("fine", {"cosine": 0.95}, {"cosine": 0.9}),
        parity("far", {"relative_max": 7.0}, {"relative_max": 0.1}),
    ]
    with pytest.raises(OutOfTolerance) as caught:
        require(rows)
    assert str(caught.value).startswith(
        "out of tolerance: far relative_max 7 (at most 0.1); near cosine 0.85 (at least 0.9); "
    )
    assert "fine" not in str(caught.value) and "\n" not in str(caught.value)
    require(rows[1:2])


def test_samples_are_what_the_modules_give(toy):
    plan = toy.plan()
    samples = Samples(plan, pictures(2))
    vision, connector = plan.stages
    pixels = samples.inputs(vision)[1]["pixel_values"]
    assert pixels.shape == (1, 3, 32, 32) and pixels.dtype == np.float32
    assert toy.system.built == {"vision_encoder": 0, "connector": 0}
    with torch.no_grad():
        features = vision.module()(torch.from_numpy(pixels))
        embeds = connector.module()(features)
    np.testing.assert_array_equal(samples.inputs(connector)[1]["image_features"], features.numpy())
    np.testing.assert_array_equal(samples.outputs(connector)[1]["image_embeds"], embeds.numpy())
    samples.inputs(connector)
    assert toy.system.built == {"vision_encoder": 2, "connector": 2}  # once here, once for the samples


def test_stage_without_a_source_for_its_input_is_named(toy):
    plan = toy.plan()
    orphan = dataclasses.replace(plan, stages=plan.stages[1:])
    with pytest.raises(BadInput, match="connector reads image_features"):
        Samples(orphan, pictures(1)).inputs(orphan.stages[0])


def test_pictures_differ_and_repeat():
    first, second = pictures(2)
    assert first.shape == (256, 256, 3) and first.dtype == np.uint8
    assert (first != second).any()
    np.testing.assert_array_equal(pictures(1, first=1)[0], second)


def test_faithful_bundle_passes_everywhere(toy):
    rows = toy.verify()
    assert list(rows) == ["vision_encoder", "connector", "language_model", "end_to_end"]
    assert all(row.passed for row in rows.values())
    assert rows["connector"].measured["max_abs"] == 0.0
    assert rows["language_model"].measured["top1"] == 1.0
    assert rows["end_to_end"].measured == {"tokens": 16.0, "agreement": 1.0}
    assert rows["end_to_end"].tolerance == {"agreement": 1.0}


def test_only_the_bad_stage_fails_and_the_end_shows_it(toy):
    toy.spoil["vision_encoder"] = lambda x: x + 50 * np.roll(x, 1, axis=1)
    rows = toy.verify()
    assert not rows["vision_encoder"].passed
    assert rows["connector"].passed and rows["language_model"].passed  # these get the reference's inputs
    assert not rows["end_to_end"].passed


def test_nan_in_a_stage_fails(toy):
    toy.spoil["connector"] = lambda x: x * np.float32(np.nan)
    row = toy.verify()["connector"]
    assert not row.passed and np.isnan(row.measured["cosine"])


def test_noisy_logits_fail_where_the_quantization_does_not_explain_them(toy):
    toy.noise = 0.05
    rows = toy.verify()
    assert not rows["language_model"].passed
    assert rows["language_model"].measured["max_abs"] == pytest.approx(0.05, rel=0.01)
    write_bundle(toy, "fp32", "q4_k_m")
    rows = toy.verify()
    assert rows["language_model"].passed
    assert rows["end_to_end"].tolerance == {}  # a close decision may turn; it is measured and told


@pytest.mark.parametrize(("quant", "kept"), [("q8_0", False), ("f32", True)])
def test_random_weights_are_held_to_their_numbers_not_to_their_favorite_tokens(toy, quant, kept):
    write_bundle(toy, "fp32", quant)
    manifest = read_manifest(toy.folder)
    assert "top1" in toy.verify()["language_model"].tolerance
    write_manifest(dataclasses.replace(manifest, source={"kind": "random"}), toy.folder)
    row = toy.verify()["language_model"]
    assert ("top1" in row.tolerance) == kept and {"cosine", "relative_max"} < row.tolerance.keys() | {"top1"}
    assert "top1" in row.measured


def test_language_model_is_left_out_when_memory_is_short(toy, monkeypatch):
    monkeypatch.setattr(verify_module, "available_memory", lambda: 1000)
    monkeypatch.setattr(verify_module, "load", None)  # which would take the memory that is short
    with pytest.warns(UserWarning, match="language model is not verified"):
        assert list(toy.verify()) == ["vision_encoder", "connector"]


@pytest.mark.parametrize(("beyond", "fits"), [(0, False), (1, True)])
def test_memory_is_that_of_the_language_model_and_one_table(toy, monkeypatch, beyond, fits):
    # two layers (attention 32x32 + 2 of 16x32 + 32x32, MLP 3 of 64x32), head and table 96x32; the table once more
    weights = 2 * (3072 + 6144) + 2 * 3072
    monkeypatch.setattr(verify_module, "available_memory", lambda: 4 * (weights + 3072) + beyond)
    with contextlib.nullcontext() if fits else pytest.warns(UserWarning, match="not verified"):
        assert ("language_model" in toy.verify()) == fits


def test_result_is_written_into_the_manifest(toy):
    rows = verify_bundle(toy.folder)
    assert read_manifest(toy.folder).parity == rows
    toy.spoil["connector"] = lambda x: -x
    with pytest.raises(OutOfTolerance, match="connector cosine -1"):
        verify_bundle(toy.folder)
    assert [row.passed for row in read_manifest(toy.folder).parity] == [True, False, True, False]


def test_a_checkpoint_that_is_gone_is_asked_of_no_hub(toy, monkeypatch):
    def resolve(*args):
        raise AssertionError("it was looked for elsewhere")

    monkeypatch.setattr(verify_module, "resolve", resolve)
    manifest = read_manifest(toy.folder)
    gone = {**manifest.source, "path": "somebody/model"}
    write_manifest(dataclasses.replace(manifest, source=gone), toy.folder)
    with pytest.raises(BadInput, match=r"somebody/model, which the bundle was made from, is not there"):
        verify_bundle(toy.folder)


def test_other_weights_are_refused(toy):
    toy.system.source = "b"
    with pytest.raises(BadInput, match="made from other weights"):
        verify_bundle(toy.folder, str(toy.folder))
    assert read_manifest(toy.folder).parity == []


def test_other_tokens_stop_the_verification(toy, monkeypatch):
    def differ(gguf, tokenizer):
        assert (gguf, tokenizer) == (toy.folder / TOKENIZER.file, toy.system.tokenizer)
        raise OutOfTolerance("tokens differ")

    monkeypatch.setattr(verify_module, "assert_same_tokens", differ)
    with pytest.raises(OutOfTolerance, match="tokens differ"):
        toy.verify()
