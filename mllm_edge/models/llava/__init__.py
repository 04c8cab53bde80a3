"""LLaVA: CLIP -> connector -> splice into a LLaMA decoder (Liu et al. 2023, arXiv 2304.08485 and 2310.03744)."""

from mllm_edge.models.info import SystemInfo

INFO = SystemInfo(
    name="llava",
    title="LLaVA v1 / v1.5",
    summary="Chat about pictures: CLIP tapped at -2, a linear or two-layer connector, a LLaMA decoder.",
    tasks=["chat"],
    stages=["vision_encoder", "connector", "language_model"],
    configs={
        "tiny": "5 M parameters, 128 px; trained by our recipes, ships with the package",
        "smol": "MobileNetV2 at 288 px + SmolLM2-135M out of two packages; names things, what joins them ships",
        "1b": "CLIP-L/14-336 + a 1.1 B LLaMA (22 layers, width 2048, 32 heads / 4 KV)",
        "7b": "LLaVA-1.5-7B: CLIP-L/14-336 + Vicuna-7B",
        "13b": "LLaVA-1.5-13B: CLIP-L/14-336 + Vicuna-13B",
    },
    base_checkpoints=[
        "liuhaotian/llava-v1.5-7b",
        "liuhaotian/llava-v1.5-13b",
        "llava-hf/llava-1.5-7b-hf",
        "llava-hf/llava-1.5-13b-hf",
    ],
    licences={
        "code": "Apache-2.0",
        "tiny weights": "Apache-2.0",
        "published weights": "the base LLM's (Llama 2 Community for v1.5) and its training data's terms",
    },
)
