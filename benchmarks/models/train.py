"""Trains one of the small models within a time budget.

    python benchmarks/models/train.py --model emoji-wan --data .data/emoji.npz --out OUT/emoji-wan --minutes 7.5

The folder written loads with `DiffusionPipeline.from_pretrained`; a sheet of what it draws lies beside it. Order of
work: a VAE, its latents of the whole data set, then the denoiser and the text encoders together. What is saved is their
moving average. `recipes.py` holds what differs between the models.
"""

from __future__ import annotations

import time

START = time.monotonic()  # the budget counts the imports below too

import argparse  # noqa: E402
import copy  # noqa: E402
import json  # noqa: E402
import logging  # noqa: E402
import math  # noqa: E402
import shutil  # noqa: E402
from pathlib import Path  # noqa: E402

import diffusers  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import transformers  # noqa: E402
from clips import Clips  # noqa: E402
from data import Emoji, load  # noqa: E402
from diffusers import DiffusionPipeline  # noqa: E402
from recipes import RECIPES, Recipe, standardise  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from sample import denoiser, draw, prompts_of, sheet  # noqa: E402
from scenes import Scenes  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers import CLIPTokenizer  # noqa: E402

logger = logging.getLogger("train")

RESERVE = 40.0  # seconds that the end takes: saving, checking, the sheet
VAE_FRAMES = 5  # of a clip: the first one, and two pairs
CHECKPOINTS = (0.5, 0.8)  # of the training's time
COUNTS = {"scenes": 40_000, "clips": 24_000}  # examples; the emoji are as many as there are
LIMIT = 16  # examples of a run that is bounded in steps

Data = Emoji | Scenes | Clips


class Bound:
    """How much of a time, or of a number of steps, is over."""

    def __init__(self, until: float, steps: int | None) -> None:
        self._begin, self._until, self._steps = time.monotonic(), until, steps

    def progress(self, step: int) -> float:
        """From 0 to 1, where it is time to end."""
        if self._steps is not None:
            return step / self._steps
        return (time.monotonic() - self._begin) / max(self._until - self._begin, 1e-3)


class Average:
    """Moving averages of weights."""

    def __init__(self, weights: list[nn.Parameter]) -> None:
        self._weights = weights
        self.values = [weight.detach().clone() for weight in weights]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After the step of that number, from 0."""
        decay = min(0.999, (2 + step) / (11 + step))
        torch._foreach_lerp_(self.values, self._weights, 1 - decay)


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 on a GPU; a CPU is faster without."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def parameters(modules: list[nn.Module]) -> list[nn.Parameter]:
    """All parameters of the modules, in order."""
    return [weight for module in modules for weight in module.parameters()]


def step(optimizer: torch.optim.Optimizer, loss: Tensor, rate: float) -> None:
    """One update with that learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_([weight for group in optimizer.param_groups for weight in group["params"]], 1.0)
    optimizer.step()


def report(what: str, number: int, loss: Tensor, progress: float) -> None:
    """Log the loss of a step; it must be finite. This also keeps the host near the device."""
    value = loss.item()
    if not math.isfinite(value):
        raise RuntimeError("the loss is not finite: the last checkpoint stands")
    if number % 200 == 0:
        logger.info("%s step %d, %.0f %% done, loss %.4f", what, number, 100 * progress, value)


# --- VAE ----------------------------------------------------------------------------------------


