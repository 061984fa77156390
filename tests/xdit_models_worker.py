"""One rank of xDiT's runner with tiny checkpoints of its models: ``xdit_models_worker.py FOLDER NAME FLAGS CASE...``.

Saves to a file of this name, by case, what the model of the runner makes, as latents, and what it is made with. The
texts are embedded already: the pipeline's call is given them in place of the prompts.
"""

import inspect
import json
import os
import sys
import traceback
from functools import partial
from pathlib import Path

import huggingface_hub
import torch
import zoo_successive  # noqa: F401  # a checkpoint names a class of it, and Ideogram 4's text is of there
from diffusers import DiffusionPipeline, Krea2Transformer2DModel
from torch.utils._pytree import tree_map_only

from hybridiff_xdit import last_report
from hybridiff_xdit.seam.checkpoints import resolve
from hybridiff_xdit.xdit import options
from hybridiff_xdit.xdit.runner import HybridRunner

from xfuser.core.distributed import get_runtime_state  # isort: skip  # it imports only after ours
from xfuser.model_executor.models.transformers.transformer_krea2 import xFuserKrea2Transformer2DWrapper

FLAGS = ("height", "width", "num_frames", "num_inference_steps", "guidance_scale", "guidance_scale_2")

#: Those that have a name of xDiT's, and lie where it looks for them.
NAMED = {"ltx2.3": "LTX-2.3", "ltx2.5": "LTX-2.5-full"}
#: What the runner's models that are for several tasks are asked for.
TASKS = {"hunyuan-video15": "t2v", "wan22-ti2v": "t2v", "ltx2.5": "t2v"}


def main(folder: Path, name: str, flags: list[str], cases: list[str]) -> None:
    huggingface_hub.constants.HF_HUB_CACHE, huggingface_hub.constants.HF_HUB_OFFLINE = str(folder / "hub"), True
    load_without_texts()
    # Its constructor names no argument, so that none of the configuration would be read.
    signature = inspect.signature(Krea2Transformer2DModel.__init__)
    xFuserKrea2Transformer2DWrapper.__init__.__signature__ = signature
    torch.Generator = CPUGenerator
    results = {}
    for case in cases:
        try:
            results[case] = run(folder / case, flags)
        except Exception as error:
            results[case] = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
    torch.save(results, folder / f"{name}-{os.environ['RANK']}.pt")
    get_runtime_state().destroy_distributed_env()


class CPUGenerator(torch.Generator):
    """Some of xDiT's models ask for CUDA's, whatever there is."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu")


def load_without_texts() -> None:
    """Have pipelines loaded without the parts that their folder says it has none of. (xDiT's models have them all.)"""
    original = DiffusionPipeline.from_pretrained.__func__

    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        name = pretrained_model_name_or_path
        if not Path(name).is_dir():
            name = str(Path(huggingface_hub.try_to_load_from_cache(name, "model_index.json")).parent)
        return original(cls, name, **{**dict.fromkeys(resolve(name).absent), **kwargs})

    DiffusionPipeline.from_pretrained = classmethod(from_pretrained)


#: What the calls of a pipeline's class are given in place of texts.
GIVEN = {}


def calls_with(pipe: DiffusionPipeline, call: dict) -> None:
    """Have a pipeline called with embeddings in place of texts, and asked for latents."""
    cls = type(pipe)
    is_new = cls not in GIVEN
    GIVEN[cls] = {key: value for key, value in call.items() if key not in FLAGS and key != "image"}
    original = cls.__call__

    def called(self, **kwargs):
        kwargs = {key: value for key, value in kwargs.items() if "prompt" not in key}
        given = tree_map_only(torch.Tensor, partial(as_its_own, self), GIVEN[cls])
        output = original(self, **{**kwargs, **given, "output_type": "latent"})
        if output is None or isinstance(output, tuple):
            return output
        key = next(key for key in ("frames", "video", "images") if hasattr(output, key))
        setattr(output, key, list(getattr(output, key)))  # xDiT asks whether there are any
        return output

    if is_new:
        cls.__call__ = called


def as_its_own(pipe: DiffusionPipeline, given: torch.Tensor) -> torch.Tensor:
    """An argument as the pipeline's denoiser takes it."""
    denoiser = pipe.transformer if hasattr(pipe, "transformer") else pipe.unet
    return given.to(denoiser.device, denoiser.dtype if given.is_floating_point() else None)


def run(source: Path, flags: list[str]) -> dict:
    call = torch.load(source / "call.pt", weights_only=False)
    given = ["--model", NAMED.get(source.name, str(source)), "--prompt", "a", "--seed", "42", *flags]
    call.setdefault("guidance_scale", call.get("true_cfg_scale"))
    for flag in FLAGS:
        given += [f"--{flag}", str(call[flag])] if call.get(flag) is not None else []
    pictures = sorted(map(str, source.glob("*.png")))
    given += ["--input_images", *pictures] if pictures else []
    given += ["--task", TASKS[source.name]] if source.name in TASKS else []
    args = options.build_parser().parse_args(given)
    hybrid = options.prepare(args, 8, int(os.environ["WORLD_SIZE"]))
    runner = HybridRunner(vars(args), hybrid)
    inputs = runner.preprocess_args(vars(args))
    load = runner.model._load_model

    def loaded():
        pipe = load()
        calls_with(pipe, call)
        return pipe

    runner.model._load_model = loaded
    runner.initialize(inputs)
    made, _ = runner.run(inputs)
    pipe = runner.model.pipe
    # LTX-2 hands out frames and sound in one.
    latents = [part for one in made.images or made.videos or [] for part in getattr(one, "frames", [one])]
    return {
        "model": type(runner.model).__name__,
        "denoiser": type(getattr(pipe, "transformer", None)).__name__,
        "made": torch.stack([torch.as_tensor(part) for part in latents]) if latents else None,
        "report": last_report(pipe) if hybrid else None,
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]), sys.argv[4:])
