# SPDX-License-Identifier: Apache-2.0
"""A small DeepSeek-V4 through the real `sglang serve`. `make demo-sglang` runs it; no GPU and no
network are needed."""

import sys

from demo import main
from served import SGLANG

if __name__ == "__main__":
    sys.exit(main(SGLANG))
