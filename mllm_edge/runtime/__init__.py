"""Running bundles: numpy, Pillow and the engine in use; neither PyTorch nor transformers."""

from mllm_edge.runtime.answer import Answer, Mask, Tokens
from mllm_edge.runtime.loading import load
from mllm_edge.runtime.model import Chat, Model

__all__ = ["Answer", "Chat", "Mask", "Model", "Tokens", "load"]
