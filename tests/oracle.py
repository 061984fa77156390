"""The scheme on one process, as a plain loop. It shares no code with the engine: diffusers models and schedulers only.

`Oracle` makes (pred_u, pred_c) of one step after another. `denoise` puts it in a loop of its own; `inside` lets a plain
pipeline's loop call it in place of the denoiser, for the features that live in that loop.

On a PIPELINED step two parts of the network are evaluated, at once, on two ranks:

    SD3    front(step i)                              -> boundary, read by back(step i + 1)
    U-Net  inner(step i; outer-down features of step i) -> boundary, read by outer-up(step i + 1)

After a FULL step the boundary is the one of its cond branch.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import SD3Transformer2DModel

#: Where each tiny denoiser is cut. SD3: number of blocks in front. U-Net: first and last module of the inner part.
CUTS = {
    "sd3": 2,
    "sdxl": ("down_blocks.1.downsamplers.0", "up_blocks.0.attentions.2"),
    "sd15": ("down_blocks.0.downsamplers.0", "up_blocks.1.attentions.2"),
}


class Oracle:
    """(pred_u, pred_c) of each step.

    Args:
        denoiser: the model.
        plan: a letter F or P a step.
        rule: ``mixed``, ``none`` or ``reuse``.
        cut: see `CUTS`.
    """

    def __init__(self, denoiser, plan, rule, cut):
        self.denoiser, self.plan, self.rule, self.cut = denoiser, plan, rule, cut
        self.forward = denoiser.forward
        self.two_parts = sd3 if isinstance(denoiser, SD3Transformer2DModel) else unet
        self.steps = 0
        self.boundary = self.delta = None
        self.discrepancy = []

    @torch.no_grad()
    def __call__(self, uncond, cond):
        kind = self.plan[self.steps]
        self.steps += 1
        if kind == "F":
            pred_u, pred_c = (self.forward(**{**branch, "return_dict": False})[0] for branch in (uncond, cond))
            if self.plan[self.steps : self.steps + 1] == "P":
                _, self.boundary = self.two_parts(self.denoiser, self.cut, cond, cond, None)
            self.delta = pred_c - pred_u
            self.discrepancy.append((self.delta.abs().mean() / pred_u.abs().mean()).item())
            return pred_u, pred_c
        stage0 = uncond if self.rule == "mixed" else cond
        pred, self.boundary = self.two_parts(self.denoiser, self.cut, stage0, cond, self.boundary)
        return (pred - self.delta if self.rule == "reuse" else pred), pred


def sd3(model, cut, stage0, stage1, boundary):
    """The prediction of stage 1 that reads ``boundary`` (None: stage 0's of this step), and stage 0's boundary."""

    def blocks(given, image, text, which):
        time = model.time_text_embed(given["timestep"], given["pooled_projections"])
        for block in which:
            text, image = block(hidden_states=image, encoder_hidden_states=text, temb=time)
        return image, text, time

    fresh = blocks(
        stage0,
        model.pos_embed(stage0["hidden_states"]),
        model.context_embedder(stage0["encoder_hidden_states"]),
        model.transformer_blocks[:cut],
    )[:2]
    image, _, time = blocks(stage1, *(boundary or fresh), model.transformer_blocks[cut:])
    patches = model.proj_out(model.norm_out(image, time))  # [B, h * w, 2 * 2 * C]
    size = [side // 2 for side in stage1["hidden_states"].shape[-2:]]
    pixels = patches.unflatten(2, (2, 2, -1)).unflatten(1, size)  # [B, h, w, 2, 2, C]
    return pixels.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3), fresh


def unet(model, cut, stage0, stage1, boundary):
    """As `sd3`: stage 0 is the inner part, which reads the outer-down features of stage 1's own step."""
    order = list(modules_in_order(model))
    first, last = order.index(cut[0]), order.index(cut[1])
    inner, outer = condition(model, stage0), condition(model, stage1)
    forced = any(side % 2**model.num_upsamplers for side in stage1["sample"].shape[-2:])
    skips, inner_skips = [], []
    features = evaluate(model, order[:first], stage1["sample"], skips, *outer, forced)
    fresh = evaluate(model, order[first : last + 1], features, inner_skips, *inner, forced)
    assert not inner_skips, "the inner part left a skip for the outer part"
    hidden = fresh if boundary is None else boundary
    return evaluate(model, order[last + 1 :], hidden, skips, *outer, forced), fresh


def modules_in_order(model):
    """Names of the modules in the order of the forward."""
    yield "conv_in"
    for side, blocks in (("down", model.down_blocks), ("mid", None), ("up", model.up_blocks)):
        if blocks is None:
            yield "mid_block"
            continue
        for i, block in enumerate(blocks):
            for j in range(len(block.resnets)):
                yield f"{side}_blocks.{i}.resnets.{j}"
                if hasattr(block, "attentions"):
                    yield f"{side}_blocks.{i}.attentions.{j}"
            if getattr(block, f"{side}samplers") is not None:
                yield f"{side}_blocks.{i}.{side}samplers.0"
    yield "conv_out"


def condition(model, given):
    """Time embedding and text of one branch."""
    sample = given["sample"]
    time = given["timestep"].reshape(-1).expand(sample.shape[0])
    embedding = model.time_embedding(model.time_proj(time).to(sample.dtype))
    if added := given.get("added_cond_kwargs"):
        sizes = model.add_time_proj(added["time_ids"].flatten()).reshape(sample.shape[0], -1)
        embedding = embedding + model.add_embedding(torch.cat([added["text_embeds"], sizes], dim=-1).to(sample.dtype))
    return embedding, given["encoder_hidden_states"]


def evaluate(model, names, hidden, skips, time, text, forced):
    """Run the named modules in turn; skips are pushed on the way down and popped on the way up."""
    for name in names:
        module, kind = model.get_submodule(name), name.split(".")[-2] if "." in name else name
        goes_down = name.startswith("down")
        if kind == "resnets":
            if not goes_down:
                hidden = torch.cat([hidden, skips.pop()], dim=1)
            hidden = module(hidden, time)
        elif kind == "attentions":
            hidden = module(hidden, encoder_hidden_states=text, return_dict=False)[0]
        elif kind == "mid_block":
            hidden = module(hidden, time, encoder_hidden_states=text)
        elif kind == "upsamplers":
            hidden = module(hidden, skips[-1].shape[2:] if forced else None)
        elif kind == "conv_out":
            hidden = module(model.conv_act(model.conv_norm_out(hidden)))
        else:
            hidden = module(hidden)
        last_of_pair = kind == "attentions" or not hasattr(model.get_submodule(name.rsplit(".", 2)[0]), "attentions")
        if kind in ("conv_in", "downsamplers") or (goes_down and last_of_pair):
            skips.append(hidden)
    return hidden


def denoise(pipe, prompt, noise, *, plan, rule="reuse", cut=None, guidance_scale=5.0):
    """Latents of a run over the scheduler's timesteps, and the discrepancy of its FULL steps.

    Args:
        pipe: only its denoiser and its scheduler are used; ``plan`` gives the number of steps.
        prompt: as `tiny.prompt` makes it, [B, ...].
        noise: [B, C, H, W].
    """
    is_sd3 = getattr(pipe, "transformer", None) is not None
    denoiser, scheduler = pipe.transformer if is_sd3 else pipe.unet, pipe.scheduler
    oracle = Oracle(denoiser, plan, rule, cut)
    device = noise.device
    scheduler.set_timesteps(len(plan), device=device)
    latents = noise if is_sd3 else noise * scheduler.init_noise_sigma
    height, width = (2 * side for side in noise.shape[-2:])
    sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=noise.dtype, device=device)

    def given(negative, t):
        text = prompt[f"{negative}prompt_embeds"].to(device)
        pooled = prompt.get(f"{negative}pooled_prompt_embeds", torch.empty(0)).to(device)
        if is_sd3:
            time = t.expand(len(noise))
            embeddings = {"encoder_hidden_states": text, "pooled_projections": pooled}
            return {"hidden_states": latents, "timestep": time, **embeddings}
        branch = {"sample": scheduler.scale_model_input(latents, t), "timestep": t, "encoder_hidden_states": text}
        added = {"text_embeds": pooled, "time_ids": sizes.repeat(len(noise), 1)}
        return {**branch, "added_cond_kwargs": added} if pooled.numel() else branch

    for t in scheduler.timesteps:
        pred_u, pred_c = oracle(given("negative_", t), given("", t))
        guided = pred_u + guidance_scale * (pred_c - pred_u)
        latents = scheduler.step(guided, t, latents, return_dict=False)[0]
    return latents, oracle.discrepancy


@contextmanager
def inside(pipe, *, plan, rule="reuse", cut=None) -> Iterator[Oracle]:
    """Let a plain pipeline's own loop call the oracle in place of its denoiser, with the CFG batch [uncond, cond]."""
    denoiser = getattr(pipe, "transformer", None) or pipe.unet
    oracle = Oracle(denoiser, plan, rule, cut)

    def half(value, index, batch):
        if isinstance(value, dict):
            return {key: half(item, index, batch) for key, item in value.items()}
        is_batched = isinstance(value, torch.Tensor) and value.ndim and len(value) == batch
        return value.chunk(2)[index] if is_batched else value

    def forward(*args, **kwargs):
        kwargs |= zip(("sample", "timestep"), args, strict=False)
        if kwargs.get("skip_layers"):  # skip-layer guidance, beside the two branches
            return oracle.forward(**kwargs)
        if not pipe.do_classifier_free_guidance:  # a callback has turned it off for this step
            oracle.steps += 1
            return oracle.forward(**kwargs)
        batch = len(kwargs["encoder_hidden_states"])
        return (torch.cat(oracle(half(kwargs, 0, batch), half(kwargs, 1, batch))),)

    denoiser.forward = forward
    try:
        yield oracle
    finally:
        del denoiser.forward
