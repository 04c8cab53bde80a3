"""The errors that users see. Each carries one line: what is wrong; what to do."""


class MllmEdgeError(Exception):
    """Something failed. The command line prints the message alone and exits with `exit_code`."""

    exit_code = 1


class BadInput(MllmEdgeError):
    """The user's input (file, option, bundle, prompt) is not usable."""

    exit_code = 2


class OutOfTolerance(MllmEdgeError):
    """A measured value, of parity or of speed, is outside what is allowed."""


class MissingPackage(MllmEdgeError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str):
        super().__init__(f"{package} is not installed; run: pip install 'mllm-edge[{extra}]'")
