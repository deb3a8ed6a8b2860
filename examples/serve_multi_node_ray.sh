#!/usr/bin/env bash
# DeepSeek-V3.2 on two nodes of 8 H100 (or 8 A100 of 80 GB) through Ray: tensor parallel in a node, pipeline across.
#
#   examples/serve_multi_node_ray.sh head HEAD_ADDRESS [MODEL [more options of vllm serve]]     on the first node
#   examples/serve_multi_node_ray.sh worker HEAD_ADDRESS                                        on the second
#
# HEAD_ADDRESS is the first node's address in the network that the GPUs talk through. Ray (pip install ray) and
# vllm-dsa must be installed on both. Every node must see the model under the same path, or download it itself. Set
# VLLM_HOST_IP on each node to its own address in that network if it has several. vLLM waits half an hour for the
# second node. Without Ray: docs/multi-node.md.
#
# Parsed only: not yet run on two nodes.
set -euo pipefail
usage() { sed -n '4,5s/^# *//p' "$0" >&2; exit 2; }
[ $# -ge 2 ] || usage
role=$1 head=$2 port=6379

case $role in
  worker)
    exec ray start --address "$head:$port" --block
    ;;
  head)
    ray start --head --node-ip-address "$head" --port "$port"
    model=${3:-deepseek-ai/DeepSeek-V3.2}
    exec vllm serve "$model" \
      --load-format safetensors \
      --distributed-executor-backend ray \
      --tensor-parallel-size 8 --pipeline-parallel-size 2 \
      --kv-cache-dtype fp8_ds_mla \
      --max-model-len 163840 \
      --tokenizer-mode deepseek_v32 \
      --reasoning-parser deepseek_v3 \
      --enable-auto-tool-choice --tool-call-parser deepseek_v32 \
      --shutdown-timeout 120 \
      "${@:4}"
    ;;
  *)
    usage
    ;;
esac
