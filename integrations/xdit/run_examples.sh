#!/usr/bin/env bash
# xDiT's own example scripts, unmodified: ./run_examples.sh path/to/xDiT/examples [flags]
set -euo pipefail

examples=$1
shift
mkdir -p results

launch=(torchrun --nproc_per_node=2 -m hybridiff_xdit.launch)
flags=(--prompt "a cup of tea" --num_inference_steps 50 --parallel hybrid-cond "$@")

"${launch[@]}" "$examples/sd3_example.py" --model stabilityai/stable-diffusion-3-medium-diffusers \
    --guidance_scale 7 "${flags[@]}"
"${launch[@]}" "$examples/sdxl_example.py" --model stabilityai/stable-diffusion-xl-base-1.0 \
    --guidance_scale 5 "${flags[@]}"
