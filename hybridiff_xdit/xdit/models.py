"""Models of xDiT's runner: its own under hybrid-cond, and any diffusers pipeline that has no model there.

xDiT's classes are taken as they are. They load the pipeline, split its tokens, call it and save what it makes; what
hybrid-cond adds is in `HybridModel`, which `model_class` puts before any of them.
"""

from __future__ import annotations

import inspect
import re
import time
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar

import diffusers
import torch
import torch.distributed as dist
from diffusers import DiffusionPipeline

from .. import HybridConfig
from ..seam.checkpoints import Checkpoint, FamilyCheckpoint, resolve
from ..seam.hooks import DENOISERS, denoiser_of
from . import batch
from .compat import has_accelerator, import_xfuser
from .groups import apply_on_groups, compile_apart, compile_blocks, many_pairs, one_branch
from .options import INPUTS

import_xfuser()

from xfuser import xFuserArgs, xFuserStableDiffusion3Pipeline, xFuserStableDiffusionXLPipeline  # noqa: E402
from xfuser.core.distributed import get_data_parallel_world_size, get_world_group  # noqa: E402
from xfuser.model_executor.models.runner_models.base_model import (  # noqa: E402
    MODEL_REGISTRY,
    DefaultInputValues,
    DiffusionOutput,
    ModelCapabilities,
    ModelSettings,
    xFuserModel,
)
from xfuser.model_executor.models.runner_models.stable_diffusion import xFuserStableDiffusionModel  # noqa: E402

#: Where xDiT's own models stand.
_RUNNERS = "xfuser.model_executor.models.runner_models."

#: Frames a second of a video, where no model of xDiT's says how many there are.
FPS = 16

#: xDiT's model, by the class of a checkpoint's pipeline; with "*", where it has two denoisers.
OF_PIPELINE = {
    "WanPipeline": "Wan2.1-T2V",
    "WanPipeline*": "Wan2.2-T2V",
    "WanImageToVideoPipeline": "Wan2.1-I2V",
    "WanImageToVideoPipeline*": "Wan2.2-I2V",
    "WanVACEPipeline": "Wan2.1-VACE-14B",
    "QwenImagePipeline": "Qwen-Image",
    "QwenImageEditPipeline": "Qwen-Image-Edit",
    "QwenImageEditPlusPipeline": "Qwen-Image-Edit-2509",
    "HunyuanVideo15Pipeline": "Hunyuanvideo-1.5",
    "ZImagePipeline": "Z-Image",
    "LTX2Pipeline": "LTX-2",
    "Lumina2Pipeline": "Lumina2",
    "Krea2Pipeline": "Krea-2-Raw",
    "Ideogram4Pipeline": "Ideogram-4",
    "Cosmos3OmniPipeline": "Cosmos3-Nano",
    "FluxPipeline": "FLUX.1-dev",
    "Flux2KleinPipeline": "FLUX.2-klein-9B",
}

#: What is asked for unless the user says otherwise, where xDiT's default is to do without guidance.
GUIDED: dict[str, dict[str, Any]] = {"xFuserQwenImageModel": {"guidance_scale": 4.0, "negative_prompt": " "}}


def model_class(name: str, hybrid: HybridConfig | None) -> type[xFuserModel]:
    """The class of the model that ``--model name`` means, running hybrid-cond if that is given.

    xDiT's own where it has one, by its names or by the class of the checkpoint's pipeline; else `DiffusersModel`.

    Raises:
        ValueError: there is no such model.
    """
    known = MODEL_REGISTRY.get(name)
    if known is not None and (hybrid is None or not issubclass(known, xFuserStableDiffusionModel)):
        return _class(known, hybrid)
    checkpoint = resolve(name)
    if isinstance(checkpoint, FamilyCheckpoint):  # whose layers we split too, and diffusers' pipelines let us
        return _class(DiffusersModel if hybrid else LEGACY[checkpoint.family], hybrid)
    return _class(_of(checkpoint), hybrid)


