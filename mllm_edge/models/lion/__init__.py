"""LION: two levels of visual knowledge for an encoder-decoder (Chen et al. 2024, arXiv 2311.11860)."""

from mllm_edge.models.info import SystemInfo

INFO = SystemInfo(
    name="lion",
    title="LION",
    summary="Text and boxes from two levels of visual knowledge: EVA, Q-Former, aggregator, a T5 with adapters, tags.",
    tasks=["captioning", "visual question answering", "referring comprehension", "region captioning"],
    stages=["vision_encoder", "queries", "aggregator", "task", "tagger", "language_model"],
    configs={
        "tiny": "6 M parameters, 128 px; ships with the package, still in training",
        "4b": "EVA ViT-g at 224 px + Q-Former + Flan-T5-XL + RAM at 384 px",
        "12b": "the same with Flan-T5-XXL",
    },
    base_checkpoints=["daybreaksly/LION-FlanT5-XL", "daybreaksly/LION-FlanT5-XXL"],
    licences={
        "code": "Apache-2.0",
        "tiny weights": "Apache-2.0",
        "published weights": "not stated by their authors",
    },
)
