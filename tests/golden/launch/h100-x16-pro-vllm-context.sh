#!/bin/sh
# h100-x16-pro-vllm-context: V4-Pro on 16x H100 80GB HBM3 (2 nodes), vllm, long context: TP8 x PP2 + EP, 524288 tokens
# status: unverified; engine: vllm >=0.32,<0.34
# Run on each of the 2 nodes with NODE_RANK=0.. and HEAD_ADDR=<address of node 0> set.
: "${NODE_RANK:?set NODE_RANK}" "${HEAD_ADDR:?set HEAD_ADDR}"
export VLLM_ENGINE_READY_TIMEOUT_S=6000
if [ "$NODE_RANK" = 0 ]; then
  exec vllm serve deepseek-ai/DeepSeek-V4-Pro --revision main --tensor-parallel-size 8 --pipeline-parallel-size 2 --enable-expert-parallel --max-model-len 524288 --max-num-batched-tokens 4096 --max-num-seqs 16 --gpu-memory-utilization 0.95 --async-scheduling --kv-cache-dtype fp8_ds_mla --block-size 256 --attention-config.indexer_kv_dtype fp8 --compilation-config '{"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}' --tokenizer-mode deepseek_v4 --reasoning-parser deepseek_v4 --enable-auto-tool-choice --tool-call-parser deepseek_v4 --nnodes 2 --node-rank "$NODE_RANK" --master-addr "$HEAD_ADDR" --master-port 29501 --host 127.0.0.1 --port 8000
else
  exec vllm serve deepseek-ai/DeepSeek-V4-Pro --revision main --tensor-parallel-size 8 --pipeline-parallel-size 2 --enable-expert-parallel --max-model-len 524288 --max-num-batched-tokens 4096 --max-num-seqs 16 --gpu-memory-utilization 0.95 --async-scheduling --kv-cache-dtype fp8_ds_mla --block-size 256 --attention-config.indexer_kv_dtype fp8 --compilation-config '{"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}' --tokenizer-mode deepseek_v4 --reasoning-parser deepseek_v4 --enable-auto-tool-choice --tool-call-parser deepseek_v4 --nnodes 2 --node-rank "$NODE_RANK" --master-addr "$HEAD_ADDR" --master-port 29501 --headless
fi