def _of(checkpoint: Checkpoint) -> type[xFuserModel]:
    index = checkpoint.index or DiffusionPipeline.load_config(checkpoint.source)
    name = index["_class_name"]
    has_two = (index.get("transformer_2") or [None, None]) != [None, None]
    known = "Wan2.2-TI2V" if index.get("expand_timesteps") else OF_PIPELINE.get(f"{name}*" if has_two else name)
    if known not in MODEL_REGISTRY:
        return DiffusersModel
    base = MODEL_REGISTRY[known]

    def _customize_settings(self: xFuserModel, config: xFuserArgs) -> None:
        base._customize_settings(self, config)
        self.settings.model_name, self.settings.output_name = checkpoint.source, _output_name(checkpoint.name)

    fields = {
        "_customize_settings": _customize_settings,
        "default_input_values": replace(base.default_input_values, **checkpoint.asks),
        "__module__": base.__module__,
    }
    return type(base.__name__, (base,), fields)


def _class(base: type[xFuserModel], hybrid: HybridConfig | None) -> type[xFuserModel]:
    """A class with what the machine and the strategy add to it."""
    added = [] if has_accelerator() else [OnCPU]
    fields: dict[str, Any] = {"__module__": base.__module__}
    if base.__module__.endswith(".z_image") and not takes_z_images_call():
        fields["source"] = base.settings.model_name
        base = DiffusersModel
    if base.__module__.endswith(".cosmos3"):
        added.append(Cosmos3)
    if hybrid is not None:
        added.insert(0, HybridModel)
        defaults = next((GUIDED[cls.__name__] for cls in base.__mro__ if cls.__name__ in GUIDED), {})
        fields |= {"hybrid": hybrid, "default_input_values": replace(base.default_input_values, **defaults)}
    return type(base.__name__, (*added, base), fields)


def takes_z_images_call() -> bool:
    """Whether xDiT's Z-Image takes what diffusers' pipeline calls it with. (xfuser 0.7.0's with 0.42 does not.)"""
    from diffusers import ZImageTransformer2DModel
    from xfuser.model_executor.models.transformers.transformer_z_image import xFuserZImageTransformer2DWrapper

    both = ZImageTransformer2DModel, xFuserZImageTransformer2DWrapper
    theirs, xdits = (inspect.signature(cls.forward).parameters for cls in both)
    return "joint_attention_kwargs" in xdits or "joint_attention_kwargs" not in theirs


def _output_name(name: str) -> str:
    return name.strip("/").rsplit("/")[-1]


class HybridModel(xFuserModel):
    """What a model of the runner gets under hybrid-cond."""

    hybrid: ClassVar[HybridConfig]
    is_applied = False

    def __init__(self, config: xFuserArgs) -> None:
        # A model need not know of CFG parallelism or of stages: these are not its own but ours.
        asked = {name: getattr(config, name) for name in ("use_cfg_parallel", "pipefusion_parallel_degree")}
        config.use_cfg_parallel, config.pipefusion_parallel_degree = False, 1
        try:
            super().__init__(config)
        finally:
            for name, value in asked.items():
                setattr(config, name, value)

    def initialize(self, input_args: dict[str, Any]) -> None:
        with many_pairs():
            super().initialize(input_args)
        self._apply()

    def _apply(self) -> None:
        if self.is_applied:
            return
        splits, name = not isinstance(self, DiffusersModel), self.config.model
        apply_on_groups(self.pipe, self.hybrid, self.engine_config, model=name, splits=splits)
        self.is_applied = True

    def _compile_model(self, input_args: dict[str, Any]) -> None:
        import torch._inductor.config

        for name, value in compile_apart().items():
            setattr(torch._inductor.config, name, value)
        self._apply()  # what is compiled is what will run: one branch's evaluation
        super()._compile_model(input_args)

    def _get_compile_warmup_steps(self, input_args: dict[str, Any]) -> int | None:
        return None  # a plan belongs to a run's length

    def _run_pipe(self, input_args: dict[str, Any]) -> DiffusionOutput:
        with nullcontext() if isinstance(self, DiffusersModel) else one_branch():
            return super()._run_pipe(input_args)

    def _validate_args(self, input_args: dict[str, Any]) -> None:
        super()._validate_args(input_args)
        given = [name for name in INPUTS if getattr(self.config, name, None) not in (None, [])]
        read = read_inputs(self)
        if idle := [f"--{name}" for name in given if name not in read]:
            raise ValueError(f"{' and '.join(idle)}: no effect on {self.settings.model_name}. Drop what has none.")


