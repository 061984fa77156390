"""The scheme on one process, as a plain loop. It shares no code with the engine: diffusers models and schedulers only.

`Oracle` makes the streams of one step after another. `denoise` puts it in a loop of its own; `inside` lets a plain
pipeline's loop call it in place of the denoiser, for the features that live in that loop.

On a PIPELINED step two parts of the network are evaluated, at once, on two ranks:

    SD3    front(step i)                              -> boundary, read by back(step i + 1)
    U-Net  inner(step i; outer-down features of step i) -> boundary, read by outer-up(step i + 1)

After a FULL step the boundary is the one of its cond branch. On a SKIPPED step nothing is evaluated.

`Staged` is the same with more stages, whose FULL steps are approximate too.
"""

import copy
import inspect
import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

#: Where each tiny denoiser is cut. SD3: number of blocks in front. U-Net: first and last module of the inner part.
CUTS = {
    "sd3": 2,
    "sdxl": ("down_blocks.1.downsamplers.0", "up_blocks.0.attentions.2"),
    "sd15": ("down_blocks.0.downsamplers.0", "up_blocks.1.attentions.2"),
}

#: The same with more stages, by their number. SD3: number of blocks before each cut. U-Net: first and last module of
#: its regions, outwards.
STAGE_CUTS = {
    ("sd3", 4): [1, 2, 3],
    ("deep sd3", 8): [1, 2, 3, 4, 5, 6, 7],
    ("sdxl", 4): [
        ("down_blocks.2.resnets.1", "up_blocks.0.resnets.0"),
        ("down_blocks.1.downsamplers.0", "up_blocks.0.attentions.2"),
        ("down_blocks.1.attentions.0", "up_blocks.1.attentions.1"),
    ],
    ("sd15", 4): [
        ("down_blocks.1.resnets.1", "up_blocks.1.attentions.0"),
        ("down_blocks.0.attentions.1", "up_blocks.2.resnets.0"),
        ("down_blocks.0.resnets.0", "up_blocks.2.resnets.1"),
    ],
    ("sdxl", 8): [
        ("mid_block", "mid_block"),
        ("down_blocks.2.resnets.1", "up_blocks.0.resnets.0"),
        ("down_blocks.2.resnets.0", "up_blocks.0.resnets.1"),
        ("down_blocks.1.downsamplers.0", "up_blocks.0.attentions.2"),
        ("down_blocks.1.attentions.1", "up_blocks.1.attentions.0"),
        ("down_blocks.0.downsamplers.0", "up_blocks.1.resnets.2"),
        ("down_blocks.0.resnets.1", "up_blocks.2.resnets.0"),
    ],
}

#: With more than two stages, FULL steps at the beginning that read nothing old.
EXACT = 4

#: Relative change of a weight of the guidance up to which a debt counts as paid.
SAME = 1e-3


class Full(NamedTuple):
    """What a FULL step knew: cond, then cond's distance from each other stream."""

    step: int
    parts: list


class Guess(NamedTuple):
    """What was used where a step was not FULL."""

    step: int
    kind: str
    parts: list


