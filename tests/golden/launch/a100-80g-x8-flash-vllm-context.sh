#!/bin/sh
# a100-80g-x8-flash-vllm-context: V4-Flash on 8x A100-SXM4-80GB, vllm, long context: TP8, 1048576 tokens
# status: unverified; engine: vllm >=0.32,<0.34
# served by dsv4's plugin, installed beside the engine from its wheel with --no-deps: the engine has its dependencies
export VLLM_ENGINE_READY_TIMEOUT_S=1200
exec vllm serve deepseek-ai/DeepSeek-V4-Flash --revision main --tensor-parallel-size 8 --max-model-len 1048576 --max-num-batched-tokens 4096 --max-num-seqs 32 --gpu-memory-utilization 0.95 --async-scheduling --kv-cache-dtype fp8_ds_mla --block-size 256 --attention-config.indexer_kv_dtype fp8 --moe-backend marlin --compilation-config '{"mode": 0, "cudagraph_mode": "FULL_AND_PIECEWISE"}' --max-cudagraph-capture-size 128 --tokenizer-mode deepseek_v4 --reasoning-parser deepseek_v4 --enable-auto-tool-choice --tool-call-parser deepseek_v4 --host 127.0.0.1 --port 8000
