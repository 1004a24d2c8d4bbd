#!/bin/sh
# a100-80g-x8-flash-sglang-context: V4-Flash on 8x A100-SXM4-80GB, sglang, long context: TP8, 1048576 tokens
# status: unverified; engine: sglang >=0.5.22,<0.5.24
# served by dsv4's plugin, installed beside the engine from its wheel with --no-deps: the engine has its dependencies
exec sglang serve --model-path deepseek-ai/DeepSeek-V4-Flash --revision main --tp-size 8 --context-length 1048576 --chunked-prefill-size 4096 --max-running-requests 32 --cuda-graph-max-bs-decode 32 --mem-fraction-static 0.88 --kv-cache-dtype fp8_e4m3 --swa-full-tokens-ratio 0.1 --moe-runner-backend marlin --reasoning-parser deepseek-v4 --tool-call-parser deepseekv4 --watchdog-timeout 1800 --host 127.0.0.1 --port 8000