def read_inputs(model: xFuserModel) -> set[str]:
    """Which of `INPUTS` a model reads: of one of xDiT's, those that the source of its class names."""
    if isinstance(model, DiffusersModel):
        return {flag for flag in INPUTS if model.parameter(flag)}
    theirs = [cls for cls in type(model).__mro__ if cls.__module__.startswith(_RUNNERS) and cls is not xFuserModel]
    methods = {method for cls in theirs for method in vars(cls).values() if inspect.isfunction(method)}
    # By method: to find a class in its file, Python parses it.
    sources = (inspect.getsource(method) for method in methods)
    return {name for source in sources for name in re.findall(r"input_args(?:\.get\(|\[)[\"'](\w+)", source)}


class Cosmos3(xFuserModel):
    """xDiT's Cosmos3, whose denoiser takes no ``return_dict``. diffusers' pipeline gives it one from 0.40 on."""

    def _validate_config(self, config: xFuserArgs) -> None:
        super()._validate_config(config)
        if isinstance(self, HybridModel) and config.ulysses_degree * config.ring_degree > 1:
            raise ValueError(
                "--parallel hybrid-cond cannot be combined with --ulysses_degree and --ring_degree on Cosmos3: where "
                "the tokens are split, xDiT's attention counts those of the text once for each part, which makes "
                "another video. Drop the flag."
            )

    def _load_model(self) -> DiffusionPipeline:
        pipe = super()._load_model()
        wrapper = type(pipe.transformer)

        def forward(self: torch.nn.Module, *, return_dict: bool = False, **inputs: Any) -> tuple[Any, ...]:
            made = wrapper.forward(self, **inputs)
            return made if isinstance(made, tuple) else (made.sample, made.sound, made.action)

        pipe.transformer.__class__ = type(wrapper.__name__, (wrapper,), {"forward": forward})
        return pipe


