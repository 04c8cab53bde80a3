"""What a manifest says of itself: paths, engines and the dims that stages hand to each other."""

from __future__ import annotations

import os
from pathlib import Path

from mllm_edge.bundle.manifest import MANIFEST, Manifest, TensorSpec
from mllm_edge.errors import BadInput, look_up
from mllm_edge.targets import BUNDLES

ENGINES = sorted({target.engine for target in BUNDLES.values()})


def check(manifest: Manifest, folder: Path) -> None:
    """Check what the manifest says of itself: paths, engines and the dims that stages hand to each other.

    Raises:
        BadInput: names the files of both stages that disagree.
    """
    for file in (*(entry.file for entry in manifest.files()), manifest.build.timing_cache):
        locate(folder, file)
    look_up("target", manifest.target, BUNDLES)
    build = manifest.build
    lengths = build.profile
    if len(lengths) != 3 or sorted(lengths) != lengths or not 1 <= lengths[0] <= lengths[2] <= 4096:
        raise BadInput(f"{folder / MANIFEST}: build.profile is {build.profile}; export the bundle again")
    if not build.timing_cache.endswith(".cache") or build.workspace_mb < 0:
        raise BadInput(f"{folder / MANIFEST}: the build settings {build} cannot be; export the bundle again")
    produced: dict[str, tuple[TensorSpec, str]] = {}
    given = {step.input for step in manifest.preprocessing} | {"boxes", "seg_states"}  # of pictures, users, the decoder
    for stage in manifest.stages:
        if stage.engine not in ENGINES:
            raise BadInput(f"{stage.file} asks for engine {stage.engine!r}; known: {', '.join(ENGINES)}")
        for spec in stage.inputs:
            if spec.name in produced:
                _same_dims(spec, stage.file, *produced[spec.name])
            elif spec.name not in given:
                raise BadInput(f"nothing before {stage.file} gives its input {spec.name}; export the bundle again")
        produced.update({spec.name: (spec, stage.file) for spec in stage.outputs})
    lm = manifest.language_model
    states = {
        spec.name: (spec, stage.file) for stage in manifest.stages for spec in stage.inputs if spec.name == "seg_states"
    }
    for name, (spec, file) in {**produced, **states}.items():
        if name in ("image_embeds", "region_embeds", "seg_states") and spec.shape[-1] != lm.hidden_width:
            raise BadInput(
                f"{file} gives or takes {name} of width {spec.shape[-1]} but {lm.file} takes {lm.hidden_width}; "
                "export both from the same checkpoint"
            )
    if len(manifest.prompt.phrase) not in (0, 2) or (manifest.prompt.box and "region_embeds" not in produced):
        raise BadInput(
            f"{folder / MANIFEST}: the prompt's phrases or boxes are not what the stages give; export it again"
        )
    if lm.embedding.shape != [lm.vocabulary, lm.hidden_width]:
        raise BadInput(f"{lm.file}: embedding {lm.embedding.shape} is not [{lm.vocabulary}, {lm.hidden_width}]")
    for step in manifest.preprocessing:
        stage = manifest.stage(step.stage)
        size = next((spec.shape for spec in stage.inputs if spec.name == step.input), None)
        if size is None or size[-2:] != [step.size, step.size]:
            raise BadInput(f"preprocessing makes {step.size}x{step.size} pictures but {stage.file} takes {size}")


def _same_dims(spec: TensorSpec, file: str, made: TensorSpec, maker: str) -> None:
    fixed = [(a, b) for a, b in zip(spec.shape, made.shape) if isinstance(a, int) and isinstance(b, int)]
    if len(spec.shape) != len(made.shape) or any(a != b for a, b in fixed) or spec.dtype != made.dtype:
        raise BadInput(
            f"{maker} gives {spec.name} as {made.dtype} {made.shape} but {file} takes {spec.dtype} {spec.shape}; "
            "export both from the same checkpoint"
        )


def locate(folder: Path, file: str) -> Path:
    """The path of a bundle's file. Raises BadInput when it would lie outside the bundle's folder."""
    path = folder / file
    inside = os.path.realpath(path).startswith(os.path.realpath(folder) + os.sep)
    if not file or Path(file).is_absolute() or not inside:
        raise BadInput(f"{folder / MANIFEST} points outside its folder ({file!r}); do not use this bundle")
    return path
