#!/bin/sh
# What both images run: `vllm serve`, with the API key from a file so that no command line shows it.
#
#   API_KEY_FILE   a file with the key, e.g. a mounted secret; unset: no key, or VLLM_API_KEY if that is set
set -eu
if [ -n "${API_KEY_FILE:-}" ]; then
  if [ ! -s "$API_KEY_FILE" ] || [ ! -r "$API_KEY_FILE" ]; then
    echo "entrypoint: API_KEY_FILE=$API_KEY_FILE is missing, empty or not readable by user $(id -u)." \
      "Write a key into it, or unset API_KEY_FILE to serve without one." >&2
    exit 1
  fi
  VLLM_API_KEY=$(cat "$API_KEY_FILE")
  export VLLM_API_KEY
fi
exec vllm serve "$@"