class Oracle:
    """The streams of each step: pred_u and pred_c, pred_c alone, or also those beyond the two branches.

    Where a step has another number of streams than the one before, all that came before is forgotten.

    Args:
        denoiser: the model.
        plan: a letter F, P or S a step.
        rule: ``mixed``, ``none``, ``reuse`` or ``deferred``.
        cut: see `CUTS`; of a `Staged`, `STAGE_CUTS`.
        times: of the steps, for ``deferred``.
        gains: of the steps' predictions, for ``deferred``.
        weights: tells for ``deferred``, of a step's streams as they were handed on, what the pipeline's guidance makes
            of each part: that of cond, then that of each distance.
    """

    taken = 1.0  # of the line beyond the last boundary

    def __init__(self, denoiser, plan, rule, cut, times=None, gains=None, weights=lambda *streams: [1.0, 1.0]):
        self.denoiser, self.plan, self.rule, self.cut = denoiser, plan, rule, cut
        self.times, self.gains, self.weights = times, gains, weights
        self.forward = denoiser.forward
        self.is_sd3 = isinstance(denoiser, SD3Transformer2DModel)
        self.two_parts = sd3 if self.is_sd3 else unet
        self.steps = 0
        self.discrepancy = []
        self.count = 0
        self.forget()

    def forget(self):
        self.began = self.steps
        self.boundaries = []  # (time, boundary) that stage 1 knows, in order
        self.fulls = []
        self.guesses = []  # since the last FULL step
        self.weighed = {}  # what the pipeline has made of the parts, by step
        self.owed = []  # (step, what its input to the scheduler missed times its gain, by part) not paid back yet
        self.paid = None  # (step, weights that it assumed, what it paid)
        self.fits = []  # (gamma and the alphas, betas) of the FULL steps, in order
        self.bends = []  # mu and the kappas likewise

    @torch.no_grad()
    def __call__(self, *given):
        """Of each stream's arguments (uncond, cond, others; or cond alone) its prediction."""
        if len(given) != self.count:
            self.count = len(given)
            self.forget()
        i = self.steps
        streams = self.step(i, self.plan[i], given)
        self.weighed[i] = self.weights(*streams)
        self.steps += 1
        return streams

    def step(self, i, kind, given):
        if kind == "F":
            true = self.full(i, *given)
            now = Full(i, self.parts(true))
            if self.count > 1:
                c, delta = now.parts[:2]
                self.discrepancy.append((delta.abs().mean() / (c - delta).abs().mean()).item())
            missing = self.paid_back(now) if self.rule == "deferred" else [0.0] * self.count
            self.fulls.append(now)
            return [stream + more for stream, more in zip(true, self.streams(missing), strict=True)]
        if kind == "P":
            uncond, cond = given
            pred = self.pipelined(i, uncond if self.rule == "mixed" else cond, cond)
            if self.rule in ("mixed", "none"):
                return [pred, pred]
        guess = self.guess(i, kind, pred if kind == "P" else None)
        self.guesses.append(guess)
        return self.streams(guess.parts)

    def parts(self, streams):
        at = min(1, len(streams) - 1)  # cond
        c = streams[at]
        return [c, *(c - stream for k, stream in enumerate(streams) if k != at)]

    def streams(self, parts):
        c, *deltas = parts
        streams = [c - delta for delta in deltas]
        streams.insert(1, c)
        return streams

    def full(self, i, *given):
        streams = [self.forward(**{**stream, "return_dict": False})[0] for stream in given]
        if "P" in self.plan[i + 1 :] and len(given) > 1:
            cond = given[1]
            self.learn(self.boundaries, i, self.two_parts(self.denoiser, self.cut, cond, cond, None)[1])
        return streams

    def pipelined(self, i, stage0, cond):
        old = self.read(self.boundaries, i)
        pred, fresh = self.two_parts(self.denoiser, self.cut, stage0, cond, old)
        if self.plan[i + 1 : i + 2] == "P":
            self.learn(self.boundaries, i, fresh)
        return pred

    def guess(self, i, kind, pred_c):
        last = self.fulls[-1].parts
        if self.rule == "reuse" or not self.fits:
            return Guess(i, kind, [last[0] if kind == "S" else pred_c, *last[1:]])
        before = self.fulls[-2].parts
        (gamma, *alphas), betas = self.coefficients()
        r = self.reach(self.fulls[-2].step, self.fulls[-1].step, i)
        slope_c, *slopes = [r * (b - a) for a, b in zip(before, last, strict=True)]
        deltas = [b + alpha * slope for b, alpha, slope in zip(last[1:], alphas, slopes, strict=True)]
        if kind == "S":
            return Guess(i, kind, [last[0] + gamma * slope_c, *deltas])
        ((delta,), (alpha,), (beta,)) = deltas, alphas, betas
        return Guess(i, kind, [pred_c, delta + beta * (pred_c - last[0] - alpha * slope_c)])

    def paid_back(self, now):
        """What is added to the parts of a FULL step for the steps since the last one, or some earlier ones."""
        # Two FULL steps at one time (solvers of order 2) tell nothing of the slope.
        if len(self.fulls) > 1 and self.reach(self.fulls[-2].step, self.fulls[-1].step, now.step) != 0:
            self.fits.append(self.fit(*self.fulls[-2:], now))
            times = {self.times[full.step] for full in [*self.fulls[-3:], now]}
            if len(times) == 4:
                self.bends.append(self.fit_bends(now))
        for step, kind, parts in self.guesses:
            right = self.between(step, now)
            if kind == "P":
                right = [parts[0], right[1] + self.coefficients()[1][0] * (parts[0] - right[0])]
            impulses = zip(self.weighed[step], right, parts, strict=True)
            self.owed.append((step, [self.gains[step] * weight * (one - other) for weight, one, other in impulses]))
        self.guesses = []
        if self.paid is not None:
            # The last payment took its step's guidance for the largest of late.
            step, assumed, debt = self.paid
            ratios = [actual / weight for actual, weight in zip(self.weighed[step], assumed, strict=True)]
            if any(abs(ratio - 1) > SAME for ratio in ratios):
                self.owed.append((step, [(1 - ratio) * one for ratio, one in zip(ratios, debt, strict=True)]))
            self.paid = None
        gain = self.gains[now.step]
        if not self.owed or any(abs(gain) < 0.5 * abs(self.gains[step]) for step, _ in self.owed):
            return [0.0] * self.count
        debt = [sum(parts) for parts in zip(*(parts for _, parts in self.owed), strict=True)]
        assumed = self.expected(now.step)
        self.owed, self.paid = [], (now.step, assumed, debt)
        return [one / (gain * weight) for one, weight in zip(debt, assumed, strict=True)]

    def expected(self, step):
        """What the pipeline is taken to make of the parts on a step that is not over."""
        c, *last = self.weighed[step - 1]
        late = [self.weighed[i] for i in range(step - 5, step) if i in self.weighed]
        most = [max(abs(earlier[k] / earlier[0]) for earlier in late) for k in range(1, len(last) + 1)]
        return [c, *(math.copysign(size, old / c) * c for size, old in zip(most, last, strict=True))]

    def between(self, step, now):
        """The parts at a step before ``now``: on the line from the last FULL step, bent by shares of the parabola."""
        found = []
        for k in range(self.count):
            line, bend = self.line_and_bend(self.fulls[-2:], now, step, k)
            found.append(line + self.mean([fit[k] for fit in self.bends]) * bend)
        return found

    def line_and_bend(self, before, after, step, k):
        """Of part k between the last of ``before`` and ``after``; the bend is 0 where there are no three times."""
        at, start, end = (self.times[i] for i in (step, before[-1].step, after.step))
        first, second = before[-1].parts[k], after.parts[k]
        if start == end:
            return second, 0.0
        slope = (second - first) / (end - start)
        line = first + (at - start) * slope
        if len(before) < 2 or self.times[before[-2].step] == start:
            return line, 0.0
        earlier = self.times[before[-2].step]
        curvature = (slope - (first - before[-2].parts[k]) / (start - earlier)) / (end - earlier)
        return line, (at - start) * (at - end) * curvature

    def fit_bends(self, now):
        """How much of the bend the last FULL step shows, had it been between its neighbours; per picture and part."""
        *before, last = self.fulls[-3:]
        found = []
        for k in range(self.count):
            line, bend = self.line_and_bend(before, now, last.step, k)
            found.append(least_squares(last.parts[k] - line, bend))
        return found

    def fit(self, before, last, now):
        """Least-squares coefficients of one FULL step: gamma and the alphas, then the betas."""
        r = self.reach(before.step, last.step, now.step)
        slopes = [r * (b - a) for a, b in zip(before.parts, last.parts, strict=True)]
        moved = [b - a for a, b in zip(last.parts, now.parts, strict=True)]
        rest_c, *rests = [a - b for a, b in zip(moved, slopes, strict=True)]
        return list(map(least_squares, moved, slopes)), [least_squares(rest, rest_c) for rest in rests]

    def coefficients(self):
        """(gamma and the alphas, betas)"""
        return [
            [self.mean([fit[kind][k] for fit in self.fits]) for k in range(count)]
            for kind, count in enumerate((self.count, self.count - 1))
        ]

    def mean(self, found):
        """Over the FULL steps, each older one with 0.8 of the weight."""
        weights = [0.8**age for age in reversed(range(len(found)))]
        if not found:
            return 0.0
        return (sum(w * one for w, one in zip(weights, found, strict=True)) / sum(weights)).clip(0, 1)

    def reach(self, before, last, now):
        before, last, now = self.times[before], self.times[last], self.times[now]
        return 0.0 if last == before else (now - last) / (last - before)

    def learn(self, known, i, boundary):
        time = i if self.times is None else self.times[i]
        if known and known[-1][0] == time:
            known.pop()
        known.append((time, boundary))

    def read(self, known, i):
        """What a stage reads: the last boundary, or the straight line through the last two at the step's time."""
        if self.rule != "deferred" or len(known) < 2:
            return known[-1][1]
        (t0, first), (t1, second) = known[-2:]
        share = 1 + self.taken * (self.times[i] - t1) / (t1 - t0)
        if isinstance(first, tuple):
            return tuple(a + share * (b - a) for a, b in zip(first, second, strict=True))
        return first + share * (second - first)


