"""As `warm`, for the benchmark's tiny denoisers."""

import torch
import warm
from scenarios import SCENARIOS

for name in ("sdxl-tiny", "sd3-tiny"):
    pipe = SCENARIOS[name].pipeline(torch.device("cpu"), torch.float32)
    arguments = SCENARIOS[name].arguments(pipe)
    warm.run(pipe, lambda pipe=pipe, arguments=arguments: pipe(**arguments, num_inference_steps=4))