class DiffusersModel(xFuserModel):
    """Any diffusers pipeline, called with what the user gives of what its call takes."""

    capabilities = ModelCapabilities(use_parallel_vae=True, enable_slicing=True, enable_tiling=True)
    source: str | None = None  # what to load, where --model is a name of xDiT's
    checkpoint: Checkpoint

    def _customize_settings(self, config: xFuserArgs) -> None:
        self.checkpoint = checkpoint = resolve(self._source(config))
        name = checkpoint.pipeline or DiffusionPipeline.load_config(checkpoint.source)["_class_name"]
        pipeline = getattr(diffusers, name, None)
        if pipeline is None:
            raise ValueError(f"--model {config.model}: diffusers {diffusers.__version__} has no {name}.")
        self._parameters = inspect.signature(pipeline.__call__).parameters
        is_video = "num_frames" in self._parameters
        if is_video:
            config.use_vae_channels_last_format = False  # xDiT would take the VAE for one of three dimensions
        self.settings = ModelSettings(
            model_name=checkpoint.source,
            output_name=_output_name(checkpoint.name),
            model_output_type="video" if is_video else "image",
            fps=FPS if is_video else None,
        )
        if isinstance(checkpoint, FamilyCheckpoint):
            self.default_input_values = DefaultInputValues(
                height=checkpoint.size,
                width=checkpoint.size,
                num_inference_steps=checkpoint.steps,
                guidance_scale=checkpoint.guidance_scale,
            )
        else:
            defaults = {flag: self._parameters[name].default for flag in INPUTS if (name := self.parameter(flag))}
            known = DefaultInputValues.__annotations__.keys() & defaults.keys()
            self.default_input_values = DefaultInputValues(**{name: defaults[name] for name in known})
        is_split = isinstance(self, HybridModel) and getattr(checkpoint, "family", None) == "sd3"
        self.capabilities = replace(
            self.capabilities,
            ulysses_degree=is_split,
            ring_degree=is_split,
            data_parallel_degree=isinstance(checkpoint, FamilyCheckpoint),
        )

    def _source(self, config: xFuserArgs) -> str:
        return config.model if self.source is None or config.model not in MODEL_REGISTRY else self.source

    def parameter(self, flag: str) -> str | None:
        """The parameter of the pipeline's call that a flag sets; None where there is none."""
        # Where there are both, guidance_scale is what a distilled model is told of guidance.
        names = {"input_images": ("image",), "guidance_scale": ("true_cfg_scale", "guidance_scale")}.get(flag, (flag,))
        return next((name for name in names if name in self._parameters), None)

    def _how_to_load(self) -> dict[str, Any]:
        dtype = self.checkpoint.dtype if has_accelerator() else torch.float32
        return {"torch_dtype": dtype, **dict.fromkeys(self.checkpoint.absent)}

    def _load_model(self) -> DiffusionPipeline:
        pipe = DiffusionPipeline.from_pretrained(self.checkpoint.source, **self._how_to_load())
        if self.config.use_torch_compile and isinstance(self.checkpoint, FamilyCheckpoint):
            compile_blocks(denoiser_of(pipe))
        return pipe

    def _compile_model(self, input_args: dict[str, Any]) -> None:
        if isinstance(self.checkpoint, FamilyCheckpoint):
            self._run_timed_pipe(input_args)  # compiles the blocks
        else:
            super()._compile_model(input_args)

    def _get_runtime_state_pipeline(self) -> Any:
        if isinstance(self.checkpoint, FamilyCheckpoint):
            return self.pipe
        return SimpleNamespace(unet=None)  # xDiT would look for what its own split needs, which is not used

    def _get_compiled_pipe_components(self) -> list[str]:
        return [name for name in DENOISERS if isinstance(getattr(self.pipe, name, None), torch.nn.Module)]

    def _run_pipe(self, input_args: dict[str, Any]) -> DiffusionOutput:
        call = {
            name: input_args[flag]
            for flag in ("prompt", *INPUTS)
            if (name := self.parameter(flag)) and input_args.get(flag) not in (None, [])
        }
        if len(call.get("image", ())) == 1:
            (call["image"],) = call["image"]
        call["generator"] = torch.Generator(self.pipe._execution_device).manual_seed(input_args["seed"])
        made = self._make(call)
        if get_data_parallel_world_size() > 1:
            made = _gathered(made)
        kind = {"image": "images", "video": "videos"}[self.settings.model_output_type]
        if not made:
            return DiffusionOutput(**{kind: []}, pipe_args=input_args)
        first = made[0] if kind == "images" else made[0][0]
        height, width = first.shape[:2] if hasattr(first, "shape") else (first.height, first.width)
        return DiffusionOutput(**{kind: made}, pipe_args={**input_args, "height": height, "width": width})

    def _make(self, call: dict[str, Any]) -> list[Any]:
        """The pictures that this rank hands out."""
        return batch.share_of_call(self.pipe, call, decodes=self.config.use_parallel_vae)

    # xDiT's runner would deal the prompts out in turn and put the pictures together group by group, in another order,
    # and from ranks that have none here. `batch` deals out every call, and `_run_pipe` gathers it.

    def _split_prompts_for_dp(self, input_args: dict[str, Any]) -> dict[str, Any]:
        return input_args

    def _gather_dp_outputs(self, output: DiffusionOutput) -> DiffusionOutput:
        return output