def least_squares(target, regressor):
    """A coefficient per picture, [B, 1, ...]. None counts for more than 2 or less than -1."""
    dot = (target * regressor).flatten(1).sum(1) / (regressor * regressor).flatten(1).sum(1)
    return dot.clip(-1, 2).reshape(-1, *[1] * (target.ndim - 1))


class Staged(Oracle):
    """The same with S stages, S / 2 ranks a branch.

    On a PIPELINED step every stage but the first reads what the one before it made when that was last evaluated with
    cond: on a FULL step, or on a PIPELINED one after which another came. (All but the last are evaluated only then.)

    On a FULL step a rank has stages 2r and 2r + 1 of its branch. Stage 2r reads what stage 2r - 1 made on the last FULL
    step, stage 2r + 1 what stage 2r makes now. The first FULL steps read nothing old. With eight stages boundaries are
    extrapolated half as far.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.through = sd3_stages if self.is_sd3 else unet_stages

    def forget(self):
        super().forget()
        self.stages = len(self.cut) + 1
        self.taken = {4: 1.0, 8: 0.5}[self.stages]
        self.known = {who: [[] for _ in range(self.stages)] for who in ("uncond", "cond", "pipelined")}

    def full(self, i, *branches):
        if len(branches) != 2:
            return [self.forward(**{**branch, "return_dict": False})[0] for branch in branches]
        predictions = []
        for name, given in zip(("uncond", "cond"), branches, strict=True):
            old = [None] * self.stages
            if self.plan[self.began : i].count("F") >= EXACT:
                old[2::2] = [self.read(known, i) for known in self.known[name][2::2]]
            pred, made = self.through(self.denoiser, self.cut, [given] * self.stages, old)
            self.remember(name, i, made)
            predictions.append(pred)
        self.remember("pipelined", i, made)
        return predictions

    def pipelined(self, i, even, cond):
        given = [cond if stage % 2 else even for stage in range(self.stages)]
        old = [None, *(self.read(known, i) for known in self.known["pipelined"][1:])]
        pred, made = self.through(self.denoiser, self.cut, given, old)
        if self.plan[i + 1 : i + 2] == "P":
            self.remember("pipelined", i, made)
        return pred

    def remember(self, name, i, made):
        for known, boundary in zip(self.known[name][1:], made, strict=True):
            self.learn(known, i, boundary)


def closed_form(scheduler, first, eta=0.0):
    """(times, gains) from the update's formula; ``first`` is the first timestep of the run.

    Flow matching with Euler: ``x' = x + (sigma' - sigma) v``. DDIM: ``x' = sqrt(abar') x0 + sqrt(1 - abar' - s^2) eps``
    with ``x0 = (x - sqrt(1 - abar) eps) / sqrt(abar)``; to the end, what is in x' grows by ``sqrt(abar_end / abar')``.
    """
    times = scheduler.timesteps.tolist()
    start = start_of(times, first)
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        gains = [after - before for before, after in itertools.pairwise(scheduler.sigmas.tolist())]
        return times[start:], gains[start:]
    assert isinstance(scheduler, DDIMScheduler) and scheduler.config.prediction_type == "epsilon"
    gap = scheduler.config.num_train_timesteps // len(times)
    abars = [scheduler.alphas_cumprod[t].item() for t in times]
    ends = [float(scheduler.alphas_cumprod[t - gap] if t >= gap else scheduler.final_alpha_cumprod) for t in times]
    gains = []
    for before, after in zip(abars, ends, strict=True):
        variance = eta**2 * (1 - after) / (1 - before) * (1 - before / after)
        gain = (1 - after - variance) ** 0.5 - (after * (1 - before) / before) ** 0.5
        gains.append((ends[-1] / after) ** 0.5 * gain)
    return times[start:], gains[start:]


def finite_differences(scheduler, first):
    """As `closed_form`, for any scheduler: how far the end moves with one of a run's predictions."""
    times = scheduler.timesteps.tolist()[start_of(scheduler.timesteps.tolist(), first) :]
    plain = samples(scheduler, len(times))[-1]
    return times, [samples(scheduler, len(times), bumped)[-1] - plain for bumped in range(len(times))]


