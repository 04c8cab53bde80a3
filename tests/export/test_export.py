import errno
import fcntl
import json
import os
import shutil

import pytest
from toy_system import ToySystem, fake_gguf, register

import mllm_edge
from mllm_edge import places
from mllm_edge.bundle.manifest import Parity
from mllm_edge.bundle.read import read_manifest
from mllm_edge.errors import BadInput, MllmEdgeError, OutOfTolerance
from mllm_edge.export import export as export_module
from mllm_edge.export import workplace
from mllm_edge.export.export import export
from mllm_edge.export.onnx.lower import export_stage


@pytest.fixture(scope="module")
def lowered(tmp_path_factory):
    """`export_stage` that lowers a stage once at each precision and copies the file from then on: it is slow."""
    folder = tmp_path_factory.mktemp("lowered")

    def export_once(stage, path, precision, calibration, for_tensorrt):
        kept = folder / f"{stage.name}.{precision}.{for_tensorrt}"
        if not kept.exists():
            assert export_stage(stage, kept, precision, calibration, for_tensorrt) == []
        shutil.copy(kept, path)
        return []

    return export_once


@pytest.fixture
def toy(tmp_path, monkeypatch, lowered):
    """The toy system; the language model's writer and the verification, tested elsewhere, are stand-ins."""
    system = ToySystem(tmp_path)
    register(monkeypatch, system)
    monkeypatch.setattr(export_module, "export_stage", lowered)
    monkeypatch.setattr(export_module, "export_language_model", fake_gguf)
    monkeypatch.setattr(export_module, "verify", lambda *_: [Parity("all", True, {"cosine": 1.0}, {"cosine": 0.9})])
    return system


@pytest.fixture
def out(tmp_path):
    return tmp_path / "deep" / "toy.bundle"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_bundle_is_complete_and_readable(toy, out):
    assert export("toy", quant="q8_0", precision="fp16", out=out) == out
    manifest = read_manifest(out)
    assert (manifest.system, manifest.config, manifest.target, manifest.source["sha256"]) == (
        "toy",
        "small",
        "cpu",
        "a",
    )
    assert [(stage.name, stage.file, stage.precision) for stage in manifest.stages] == [
        ("vision_encoder", "vision_encoder.onnx", "fp16"),
        ("connector", "connector.onnx", "fp16"),
    ]
    assert manifest.language_model.precision == "q8_0"
    assert manifest.parity == [Parity("all", True, {"cosine": 1.0}, {"cosine": 0.9})]
    assert names(out) == ["bundle.json", "connector.onnx", "language_model.gguf", "vision_encoder.onnx"]
    assert names(out.parent) == ["toy.bundle"]  # neither lock nor partial folder stays


