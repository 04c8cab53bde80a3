"""The language model as a GGUF file, and the proof that it tokenizes as its checkpoint does."""
