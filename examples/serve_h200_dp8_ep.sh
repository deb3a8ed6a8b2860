#!/usr/bin/env bash
# DeepSeek-V3.2 on one node of 8 H200, 8 data parallel ranks that share the experts: many requests at once.
#
#   examples/serve_h200_dp8_ep.sh [MODEL [more options of vllm serve]]
#
# Parsed only: not yet run on 8 GPUs. docs/deploy.md says when this layout fits, docs/recipes.md has other models.
set -euo pipefail
model=${1:-deepseek-ai/DeepSeek-V3.2}

exec vllm serve "$model" \
  --load-format safetensors \
  --data-parallel-size 8 --enable-expert-parallel \
  --kv-cache-dtype fp8_ds_mla \
  --max-model-len 163840 \
  --tokenizer-mode deepseek_v32 \
  --reasoning-parser deepseek_v3 \
  --enable-auto-tool-choice --tool-call-parser deepseek_v32 \
  --shutdown-timeout 120 \
  "${@:2}"
