"""Text to image with plain diffusers on two processes (or, started with python, on one).

torchrun --nproc_per_node 2 text_to_image.py --model stabilityai/stable-diffusion-xl-base-1.0 --prompt "a cup of tea"
"""

import argparse
import logging
import os

import torch
import torch.distributed as dist
from diffusers import DiffusionPipeline

from hybridiff_xdit import HybridConfig, apply_hybrid, last_report
from hybridiff_xdit.seam.checkpoints import resolve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji-sd3", help="hub id, folder, or a small model of this repository")
    parser.add_argument("--prompt", default="google style emoji of grinning face")
    parser.add_argument("--policy", help="adaptive, cfg, paper or fixed; default adaptive, or fixed with --plan")
    parser.add_argument("--speedup", type=float, help="for adaptive: bound of the speed-up to reach, such as 2.5")
    parser.add_argument("--plan", help="for fixed, such as 8-48/2")
    parser.add_argument("--out", default="picture.png")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO)

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    is_alone = "WORLD_SIZE" not in os.environ
    if not is_alone:
        dist.init_process_group("nccl" if on_gpu else "gloo")

    model = resolve(args.model)
    dtype = model.dtype if on_gpu else torch.float32
    pipe = DiffusionPipeline.from_pretrained(model.source, torch_dtype=dtype, **dict.fromkeys(model.absent))
    config = HybridConfig(policy=args.policy, speedup=args.speedup, plan=args.plan)
    apply_hybrid(pipe.to(device), config, model=args.model)

    # Every rank makes the same call from the same seed.
    image = pipe(
        args.prompt,
        height=model.size,
        width=model.size,
        num_inference_steps=model.steps,
        guidance_scale=model.guidance_scale,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    if is_alone or dist.get_rank() == 0:
        image.save(args.out)
        logging.info("%s; plan %s", args.out, last_report(pipe)["plan"])
    if not is_alone:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