def samples(scheduler, count, bumped=None, start=1.0, **extra):
    """The denoiser's input on each of the last ``count`` steps of a run by a copy; the sample at the end.

    The predictions are random, but the same in every call; that of step ``bumped``, or of all, is larger by 1.
    """
    fresh = copy.deepcopy(scheduler)  # which is at its beginning; set_timesteps may take long
    times = fresh.timesteps[len(fresh.timesteps) - count :]
    if hasattr(fresh, "set_begin_index"):
        fresh.set_begin_index(len(fresh.timesteps) - count)
    if "generator" in inspect.signature(fresh.step).parameters:
        extra["generator"] = torch.Generator().manual_seed(2)
    predictions = torch.randn(count, generator=torch.Generator().manual_seed(1)).tolist()
    scaled = getattr(fresh, "scale_model_input", lambda x, t: x)
    x, inputs = torch.full((1, 1, 1, 1), start, dtype=torch.float64), []
    for i, t in enumerate(times):
        inputs.append(scaled(x, t).item())
        prediction = torch.full_like(x, predictions[i] + (i == bumped or bumped == "all"))
        x = fresh.step(prediction, t, x, **extra, return_dict=False)[0]
    return [*inputs, x.item()]


def start_of(times, first):
    return min(range(len(times)), key=lambda i: abs(times[i] - float(first)))


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


