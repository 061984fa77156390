"""What there is for each model of xDiT's runner: ``xdit-hybrid models``."""

from __future__ import annotations

from ..planner import aligned
from .models import GUIDED, MODEL_REGISTRY, takes_z_images_call, xFuserModel

#: Models that are guided by default though no flag of theirs says so: their pipeline has a guider, or two networks.
_GUIDED_BY_THEMSELVES = (
    "xFuserHunyuanvideo15Model",
    "xFuserHunyuanvideo15SparseModel",
    "xFuserIdeogram4Model",
)
#: Distilled models that are told of guidance, and evaluate one stream.
_TOLD = ("xFuserFluxModel", "xFuserFluxKontextModel", "xFuserFlux2Model", "xFuserHunyuanvideoModel")
#: Models under which hybrid-cond has not been tried, and why not.
_UNTRIED = {
    "causal_wan": "no guidance, a cache of keys",
    "lingbot_video": "needs lingbot_video",  # a package that is on no index
    "minimax_h3": "no guidance",
}

#: Those whose exactness on two ranks is tested (tests/test_xdit_models.py). The others go the same way.
TESTED = {
    *("xFuserWan21T2VModel", "xFuserWan22T2VModel", "xFuserWan21I2VModel", "xFuserWan22I2VModel"),
    *("xFuserWan22TI2VModel", "xFuserWan21VACEModel", "xFuserQwenImageModel", "xFuserQwenImageEditModel"),
    "xFuserHunyuanvideo15Model",
    *("xFuserLumina2Model", "xFuserKrea2RawModel", "xFuserFluxModel", "xFuserFlux2Klein9BModel"),
    *("xFuserLTX2VideoModel", "xFuserLTX23VideoModel", "xFuserLTX25FullVideoModel", "xFuserZImageModel"),
    *("xFuserIdeogram4Model", "xFuserCosmos3NanoModel", "xFuserStableDiffusionModel"),
}


def streams(model: type[xFuserModel]) -> int:
    """Evaluations a step by default, under hybrid-cond: two with guidance, and one more for each other kind of it."""
    name = model.__name__
    scale = GUIDED.get(name, {}).get("guidance_scale") or model.default_input_values.guidance_scale or 1
    if name in _TOLD or not (scale > 1 or name in _GUIDED_BY_THEMSELVES):
        return 1
    kinds = getattr(model, "_STG_SCALE", 0) != 0, getattr(model, "_MODALITY_SCALE", 1) != 1
    return 2 + sum(kinds)


def table() -> str:
    """One row a model, as text."""
    names: dict[type[xFuserModel], list[str]] = {}
    for name, model in MODEL_REGISTRY.items():
        names.setdefault(model, []).append(name)
    head = ("--model", "streams a step", "xDiT's own", "--parallel hybrid-cond", "tested")
    by_name = sorted(names.items(), key=lambda item: item[1][-1].lower())
    return aligned([head, *(_row(model, known) for model, known in by_name)])


def _row(model: type[xFuserModel], names: list[str]) -> tuple[str, ...]:
    short = [name for name in names if "/" not in name] or names
    able, count = model.capabilities, streams(model)
    split = [word for word, can in (("Ulysses", able.ulysses_degree), ("ring", able.ring_degree)) if can]
    more = [
        word for word, can in (("CFG", able.use_cfg_parallel), ("PipeFusion", able.pipefusion_parallel_degree)) if can
    ]
    ours = ["branches" if count > 1 else "SKIPPED steps"]
    where = model.__module__.rsplit(".")[-1]
    if where != "cosmos3" and (where != "z_image" or takes_z_images_call()):
        ours += split
    if where in _UNTRIED:
        ours = [f"not tried: {_UNTRIED[where]}"]
    is_tested = "yes" if model.__name__ in TESTED else ""
    return ", ".join(short), str(count), ", ".join([*split, *more]) or "-", ", ".join(ours), is_tested
