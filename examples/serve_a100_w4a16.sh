#!/usr/bin/env bash
# A checkpoint of DeepSeek-V3.2 with 4-bit weights (compressed-tensors W4A16, or AWQ) on one node of 8 A100 of 80 GB.
#
#   examples/serve_a100_w4a16.sh MODEL [more options of vllm serve]
#
# No such checkpoint is published by DeepSeek: name the folder or id of the one you trust. vLLM finds the format in its
# config.json. `vllm-dsa plan MODEL --gpu A100-80 --num-gpus 8` counts what fits; `vllm-dsa verify MODEL` checks its
# indexer on real text.
#
# Parsed only: no A100 and no published 4-bit checkpoint has been run.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '4s/^# *//p' "$0" >&2; exit 2; }

exec vllm serve "$1" \
  --load-format safetensors \
  --tensor-parallel-size 8 \
  --kv-cache-dtype fp8_ds_mla \
  --max-model-len 65536 \
  --tokenizer-mode deepseek_v32 \
  --reasoning-parser deepseek_v3 \
  --enable-auto-tool-choice --tool-call-parser deepseek_v32 \
  --shutdown-timeout 120 \
  "${@:2}"
