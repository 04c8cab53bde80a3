"""The targets: where a bundle will run, and what that means for what is made."""

TARGETS = ("cpu", "cuda", "trt")