class LegacyModel(DiffusersModel):
    """SD3 and SDXL by xDiT's own strategies, which its pipelines alone have."""

    pipeline: ClassVar[Any]

    def _load_model(self) -> Any:
        return self.pipeline.from_pretrained(
            pretrained_model_name_or_path=self.checkpoint.source,
            engine_config=self.engine_config,
            **self._how_to_load(),
        )

    def _make(self, call: dict[str, Any]) -> list[Any]:
        output = self.pipe(**call)
        return list(output.images) if output else []

    def initialize(self, input_args: dict[str, Any]) -> None:
        # The pipeline's wrapper splits the VAE's decoder, and xDiT's runner would do it once more.
        if hasattr(self, "_vae_manager"):
            self._vae_manager.setup_parallel_vae = lambda vaes: None
        super().initialize(input_args)

    def _compile_model(self, input_args: dict[str, Any]) -> None:
        xFuserModel._compile_model(self, input_args)


class LegacySD3(LegacyModel):
    """SD3-medium and SD3.5."""

    pipeline = xFuserStableDiffusion3Pipeline
    capabilities = replace(
        DiffusersModel.capabilities, pipefusion_parallel_degree=True, use_cfg_parallel=True, ulysses_degree=True,
        ring_degree=True,
    )  # fmt: skip


class LegacySDXL(LegacyModel):
    """SDXL. xDiT has no strategy for its U-Net but CFG parallelism."""

    pipeline = xFuserStableDiffusionXLPipeline
    capabilities = replace(DiffusersModel.capabilities, use_cfg_parallel=True, ulysses_degree=False, ring_degree=False)


#: By family.
LEGACY: dict[str, type[LegacyModel]] = {"sd3": LegacySD3, "sdxl": LegacySDXL}


class OnCPU(xFuserModel):
    """What xDiT's runner lacks where there is no accelerator: it places a pipeline on CUDA, and times by its events."""

    def __init__(self, config: xFuserArgs) -> None:
        super().__init__(config)
        if hasattr(self, "loader"):
            self.loader.materialize_pipeline = self._in_float32

    def _in_float32(self) -> None:
        for name in ("pipe", "second_pipe", "upsample_pipe", "decode_pipe"):  # LTX-2's other passes
            if pipe := getattr(self, name, None):
                pipe.to(dtype=torch.float32)

    def _run_timed_pipe(self, input_args: dict[str, Any]) -> tuple[DiffusionOutput, float]:
        if hasattr(self, "prepare_run"):
            self.prepare_run(input_args)
        start = time.perf_counter()
        output = self._run_pipe(input_args)
        return output, time.perf_counter() - start

    def run(self, input_args: dict[str, Any]) -> tuple[DiffusionOutput, list[float]]:
        self._validate_args(input_args)
        input_args = self._split_prompts_for_dp(input_args)
        self._run_warmup_calls(input_args)
        timings: list[float] = []
        for _ in range(self.config.num_iterations):
            if self.config.batch_size:
                output, batch_timings = self._run_pipe_batched(input_args)
                timings += batch_timings
            else:
                output, seconds = self._run_timed_pipe(input_args)
                timings.append(seconds)
        return self._gather_dp_outputs(output), timings


def _gathered(images: list[Any]) -> list[Any]:
    """On the last rank the pictures of all data parallel groups in order, on the others this rank's."""
    world = get_world_group()
    last = world.world_size - 1
    parts: list[Any] | None = [None] * world.world_size if world.rank == last else None
    dist.gather_object(images, parts, dst=last, group=world.cpu_group)
    return images if parts is None else [image for part in parts for image in part]
