#!/usr/bin/env bash
# SDXL on two GPUs. Compare strategies by changing one word: ./run_sdxl.sh cfg
set -euo pipefail

strategy=${1:-hybrid-cond}
shift || true

xdit-hybrid \
    --model "${MODEL:-stabilityai/stable-diffusion-xl-base-1.0}" \
    --prompt "${PROMPT:-a brown dog lying on the ground with a metal bowl in front of him}" \
    --num_inference_steps 50 \
    --guidance_scale 5 \
    --parallel "$strategy" \
    --output_directory "${OUT:-results}" \
    "$@"
