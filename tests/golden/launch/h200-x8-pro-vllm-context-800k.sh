#!/bin/sh
# h200-x8-pro-vllm-context-800k: V4-Pro on 8x H200, vllm, long context: TP8 + EP, 819200 tokens
# status: unverified; engine: vllm >=0.32,<0.34
export VLLM_ENGINE_READY_TIMEOUT_S=6000
exec vllm serve deepseek-ai/DeepSeek-V4-Pro --revision main --tensor-parallel-size 8 --enable-expert-parallel --max-model-len 819200 --max-num-batched-tokens 4096 --max-num-seqs 16 --gpu-memory-utilization 0.95 --async-scheduling --kv-cache-dtype fp8_ds_mla --block-size 256 --attention-config.indexer_kv_dtype fp8 --compilation-config '{"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}' --tokenizer-mode deepseek_v4 --reasoning-parser deepseek_v4 --enable-auto-tool-choice --tool-call-parser deepseek_v4 --host 127.0.0.1 --port 8000