def test_default_name_and_precision_by_target(toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert export("toy", target="cuda").name == "toy-small.bundle"
    manifest = read_manifest(tmp_path / "toy-small.bundle")
    assert manifest.target == "cuda" and {stage.precision for stage in manifest.stages} == {"fp16"}


def test_package_is_the_function_of_the_python_api(toy, out):
    assert mllm_edge.export("toy", out=out) == out


def test_stage_takes_the_precision_it_is_made_for(toy, out):
    export("toy", precision="int8", out=out)
    assert [stage.precision for stage in read_manifest(out).stages] == ["int8", "fp16"]


def test_every_step_is_reported_when_it_begins_and_ends(toy, out):
    seen = []
    export("toy", out=out, report=lambda *step: seen.append(step))
    assert (
        [step[:3] for step in seen[::2]]
        == [step[:3] for step in seen[1::2]]
        == [
            ("vision_encoder", 1, 4),
            ("connector", 2, 4),
            ("language_model", 3, 4),
            ("verify", 4, 4),
        ]
    )
    assert all(begin[3] is None and end[3] >= 0 for begin, end in zip(seen[::2], seen[1::2], strict=True))


@pytest.mark.parametrize("blow", [KeyboardInterrupt, RuntimeError])
def test_interrupted_export_leaves_nothing_and_goes_on(toy, out, monkeypatch, blow):
    def fail(*_, **__):
        raise blow

    monkeypatch.setattr(export_module, "export_language_model", fail)
    with pytest.raises(blow):
        export("toy", out=out)
    assert names(out.parent) == ["toy.bundle.partial"]
    assert toy.built == {"vision_encoder": 1, "connector": 1}
    monkeypatch.setattr(export_module, "export_language_model", fake_gguf)
    export("toy", out=out)
    assert toy.built == {"vision_encoder": 1, "connector": 1}
    assert len(read_manifest(out).files()) == 3


def test_only_what_an_option_changes_is_made_again(toy, out, monkeypatch):
    def stop(rows):
        raise OutOfTolerance("no")

    monkeypatch.setattr(export_module, "require", stop)
    for options, built in [({}, 1), ({"quant": "f16"}, 1), ({"precision": "fp16"}, 2)]:
        with pytest.raises(OutOfTolerance):
            export("toy", out=out, **options)
        assert toy.built["connector"] == built
    toy.source = "b"  # other weights at the same place
    with pytest.raises(OutOfTolerance):
        export("toy", out=out, precision="fp16")
    assert toy.built["connector"] == 3
    assert not out.exists()


def test_damage_is_found_before_reuse(toy, out, monkeypatch):
    def stop(rows):
        raise OutOfTolerance("no")

    monkeypatch.setattr(export_module, "require", stop)
    with pytest.raises(OutOfTolerance):
        export("toy", out=out)
    file = out.with_name("toy.bundle.partial") / "connector.onnx"
    file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))
    monkeypatch.setattr(export_module, "require", lambda rows: None)
    export("toy", out=out)
    assert toy.built == {"vision_encoder": 1, "connector": 2}
    read_manifest(out)


def test_out_of_tolerance_gives_no_bundle(toy, out, monkeypatch):
    row = Parity("connector", False, {"cosine": 0.2}, {"cosine": 0.9})
    monkeypatch.setattr(export_module, "verify", lambda *_: [row])
    with pytest.raises(OutOfTolerance, match=r"connector cosine 0\.2"):
        export("toy", out=out)
    assert not out.exists()


def test_unverified_bundle_says_so(toy, out):
    export("toy", out=out, check=False)
    assert read_manifest(out).parity == []


