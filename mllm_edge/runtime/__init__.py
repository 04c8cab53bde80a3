"""Running bundles: numpy, Pillow and the engine in use; neither PyTorch nor transformers."""

from mllm_edge.runtime.answer import Answer, Tokens
from mllm_edge.runtime.session import Chat, Model, load

__all__ = ["Answer", "Chat", "Model", "Tokens", "load"]