def sd3_stages(model, cuts, given, old):
    """The prediction, and what each stage but the last made.

    Args:
        cuts: numbers of blocks before stages 1, 2, ...
        given: the model's arguments, by stage.
        old: what each stage reads; None: what the one before it makes now.
    """
    made = [(model.pos_embed(given[0]["hidden_states"]), model.context_embedder(given[0]["encoder_hidden_states"]))]
    for stage, (start, stop) in enumerate(itertools.pairwise([0, *cuts, len(model.transformer_blocks)])):
        image, text = old[stage] or made[stage]
        time = model.time_text_embed(given[stage]["timestep"], given[stage]["pooled_projections"])
        for block in model.transformer_blocks[start:stop]:
            text, image = block(hidden_states=image, encoder_hidden_states=text, temb=time)
        made.append((image, text))
    patches = model.proj_out(model.norm_out(image, time)).unflatten(2, (2, 2, -1))  # [B, h * w, 2, 2, C]
    size = [side // 2 for side in given[-1]["hidden_states"].shape[-2:]]
    pixels = patches.unflatten(1, size).permute(0, 5, 1, 3, 2, 4)  # [B, C, h, 2, w, 2]
    return pixels.flatten(4, 5).flatten(2, 3), made[1:-1]


def unet_stages(model, cuts, given, old):
    """As `sd3_stages`. A stage has its own skips; features go from the outermost stage inwards, as they are made."""
    order = list(modules_in_order(model))
    ends = [(order.index(first), order.index(last) + 1) for first, last in cuts]
    starts, stops = zip(*ends, (0, len(order)), strict=True)
    context = [condition(model, branch) for branch in given]
    forced = any(side % 2**model.num_upsamplers for side in given[-1]["sample"].shape[-2:])
    last = len(given) - 1
    hidden, skips = given[-1]["sample"], [[] for _ in given]
    for stage in range(last, 0, -1):
        hidden = evaluate(
            model, order[starts[stage] : starts[stage - 1]], hidden, skips[stage], *context[stage], forced
        )
    made = [evaluate(model, order[starts[0] : stops[0]], hidden, skips[0], *context[0], forced)]
    for stage in range(1, last + 1):
        hidden = made[-1] if old[stage] is None else old[stage]
        part = order[stops[stage - 1] : stops[stage]]
        made.append(evaluate(model, part, hidden, skips[stage], *context[stage], forced))
    assert not any(skips), "a stage left a skip for another"
    return made[-1], made[:-1]


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


def kind_of(cut):
    return Staged if isinstance(cut, list) else Oracle


def denoise(pipe, prompt, noise, *, plan, rule="reuse", cut=None, guidance_scale=5.0):
    """Latents of a run over the scheduler's timesteps, and the discrepancy of its FULL steps.

    Args:
        pipe: only its denoiser and its scheduler are used; ``plan`` gives the number of steps.
        prompt: as `tiny.prompt` makes it, [B, ...].
        noise: [B, C, H, W].
    """
    is_sd3 = getattr(pipe, "transformer", None) is not None
    denoiser, scheduler = pipe.transformer if is_sd3 else pipe.unet, pipe.scheduler
    device = noise.device
    scheduler.set_timesteps(len(plan), device=device)
    times, gains = closed_form(scheduler, scheduler.timesteps[0])
    oracle = kind_of(cut)(denoiser, plan, rule, cut, times, gains, lambda *streams: [1.0, guidance_scale - 1])
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
def inside(
    pipe, *, plan, rule="reuse", cut=None, sampler=closed_form, skipped_layers=lambda step: None
) -> Iterator[Oracle]:
    """Let a plain pipeline's own loop call the oracle in place of its denoiser, with the CFG batch [uncond, cond].

    ``sampler`` gives (times, gains) for ``deferred``, from the scheduler and the run's first timestep;
    ``skipped_layers`` the layers that a further stream of a step is evaluated without.
    """
    denoiser = getattr(pipe, "transformer", None) or pipe.unet
    oracle = kind_of(cut)(denoiser, plan, rule, cut, weights=lambda *streams: guidance_of(pipe, streams))
    further = []

    def half(value, index, batch):
        if isinstance(value, dict):
            return {key: half(item, index, batch) for key, item in value.items()}
        is_batched = isinstance(value, torch.Tensor) and value.ndim and len(value) == batch
        return value.chunk(2)[index] if is_batched else value

    def forward(*args, **kwargs):
        kwargs |= zip(("sample", "timestep"), args, strict=False)
        if kwargs.get("skip_layers"):  # skip-layer guidance, beside the two branches
            return further
        if rule == "deferred" and oracle.times is None:
            oracle.times, oracle.gains = sampler(pipe.scheduler, kwargs["timestep"].flatten()[0])
        if not pipe.do_classifier_free_guidance:
            return oracle(kwargs)
        batch = len(kwargs["encoder_hidden_states"])
        given = [half(kwargs, 0, batch), half(kwargs, 1, batch)]
        if layers := skipped_layers(oracle.steps):
            given.append({**given[1], "skip_layers": layers})
        pred_u, pred_c, *further[:] = oracle(*given)
        return (torch.cat([pred_u, pred_c]),)

    denoiser.forward = forward
    try:
        yield oracle
    finally:
        del denoiser.forward


def guidance_of(pipe, streams):
    """The weights of cond and of the distances: what a pipeline's own formulas make of a step's streams (one picture,
    where they are rescaled)."""
    if len(streams) == 1:
        return [1.0]
    pred_u, pred_c, *further = streams
    weights = [1.0, pipe.guidance_scale - 1, *(pipe._skip_layer_guidance_scale for _ in further)]
    share = getattr(pipe, "guidance_rescale", 0.0)
    guided = pred_u + pipe.guidance_scale * (pred_c - pred_u)
    factor = 1 - share + share * (pred_c.std() / guided.std()).item()
    return [factor * weight for weight in weights]
