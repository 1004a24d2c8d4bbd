# SPDX-License-Identifier: Apache-2.0
"""A small DeepSeek-V4 through the real `vllm serve`. `make demo` runs it; no GPU and no network are
needed."""

import sys

from demo import main
from served import VLLM

if __name__ == "__main__":
    sys.exit(main(VLLM))
