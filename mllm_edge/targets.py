"""The targets: where a bundle will run, and what that means for what is made and for what runs it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """What a target stands for.

    Attributes:
        gpu: it runs on a GPU.
        provider: of ONNX Runtime, for graphs that it runs there.
        package: the pip package that brings the provider.
        needs: what is missing where the provider is there and does not start.
        engine: that the stages of its bundles get in the manifest; "" where it is only a way to run other bundles.
        precision: of the stages of its bundles, where nobody chooses one.
    """

    gpu: bool
    provider: str
    package: str
    needs: str = ""
    engine: str = ""
    precision: str = ""


_CUDA = (True, "CUDAExecutionProvider", "onnxruntime-gpu", "driver, CUDA or cuDNN missing")
TARGETS = {
    "cpu": Target(False, "CPUExecutionProvider", "onnxruntime", engine="onnx", precision="fp32"),
    "cuda": Target(*_CUDA, engine="onnx", precision="fp16"),
    "trt": Target(*_CUDA, engine="tensorrt", precision="fp16"),
    "ort-rtx": Target(True, "NvTensorRTRTXExecutionProvider", "onnxruntime-trt-rtx", "driver or TensorRT-RTX missing"),
}
BUNDLES = {name: target for name, target in TARGETS.items() if target.engine}
