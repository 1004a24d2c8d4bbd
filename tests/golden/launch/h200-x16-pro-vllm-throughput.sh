#!/bin/sh
# h200-x16-pro-vllm-throughput: V4-Pro on 16x H200 (2 nodes), vllm, high throughput: TP4 x DP4 + EP, 1048576 tokens
# status: unverified; engine: vllm >=0.32,<0.34
# Run on each of the 2 nodes with NODE_RANK=0.. and HEAD_ADDR=<address of node 0> set.
: "${NODE_RANK:?set NODE_RANK}" "${HEAD_ADDR:?set HEAD_ADDR}"
export VLLM_ENGINE_READY_TIMEOUT_S=6000
DP_START_RANK=$((NODE_RANK * 2))
if [ "$NODE_RANK" = 0 ]; then
  exec vllm serve deepseek-ai/DeepSeek-V4-Pro --revision main --tensor-parallel-size 4 --data-parallel-size 4 --enable-expert-parallel --max-model-len 1048576 --max-num-batched-tokens 8192 --max-num-seqs 128 --gpu-memory-utilization 0.95 --async-scheduling --kv-cache-dtype fp8_ds_mla --block-size 256 --attention-config.indexer_kv_dtype fp8 --compilation-config '{"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}' --tokenizer-mode deepseek_v4 --reasoning-parser deepseek_v4 --enable-auto-tool-choice --tool-call-parser deepseek_v4 --data-parallel-size-local 2 --data-parallel-address "$HEAD_ADDR" --data-parallel-rpc-port 13345 --host 127.0.0.1 --port 8000
else
  exec vllm serve deepseek-ai/DeepSeek-V4-Pro --revision main --tensor-parallel-size 4 --data-parallel-size 4 --enable-expert-parallel --max-model-len 1048576 --max-num-batched-tokens 8192 --max-num-seqs 128 --gpu-memory-utilization 0.95 --async-scheduling --kv-cache-dtype fp8_ds_mla --block-size 256 --attention-config.indexer_kv_dtype fp8 --compilation-config '{"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}' --tokenizer-mode deepseek_v4 --reasoning-parser deepseek_v4 --enable-auto-tool-choice --tool-call-parser deepseek_v4 --data-parallel-size-local 2 --data-parallel-start-rank "$DP_START_RANK" --data-parallel-address "$HEAD_ADDR" --data-parallel-rpc-port 13345 --headless
fi