def train_vae(vae: nn.Module, recipe: Recipe, data: Data, batch: int, bound: Bound) -> None:
    """Train the VAE until `bound` is reached."""
    device = data.weights.device
    optimizer = torch.optim.AdamW(vae.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    number = 0
    while (progress := bound.progress(number)) < 1:
        pictures = recipe.pixels(data.draw(torch.randint(len(data.captions), (batch,), device=device)))
        if recipe.data == "clips":
            begin = int(torch.randint(pictures.shape[2] - VAE_FRAMES + 1, ()))
            pictures = pictures[:, :, begin : begin + VAE_FRAMES]
        with autocast(device):
            posterior = vae.encode(pictures).latent_dist
            again = vae.decode(posterior.sample()).sample.float()
        loss = F.l1_loss(again, pictures) + F.mse_loss(again, pictures)
        loss = loss + 1e-6 * posterior.kl().mean() / posterior.mean[0].numel()
        step(optimizer, loss, 2e-3 * min(1.0, (number + 1) / 100) * (0.01 + 0.99 * math.cos(progress * math.pi / 2)))
        if number % 20 == 0:
            report("vae", number, loss, progress)
        number += 1
    logger.info("vae done: %d steps", number)


@torch.no_grad()
def encode_all(vae: nn.Module, recipe: Recipe, data: Data) -> Tensor:
    """The VAE's latents of all examples: float32 [N, C, ...]. Also logs how well it decodes the first ones."""
    device, latents = data.weights.device, []
    with autocast(device):
        for index in torch.arange(len(data.captions), device=device).split(64):
            pictures = recipe.pixels(data.draw(index))
            latents.append(vae.encode(pictures).latent_dist.mode().float())
            if len(latents) == 1:
                error = (vae.decode(latents[0]).sample.float() - pictures).square().mean()
                logger.info("vae: PSNR %.2f dB", 10 * math.log10(4 / error.item()))
    return torch.cat(latents)


# --- saving -------------------------------------------------------------------------------------


def save(shelf: DiffusionPipeline, out: Path) -> None:
    """Write the float16 pipeline's folder, which every supported release of diffusers and transformers reads."""
    fresh = out.with_name(out.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    shelf.save_pretrained(fresh, safe_serialization=True, max_shard_size="14MB")
    for name, part in shelf.components.items():
        if isinstance(part, CLIPTokenizer):  # the plain files
            shutil.rmtree(fresh / name)
            shutil.copytree(part.name_or_path, fresh / name)
        if type(part).__name__.startswith("CLIPText"):  # transformers 4 wants the prefix, 5 reads both
            path = fresh / name / "model.safetensors"
            state = {k if k.startswith("text_") else f"text_model.{k}": v for k, v in load_file(path).items()}
            save_file(state, path, metadata={"format": "pt"})
    for path in fresh.glob("text_encoder*/config.json"):  # load as float32, like the other parts
        config = json.loads(path.read_text())
        config.pop("torch_dtype", None)
        path.write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n")
    for path in fresh.glob("tokenizer*/tokenizer_config.json"):  # transformers 4 takes no list of special tokens
        config = json.loads(path.read_text())
        config.pop("extra_special_tokens", None)
        path.write_text(json.dumps(config, indent=2) + "\n")
    index = fresh / "model_index.json"  # older releases know the fast tokenizer by this name
    index.write_text(index.read_text().replace('"T5Tokenizer"', '"T5TokenizerFast"'))
    shutil.rmtree(out, ignore_errors=True)
    fresh.rename(out)
    weights = sum(path.stat().st_size for path in out.rglob("*.safetensors"))
    logger.info("saved %s, weights %.1f MB", out, weights / 1e6)


@torch.no_grad()
def verify(recipe: Recipe, out: Path) -> None:
    """The saved pipeline's text is what training made of it."""
    pipe = DiffusionPipeline.from_pretrained(out, local_files_only=True)
    for prompt in (prompts_of(pipe)[0], recipe.empty):
        expected = recipe.encode_prompt(pipe, prompt)
        found = recipe.encode(pipe, recipe.tokenize(pipe, [prompt]))
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name], msg=lambda text: f"{name} of {prompt!r}: {text}")  # noqa: B023
    logger.info("verified: training and %s.encode_prompt agree", type(pipe).__name__)


# --- training -----------------------------------------------------------------------------------


def make_data(recipe: Recipe, path: Path, device: torch.device, limit: int | None) -> Data:
    """The recipe's data set on the device."""
    if recipe.data == "scenes":
        return Scenes(limit or COUNTS["scenes"], device)
    arrays, captions = load(path)
    pictures = torch.from_numpy(arrays[:limit]).permute(0, 3, 1, 2).contiguous().to(device)  # uint8 [N, 3, 64, 64]
    if recipe.data == "clips":
        return Clips(pictures, captions[:limit], limit or COUNTS["clips"])
    return Emoji(pictures, captions[:limit])


def compile_blocks(model: nn.Module, names: tuple[str, ...]) -> list[nn.Module]:
    """Compile the blocks of those classes in place; their list."""
    torch._dynamo.config.recompile_limit = 64  # a U-Net's blocks have many shapes
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    for block in blocks:
        block.compile(dynamic=False)
    return blocks


