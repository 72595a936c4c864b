#!/usr/bin/env bash
# What a CUDA card does with puna and with its peers: pretraining steps of 1B and 3B, LoRA of an 8B; on the engine one
# text at a time, 128 at once, a long prompt, prompts with a common beginning.
# Random weights and ids: speed does not depend on what they say. MFU: 6 N + 12 L H D T FLOPs a token (PaLM appendix B,
# N without the embedding) over the card's dense bf16 peak; LoRA counts 4 N, its base has no weight gradient.
# The peers, transformers and PEFT, must be installed (make setup). Says so, and ends with 0, where there is no card.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "bench/gpu.sh: torch sees no CUDA device here, nothing was measured"
  exit 0
fi
"$PYTHON" -c 'import torch; print(torch.cuda.get_device_name(), "torch", torch.__version__, "CUDA", torch.version.cuda)'
run() { "$PYTHON" "bench/$1" "${@:2}" || echo "FAILED: bench/$*"; }
run gpu.py pretrain --model llama3.2-1b --batch 4 --length 4096
run gpu.py pretrain --model llama3.2-3b --batch 1 --length 4096
run gpu.py lora --model llama3.1-8b --batch 1 --length 4096
for part in decode throughput prefill prefix; do run gpu_serve.py "$part" --model llama3.2-1b; done
run gpu_serve.py decode --model llama3.1-8b
run gpu_serve.py throughput --model llama3.1-8b
