"""GLaMM: LLaVA whose answers carry masks and whose questions carry boxes (Rasheed et al. 2024, arXiv 2311.03356)."""

from mllm_edge.models.info import SystemInfo

INFO = SystemInfo(
    name="glamm",
    title="GLaMM",
    summary="Answers whose phrases carry pixel masks, questions about boxes: LLaVA, SAM, and a region encoder.",
    tasks=["chat", "grounded conversation", "referring segmentation", "region captioning"],
    stages=["vision_encoder", "connector", "region_encoder", "mask_encoder", "mask_decoder", "language_model"],
    configs={
        "tiny": "6 M parameters, 128 px; trained by our recipes, ships with the package",
        "7b-lite": "7b with SAM ViT-B: 0.5 B parameters less, for boards of 8 GB",
        "7b": "CLIP-L/14-336 + Vicuna-7B + SAM ViT-H at 1024 px + a region encoder of 0.3 B",
    },
    base_checkpoints=[
        "MBZUAI/GLaMM-FullScope",
        "MBZUAI/GLaMM-GCG",
        "MBZUAI/GLaMM-RefSeg",
        "MBZUAI/GLaMM-RegCap-RefCOCOg",
        "MBZUAI/GLaMM-RegCap-VG",
        "MBZUAI/GLaMM-GranD-Pretrained",
    ],
    licences={
        "code": "Apache-2.0",
        "tiny weights": "Apache-2.0",
        "published weights": "Llama 2 Community, SAM Apache-2.0, and the terms of GranD's pictures",
    },
)