def train(recipe: Recipe, pipe: DiffusionPipeline, data: Data, latents: Tensor, args: argparse.Namespace) -> None:
    """Train all parts but the VAE until the time is over, and save them."""
    device = latents.device
    ids = recipe.tokenize(pipe, data.captions).to(device)
    empty = recipe.tokenize(pipe, [recipe.empty]).to(device)
    shelf = copy.deepcopy(pipe).to("cpu", torch.float16)  # what is saved; never compiled
    places = parameters(recipe.trained(shelf))
    weights = parameters(recipe.trained(pipe))
    average = Average(weights)
    optimizer = torch.optim.AdamW(weights, lr=0.0, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    blocks = [] if args.eager else compile_blocks(denoiser(pipe), recipe.compiled)
    bound = Bound(START + 60 * args.minutes - RESERVE, args.steps)

    def loss_of(picked: Tensor) -> Tensor:
        example = recipe.example(pipe, latents[picked])
        dropped = torch.rand(len(picked), 1, device=device) < 0.1
        with autocast(device):
            text = recipe.encode(pipe, torch.where(dropped, empty, ids[picked]))
            predicted = recipe.predict(pipe, example.noisy, example.time, text)
        error = (predicted.float() - example.target).square().flatten(1).mean(1)
        return (error * example.weight).mean()

    @torch.no_grad()
    def checkpoint() -> None:
        for place, value in zip(places, average.values, strict=True):
            place.copy_(value)
        save(shelf, args.out)

    marks, number = list(CHECKPOINTS), 0
    while (progress := bound.progress(number)) < 1:
        picked = torch.multinomial(data.weights, args.batch or recipe.batch, replacement=True)
        rate = recipe.lr * min(1.0, (number + 1) / 300) * (0.505 + 0.495 * math.cos(math.pi * progress))
        try:
            loss = loss_of(picked)
            step(optimizer, loss, rate)
        except Exception:
            if number or not blocks:
                raise
            logger.exception("the compiled blocks failed: training eagerly")
            for block in blocks:
                block._compiled_call_impl = None
            blocks = []
            continue
        average.update(number)
        if number % 20 == 0:
            report("denoiser", number, loss, progress)
        if number == 0:
            logger.info("first step done %.0f s after the start", time.monotonic() - START)
        if marks and progress >= marks[0]:
            marks.pop(0)
            checkpoint()
        number += 1
    logger.info("trained %d steps, %.0f s after the start", number, time.monotonic() - START)
    checkpoint()


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=RECIPES, required=True)
    parser.add_argument("--data", type=Path, required=True, help="the .npz file of data.py")
    parser.add_argument("--out", type=Path, required=True, help="folder of the pipeline")
    parser.add_argument("--minutes", type=float, default=7.5, help="for everything, from start")
    parser.add_argument("--steps", type=int, help="train by so many steps on a few examples instead (smoke tests)")
    parser.add_argument("--batch", type=int, help="examples of a step, if not the recipe's")
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Train, save, verify and sample one model within the budget."""
    args = parse()
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s {args.model} %(message)s", datefmt="%H:%M:%S")
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    args.out.parent.mkdir(parents=True, exist_ok=True)
    device, recipe = torch.device(args.device), RECIPES[args.model]

    data = make_data(recipe, args.data, device, LIMIT if args.steps else None)
    pipe = recipe.build(data.captions).to(device)
    sizes = {n: p for n, p in pipe.components.items() if isinstance(p, nn.Module)}
    counted = ", ".join(f"{n} {sum(w.numel() for w in p.parameters()) / 1e6:.2f}" for n, p in sizes.items())
    logger.info("%d examples; parameters (M): %s", len(data.captions), counted)

    vae_batch = min(recipe.vae_batch, args.batch or recipe.vae_batch)
    train_vae(pipe.vae, recipe, data, vae_batch, Bound(time.monotonic() + recipe.vae_seconds, args.steps))
    pipe.vae.requires_grad_(False)
    latents = standardise(pipe.vae, encode_all(pipe.vae, recipe, data))
    train(recipe, pipe, data, latents, args)

    drawn = DiffusionPipeline.from_pretrained(args.out, local_files_only=True).to(device)
    prompts = prompts_of(drawn)
    sheet(draw(drawn, prompts, steps=min(50, args.steps or 50)), prompts).save(args.out.with_name(f"{args.model}.png"))
    verify(recipe, args.out)
    logger.info("done %.0f s after the start", time.monotonic() - START)


if __name__ == "__main__":
    main()
