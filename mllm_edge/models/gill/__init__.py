"""GILL: text, retrieved pictures and generated pictures in one answer (Koh et al. 2023, arXiv 2305.17216)."""

from mllm_edge.models.info import SystemInfo

INFO = SystemInfo(
    name="gill",
    title="GILL",
    summary="Text, retrieved and generated pictures in one answer: CLIP, an OPT with picture tokens, latent diffusion.",
    tasks=["captioning", "dialogue", "picture retrieval", "picture generation"],
    stages=["vision_encoder", "connector", "heads", "unet", "vae_decoder", "language_model"],
    configs={
        "tiny": "11 M parameters, reads pictures of 128 px, draws such of 64 px; ships with the package",
        "6.7b": "CLIP-L/14 + OPT-6.7B + Stable Diffusion 1.5, pictures of 512 px",
    },
    base_checkpoints=["facebook/opt-6.7b", "openai/clip-vit-large-patch14", "stable-diffusion-v1-5"],
    licences={
        "code": "Apache-2.0",
        "tiny weights": "Apache-2.0",
        "published weights": "GILL Apache-2.0, OPT's own licence, Stable Diffusion 1.5 CreativeML OpenRAIL-M",
    },
)
