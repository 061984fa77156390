#!/usr/bin/env bash
# SD3 on two GPUs. Compare strategies by changing one word: ./run_sd3.sh cfg|sequence|pipefusion|hybrid-cond
set -euo pipefail

strategy=${1:-hybrid-cond}
shift || true

xdit-hybrid \
    --model "${MODEL:-stabilityai/stable-diffusion-3-medium-diffusers}" \
    --prompt "${PROMPT:-a brown dog lying on the ground with a metal bowl in front of him}" \
    --num_inference_steps 50 \
    --guidance_scale 7 \
    --parallel "$strategy" \
    --output_directory "${OUT:-results}" \
    "$@"
