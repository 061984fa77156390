"""xDiT runner models for SD3, SD3.5 and SDXL, under names of our own in xDiT's registry."""

from __future__ import annotations

import logging
import time
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from diffusers import DiffusionPipeline

from .. import HybridConfig
from ..seam.checkpoints import Checkpoint, resolve
from .compat import has_accelerator
from .pipelines import HybridStableDiffusion3Pipeline, HybridStableDiffusionXLPipeline, many_pairs

from xfuser import (  # isort: skip  # xfuser imports only after .compat
    xFuserArgs,
    xFuserStableDiffusion3Pipeline,
    xFuserStableDiffusionXLPipeline,
)
from xfuser.core.distributed import get_data_parallel_world_size, get_world_group
from xfuser.model_executor.models.runner_models.base_model import (
    DefaultInputValues,
    DiffusionOutput,
    ModelCapabilities,
    ModelSettings,
    register_model,
    xFuserModel,
)

logger = logging.getLogger(__name__)

#: Name in xDiT's registry, by checkpoint family.
REGISTERED = {"sd3": "hybridiff-sd3", "sdxl": "hybridiff-sdxl"}


class _Model(xFuserModel):
    """A checkpoint in diffusers format, run by any of xDiT's strategies or by hybrid-cond."""

    pipeline_class: ClassVar[Any]
    hybrid_class: ClassVar[Any]
    settings = ModelSettings(model_output_type="image")
    hybrid: HybridConfig | None = None
    checkpoint: Checkpoint

    @classmethod
    def with_hybrid(cls, hybrid: HybridConfig) -> type[_Model]:
        """This class, running `hybrid`."""
        # xDiT counts the ranks of a branch as its PipeFusion degree.
        capabilities = replace(cls.capabilities, pipefusion_parallel_degree=True)
        return type(
            cls.__name__, (cls,), {"hybrid": hybrid, "capabilities": capabilities, "__module__": cls.__module__}
        )

    def _customize_settings(self, config: xFuserArgs) -> None:
        self.checkpoint = checkpoint = resolve(config.model)
        self.settings.model_name = checkpoint.source
        self.settings.output_name = checkpoint.name.strip("/").rsplit("/")[-1]
        self.default_input_values = DefaultInputValues(
            height=checkpoint.size,
            width=checkpoint.size,
            num_inference_steps=checkpoint.steps,
            guidance_scale=checkpoint.guidance_scale,
        )

    def _load_model(self) -> DiffusionPipeline:
        dtype = self.checkpoint.dtype if has_accelerator() else torch.float32
        logger.info("%s in %s", self.checkpoint.name, dtype)
        cls = self.pipeline_class
        if self.hybrid:
            cls = self.hybrid_class.with_config(self.hybrid, self.checkpoint.name)
        return cls.from_pretrained(
            pretrained_model_name_or_path=self.checkpoint.source,
            engine_config=self.engine_config,
            torch_dtype=dtype,
            **dict.fromkeys(self.checkpoint.absent),
        )

    def _run_pipe(self, input_args: dict[str, Any]) -> DiffusionOutput:
        names = ("prompt", "height", "width", "num_inference_steps", "guidance_scale")
        kwargs = {name: input_args[name] for name in names}
        for name in ("negative_prompt", "max_sequence_length"):
            if input_args.get(name):
                kwargs[name] = input_args[name]
        generator = torch.Generator(self.pipe._execution_device).manual_seed(input_args["seed"])
        output = self.pipe(**kwargs, generator=generator)
        images = output.images if output else []
        if self.hybrid or len(input_args["prompt"]) > 1:  # xDiT's own do not deal a single prompt out
            images = _gathered(images)
        return DiffusionOutput(images=images, pipe_args=input_args)

    # xDiT's runner would deal the prompts out in turn and put the pictures together group by group, in another order,
    # and from ranks that have none here. The pipelines deal out every call themselves, and `_run_pipe` gathers it.

    def _split_prompts_for_dp(self, input_args: dict[str, Any]) -> dict[str, Any]:
        return input_args

    def _gather_dp_outputs(self, output: DiffusionOutput) -> DiffusionOutput:
        return output

    def initialize(self, input_args: dict[str, Any]) -> None:
        # The pipeline's wrapper splits the VAE's decoder, and xDiT's runner would do it once more.
        if hasattr(self, "_vae_manager"):
            self._vae_manager.setup_parallel_vae = lambda vaes: None
        # And the runner makes the runtime state again, past the wrapper.
        with many_pairs() if self.hybrid else nullcontext():
            super().initialize(input_args)

    def _compile_model(self, input_args: dict[str, Any]) -> None:
        if not self.hybrid:
            return super()._compile_model(input_args)
        self._run_timed_pipe(input_args)  # the pipeline has its blocks compiled: in its first run

    # xDiT places the pipeline on, and times with, CUDA.

    def _post_load_and_state_initialization(self, input_args: dict[str, Any]) -> None:
        if has_accelerator():
            super()._post_load_and_state_initialization(input_args)

    def _run_timed_pipe(self, input_args: dict[str, Any]) -> tuple[DiffusionOutput, float]:
        if has_accelerator():
            return super()._run_timed_pipe(input_args)
        start = time.perf_counter()
        output = self._run_pipe(input_args)
        return output, time.perf_counter() - start

    def run(self, input_args: dict[str, Any]) -> tuple[DiffusionOutput, list[float]]:
        if has_accelerator():
            return super().run(input_args)
        self._validate_args(input_args)
        self._run_warmup_calls(input_args)
        timings: list[float] = []
        for _ in range(self.config.num_iterations):
            if self.config.batch_size:
                output, batch_timings = self._run_pipe_batched(input_args)
                timings += batch_timings
            else:
                output, seconds = self._run_timed_pipe(input_args)
                timings.append(seconds)
        return output, timings


def _gathered(images: list[Any]) -> list[Any]:
    """On the last rank the pictures of all data parallel groups in order, on the others this rank's."""
    if get_data_parallel_world_size() == 1:
        return images
    world = get_world_group()
    last = world.world_size - 1
    parts: list[Any] | None = [None] * world.world_size if world.rank == last else None
    dist.gather_object(images, parts, dst=last, group=world.cpu_group)
    return images if parts is None else [image for part in parts for image in part]


@register_model(REGISTERED["sd3"])
class SD3Model(_Model):
    """SD3-medium and SD3.5."""

    pipeline_class = xFuserStableDiffusion3Pipeline
    hybrid_class = HybridStableDiffusion3Pipeline
    capabilities = ModelCapabilities(
        pipefusion_parallel_degree=True,
        use_cfg_parallel=True,
        use_parallel_vae=True,
        enable_slicing=True,
        enable_tiling=True,
    )


@register_model(REGISTERED["sdxl"])
class SDXLModel(_Model):
    """SDXL. xDiT has no strategy for its U-Net but CFG parallelism."""

    pipeline_class = xFuserStableDiffusionXLPipeline
    hybrid_class = HybridStableDiffusionXLPipeline
    capabilities = ModelCapabilities(
        ulysses_degree=False,
        ring_degree=False,
        use_cfg_parallel=True,
        use_parallel_vae=True,
        enable_slicing=True,
        enable_tiling=True,
    )
