"""The errors that users see. Each carries one line: what is wrong; what to do."""


class MllmEdgeError(Exception):
    """Something failed. The command line prints the message alone and exits with `exit_code`."""

    exit_code = 1


class BadInput(MllmEdgeError):
    """The user's input (file, option, bundle, prompt) is not usable."""

    exit_code = 2


class OutOfTolerance(MllmEdgeError):
    """A lowered stage differs from its PyTorch reference by more than the tolerance allows."""


class MissingPackage(MllmEdgeError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str):
        super().__init__(f"{package} is not installed; run: pip install 'mllm-edge[{extra}]'")
