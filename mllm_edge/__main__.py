"""`python -m mllm_edge`, and what `accelerate launch -m mllm_edge` starts."""

import sys

from mllm_edge.cli import main

if __name__ == "__main__":
    sys.exit(main())