def test_full_disk_is_explained_and_can_go_on(toy, out, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(export_module, "export_language_model", full)
    with pytest.raises(MllmEdgeError, match=r"disk of .* is full; make room and run the same command again"):
        export("toy", out=out)
    assert names(out.parent) == ["toy.bundle.partial"]
    assert "vision_encoder" in json.loads((out.parent / "toy.bundle.partial" / "progress.json").read_text())


def test_other_system_errors_are_not_called_a_full_disk(toy, out, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(errno.EACCES, "no")

    monkeypatch.setattr(export_module, "export_language_model", denied)
    with pytest.raises(PermissionError):
        export("toy", out=out)


def test_too_little_room_is_said_before_anything_is_made(toy, out, monkeypatch):
    usage = workplace.shutil.disk_usage(out.parents[1])._replace(free=1000)
    monkeypatch.setattr(workplace.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(MllmEdgeError, match=r"language model needs .* free"):
        export("toy", out=out)
    assert toy.built == {"vision_encoder": 0, "connector": 0}


def test_existing_bundle_is_replaced_only_by_force(toy, out):
    export("toy", out=out)
    (out / "note.txt").write_text("old")
    with pytest.raises(BadInput, match="--force"):
        export("toy", out=out)
    assert (out / "note.txt").exists()
    export("toy", out=out, quant="f16", force=True)
    assert read_manifest(out).language_model.precision == "f16"
    assert not (out / "note.txt").exists() and names(out.parent) == ["toy.bundle"]


def test_force_replaces_nothing_that_is_not_a_bundle(toy, out):
    out.mkdir(parents=True)
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(BadInput, match="is not a bundle"):
        export("toy", out=out, force=True)
    assert (out / "thesis.tex").exists()


def test_empty_folder_is_taken(toy, out):
    out.mkdir(parents=True)
    read_manifest(export("toy", out=out))


def test_old_bundle_survives_a_failed_replacement(toy, out, monkeypatch):
    export("toy", out=out)
    rename = workplace.Path.rename

    def fail_on_partial(self, target):
        if self.name.endswith(".partial"):
            raise OSError(errno.EIO, "broken")
        return rename(self, target)

    monkeypatch.setattr(workplace.Path, "rename", fail_on_partial)
    with pytest.raises(OSError, match="broken"):
        export("toy", out=out, quant="f16", force=True)
    assert read_manifest(out).language_model.precision == "q8_0"


def test_death_between_the_two_renames_is_repaired(toy, out):
    export("toy", out=out)
    places.mark(out, workplace.BUNDLE.replaced)
    out.rename(out.with_name("toy.bundle.old"))
    with pytest.raises(BadInput, match="--force"):
        export("toy", out=out)
    read_manifest(out)
    assert not (out / places.MARK).exists()


def test_second_export_to_the_same_place_is_refused(toy, out):
    out.parent.mkdir()
    lock = out.with_name("toy.bundle.lock")
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(BadInput, match="another process is writing"):
            export("toy", out=out)
    assert lock.exists()  # it is not ours


@pytest.mark.parametrize("left", ["", "1", "mine"])  # numbers of processes mean nothing in another container
def test_lock_of_a_dead_process_is_taken_over(toy, out, left):
    out.parent.mkdir()
    out.with_name("toy.bundle.lock").write_text(str(os.getpid()) if left == "mine" else left)
    export("toy", out=out)
    assert names(out.parent) == ["toy.bundle"]


@pytest.mark.parametrize("suffix", ["partial", "lock", "old"])
def test_places_of_others_beside_the_bundle_are_not_touched(toy, out, suffix):
    export("toy", out=out)
    place = out.with_name(f"toy.bundle.{suffix}")
    if suffix == "lock":
        place.write_text("my thesis")
        thesis = place
    else:
        thesis = place / "bundle.json"
        place.mkdir()
        thesis.write_text("my thesis")
    with pytest.raises(BadInput, match=f"toy.bundle.{suffix} .*move it away"):
        export("toy", out=out, quant="f16", force=True)
    assert thesis.read_text() == "my thesis"
    assert read_manifest(out).language_model.precision == "q8_0"


@pytest.mark.parametrize("suffix", ["", ".partial", ".lock"])
def test_links_are_not_followed(toy, out, suffix):
    precious = out.parent / "precious"
    precious.mkdir(parents=True)
    (precious / "thesis.tex").write_text("years of work")
    out.with_name(f"toy.bundle{suffix}").symlink_to(precious)
    with pytest.raises(BadInput, match="is a link"):
        export("toy", out=out, force=True)
    assert names(precious) == ["thesis.tex"]


@pytest.mark.parametrize("place", [".", "..", "afile/x.bundle", "a" * 300])
def test_places_that_cannot_be_are_bad_input(toy, tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "afile").write_text("")
    with pytest.raises(BadInput, match=r"give the folder one|choose another place"):
        export("toy", out=place)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "tpu"}, "use one of cpu, cuda, trt"),
        ({"precision": "fp8"}, "fp32, fp16, int8"),
        ({"quant": "q3"}, "q4_k_m"),
        ({"mmproj": True}, "without --mmproj"),
        ({"merge_tokens": 0}, "merge them to 1 to 15"),
        ({"merge_tokens": 16}, "a picture takes 16 tokens here"),
    ],
)
def test_bad_options_are_named(toy, out, options, message):
    with pytest.raises(BadInput, match=message):
        export("toy", out=out, **options)
    assert not out.parent.exists()


def test_mmproj_is_listed_in_the_manifest(toy, out):
    toy.extras = {"mmproj": lambda path: path.write_bytes(b"projector")}
    export("toy", out=out, mmproj=True)
    assert [(entry.file, entry.bytes) for entry in read_manifest(out).extra_files] == [("mmproj.gguf", 9)]
