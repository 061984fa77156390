"""A script in the manner of xDiT's examples/sd3_example.py: it knows nothing of hybrid-cond."""

import torch
from xfuser import xFuserArgs, xFuserStableDiffusion3Pipeline
from xfuser.config import FlexibleArgumentParser
from xfuser.core.distributed import get_runtime_state, get_world_group


def main() -> None:
    args = xFuserArgs.add_cli_args(FlexibleArgumentParser()).parse_args()
    engine_config, input_config = xFuserArgs.from_cli_args(args).create_config()
    pipe = xFuserStableDiffusion3Pipeline.from_pretrained(
        pretrained_model_name_or_path=engine_config.model_config.model,
        engine_config=engine_config,
        text_encoder_3=None,
        tokenizer_3=None,
    ).to(f"cuda:{get_world_group().local_rank}")
    pipe.prepare_run(input_config)
    torch.cuda.reset_peak_memory_stats()
    output = pipe(
        height=input_config.height,
        width=input_config.width,
        prompt=input_config.prompt,
        num_inference_steps=input_config.num_inference_steps,
        guidance_scale=input_config.guidance_scale,
        generator=torch.Generator(device="cuda").manual_seed(input_config.seed),
    )
    if pipe.is_dp_last_group():
        for i, image in enumerate(output.images):
            image.save(f"sd3_cfg{engine_config.parallel_config.cfg_degree}_{i}.png")
    get_runtime_state().destroy_distributed_env()


main()
