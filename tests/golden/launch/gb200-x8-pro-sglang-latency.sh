#!/bin/sh
# gb200-x8-pro-sglang-latency: V4-Pro on 8x GB200 (2 nodes), sglang, low latency: TP8, 1048576 tokens
# status: unverified; engine: sglang >=0.5.22,<0.5.24
# Run on each of the 2 nodes with NODE_RANK=0.. and HEAD_ADDR=<address of node 0> set.
: "${NODE_RANK:?set NODE_RANK}" "${HEAD_ADDR:?set HEAD_ADDR}"
export NCCL_CUMEM_ENABLE=1
export NCCL_MNNVL_ENABLE=1
HEAD_ADDR_PORT="$HEAD_ADDR:29501"
exec sglang serve --model-path deepseek-ai/DeepSeek-V4-Pro --revision main --tp-size 8 --context-length 1048576 --chunked-prefill-size 8192 --max-running-requests 32 --cuda-graph-max-bs-decode 32 --mem-fraction-static 0.9 --kv-cache-dtype fp8_e4m3 --swa-full-tokens-ratio 0.1 --moe-runner-backend flashinfer_mxfp4 --speculative-algorithm EAGLE --speculative-num-steps 3 --speculative-eagle-topk 1 --speculative-num-draft-tokens 4 --reasoning-parser deepseek-v4 --tool-call-parser deepseekv4 --nnodes 2 --node-rank "$NODE_RANK" --dist-init-addr "$HEAD_ADDR_PORT" --watchdog-timeout 1800 --host 127.0.0.1 --port 8000 --disable-flashinfer-autotune
