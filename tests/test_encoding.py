"""Each branch's ranks encode their own text only, and all get what a plain pipeline encodes, bit for bit."""

from copy import deepcopy
from functools import cache

import pytest
import tiny
import torch
import torch.distributed as dist
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, inject_adapter_in_model
from ranks import Ranks
from test_faults import Evaluations
from test_models import load

from hybridiff_xdit import HybridConfig, apply_hybrid, last_report, remove_hybrid

PROMPT, NEGATIVE = "google style emoji of grinning face", "frog"
TWO, TWO_NEGATIVE = [PROMPT, "twitter style emoji of a house"], [NEGATIVE, "moon"]
NAMES = ["emoji-sd3", "emoji-sdxl", "sd15"]
#: What a callback may see of the embeddings, both branches'.
TENSORS = {
    "emoji-sd3": ["prompt_embeds", "pooled_prompt_embeds"],
    "emoji-sdxl": ["prompt_embeds", "add_text_embeds"],
    "sd15": ["prompt_embeds"],
}


@cache
def pipeline(name):
    """A pipeline with real text encoders, one for the whole process; SD 1.5 has the first of emoji-sdxl."""
    if name != "sd15":
        return load(name)
    parts, unet = load("emoji-sdxl"), tiny.unet(cross_attention_dim=128)
    if not hasattr(parts.text_encoder, "text_model"):  # with transformers 5 diffusers' clip_skip does not find it
        object.__setattr__(parts.text_encoder, "text_model", parts.text_encoder)
    encoder = dict(text_encoder=parts.text_encoder, tokenizer=parts.tokenizer)
    rest = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe = StableDiffusionPipeline(unet=unet, vae=tiny.vae(4), scheduler=tiny.sd15().scheduler, **encoder, **rest)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def encoders(pipe):
    parts = (getattr(pipe, f"text_encoder{number}", None) for number in ("", "_2", "_3"))
    return [part for part in parts if part is not None]


def call(pipe, name, **kwargs):
    """(embeddings of both branches that one step's denoiser is given, how often each text encoder was evaluated)."""
    seen, counts = {}, [0] * len(encoders(pipe))

    def callback(pipe, step, timestep, tensors):
        seen.update(tensors)
        return {}

    def count(i):
        def hook(*_):
            counts[i] += 1

        return hook

    hooks = [encoder.register_forward_hook(count(i)) for i, encoder in enumerate(encoders(pipe))]
    try:
        pipe(
            **{"guidance_scale": 5.0, "height": 32, "width": 32, **kwargs},
            num_inference_steps=1,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
            callback_on_step_end=callback,
            callback_on_step_end_tensor_inputs=TENSORS[name],
        )
    finally:
        for hook in hooks:
            hook.remove()
    return [seen[tensor] for tensor in TENSORS[name]], counts


def hybrid(pipe, name, stages=2, **kwargs):
    apply_hybrid(pipe, HybridConfig(policy="cfg", stages=stages, balance="flops"))
    try:
        return call(pipe, name, **kwargs)
    finally:
        remove_hybrid(pipe)


#: Calls whose text is encoded half on each rank: {id: (pipelines, arguments)}.
SPLIT = {
    "a negative prompt": (NAMES, dict(prompt=PROMPT, negative_prompt=NEGATIVE)),
    "no negative prompt": (NAMES, dict(prompt=PROMPT)),
    "no negative prompts": (NAMES, dict(prompt=TWO)),
    "several pictures": (NAMES, dict(prompt=TWO, negative_prompt=TWO_NEGATIVE, num_images_per_prompt=2)),
    "one negative prompt for all": (NAMES[:2], dict(prompt=TWO, negative_prompt=NEGATIVE)),
    "clip_skip": (NAMES, dict(prompt=PROMPT, negative_prompt=NEGATIVE, clip_skip=1)),
    "max_sequence_length": (NAMES[:1], dict(prompt=PROMPT, negative_prompt=NEGATIVE, max_sequence_length=16)),
    "a text for each encoder": (
        NAMES[:1],
        dict(
            prompt=PROMPT,
            prompt_2="a cat",
            prompt_3="a dog",
            negative_prompt=NEGATIVE,
            negative_prompt_2="red",
            negative_prompt_3="blue",
        ),
    ),
    "two texts": (NAMES[:2], dict(prompt=PROMPT, prompt_2="a cat", negative_prompt=NEGATIVE, negative_prompt_2="red")),
    "empty second texts": (NAMES[:2], dict(prompt=TWO, prompt_2="", negative_prompt=NEGATIVE, negative_prompt_2="")),
}
SPLIT_CALLS = [pytest.param(name, case, id=f"{name}, {case}") for case, (names, _) in SPLIT.items() for name in names]


def both(name, kwargs, stages=2):
    """What `call` finds on the ranks, and what a plain pipeline."""
    pipe = pipeline(name)
    return hybrid(pipe, name, stages, **kwargs), call(pipe, name, **kwargs)


def check(outcomes, share):
    for (found, counts), (expected, plain) in outcomes:
        assert len(found) == len(expected) and all(map(torch.equal, found, expected))
        assert [share * count for count in counts] == plain


@pytest.mark.parametrize(("name", "case"), SPLIT_CALLS)
def test_embeddings_are_the_plain_ones_and_each_rank_encodes_half(pair, name, case):
    outcomes = pair.run(both, name, SPLIT[case][1])
    check(outcomes, 2)
    for half in (tensor.chunk(2) for tensor in outcomes[0][1][0]):
        assert not torch.equal(*half)  # which of them is whose can be seen


def test_four_ranks():
    ranks = Ranks(4)
    try:
        check(ranks.run(both, "emoji-sd3", SPLIT["a negative prompt"][1], 4), 2)
    finally:
        ranks.close()


def with_zeros(kwargs):
    pipe = pipeline("emoji-sdxl")
    pipe.register_to_config(force_zeros_for_empty_prompt=True)
    try:
        return both("emoji-sdxl", kwargs)
    finally:
        pipe.register_to_config(force_zeros_for_empty_prompt=False)


@pytest.mark.parametrize(
    ("kwargs", "share"), [({}, 1), ({"negative_prompt_2": "red"}, 1), ({"negative_prompt": ""}, 2)]
)
def test_zeros_are_not_encoded(pair, kwargs, share):
    check(pair.run(with_zeros, {"prompt": PROMPT, **kwargs}), share)


def test_without_guidance_every_rank_encodes_the_prompt(pair):
    check(pair.run(both, "emoji-sd3", dict(prompt=PROMPT, guidance_scale=1.0)), 1)


def with_adapter(scale):
    """The scale of a text encoder's adapter, for both branches."""
    pipe = pipeline("emoji-sdxl")
    torch.manual_seed(3)
    adapter = LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    before, pipe.text_encoder = pipe.text_encoder, inject_adapter_in_model(adapter, deepcopy(pipe.text_encoder))
    try:
        kwargs = dict(prompt=PROMPT, negative_prompt=NEGATIVE, cross_attention_kwargs={"scale": scale})
        return both("emoji-sdxl", kwargs)
    finally:
        pipe.text_encoder = before


def test_adapters_scale(pair):
    halves, wholes = pair.run(with_adapter, 0.5), pair.run(with_adapter, 1.0)
    check([*halves, *wholes], 2)
    for half, whole in zip(halves[0][0][0][0], wholes[0][0][0][0], strict=True):
        assert not torch.equal(half, whole)


# The ranks differ.


def embeddings(pipe, name):
    """Arguments of a call, by name, that give embeddings in place of the texts."""
    made = pipe.encode_prompt(PROMPT, None, None, negative_prompt=NEGATIVE)
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    return dict(zip(names, made, strict=True))


def no_memory(*_):
    raise MemoryError("of this rank")


def differ(what):
    """(kind of error, message, evaluations before it) where rank 1 has something else; and whether all is well then."""
    name = "emoji-sdxl" if what == "zeros" else "emoji-sd3"
    pipe, is_other, undo = pipeline(name), dist.get_rank() == 1, []
    texts = dict(prompt=PROMPT, negative_prompt=NEGATIVE)
    others = {
        "prompt": {**texts, "prompt": TWO[1]},
        "negative prompt": {**texts, "negative_prompt": ""},
        "clip_skip": {**texts, "clip_skip": 1},
        "guidance": {**texts, "guidance_scale": 1.0},
        "pictures": {**texts, "num_images_per_prompt": 2},
        "prompts": {**texts, "prompt": TWO},
    }
    mine = others.get(what, texts) if is_other else texts
    if what == "embeddings" and is_other:
        mine = embeddings(pipe, name)
    elif what == "zeros":
        mine = dict(prompt=PROMPT)
        pipe.register_to_config(force_zeros_for_empty_prompt=is_other)
        undo.append(lambda: pipe.register_to_config(force_zeros_for_empty_prompt=False))
    elif what == "text encoder" and is_other:
        weight = pipe.text_encoder_2.text_projection.weight
        before = weight.data
        weight.data = before * 1.01
        undo.append(lambda: setattr(weight, "data", before))
    elif what == "failure" and is_other:
        undo.append(pipe.text_encoder_3.register_forward_pre_hook(no_memory).remove)
    evaluations = Evaluations(pipe)
    apply_hybrid(pipe, HybridConfig(policy="cfg"))
    try:
        call(pipe, name, **mine)
        kind, message = None, "no error"
    except Exception as error:
        kind, message = type(error).__name__, str(error)
    finally:
        remove_hybrid(pipe)
        for action in undo:
            action()
    count = evaluations.count
    return kind, message, count, both(name, texts)


PROMPTS = "prompts (--prompt, --negative_prompt)"
RESULTS = "embeddings (number of pictures, dtype, or an error that another rank's log tells)"


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("prompt", [PROMPTS]),
        ("negative prompt", [PROMPTS]),
        ("clip_skip", [PROMPTS]),
        ("embeddings", [PROMPTS]),
        ("zeros", [PROMPTS]),
        ("guidance", [PROMPTS, "guidance on or off (--guidance_scale)"]),
        ("pictures", [RESULTS]),
        ("text encoder", ["text encoders or their adapters (--model)"]),
        ("prompts", [PROMPTS]),
    ],
)
def test_ranks_that_differ_are_told_in_what(pair, what, says):
    outcomes = pair.run(differ, what)
    for kind, message, evaluations, _ in outcomes:
        assert kind == "RuntimeError"
        names = message.removeprefix("hybrid-cond: the ranks started with different ").split(". ")[0].split("; ")
        assert set(says) <= set(names)
        assert "same arguments" in message
        assert evaluations == 0
    check([after for *_, after in outcomes], 2)


def test_an_error_on_one_rank_ends_the_other_too(pair):
    (kind, message, *_, after), (other_kind, other, *_, other_after) = pair.run(differ, "failure")
    assert kind == "RuntimeError" and RESULTS in message
    assert (other_kind, other) == ("MemoryError", "of this rank")
    check([after, other_after], 2)


def refused(name, negative):
    try:
        hybrid(pipeline(name), name, prompt=TWO, negative_prompt=negative)
    except (TypeError, ValueError) as error:
        return str(error)


@pytest.mark.parametrize(
    ("name", "negative", "says"),
    [
        ("sd15", NEGATIVE, "`negative_prompt` should be the same type to `prompt`"),
        ("sd15", [NEGATIVE], "has batch size 1"),
        ("emoji-sd3", [NEGATIVE], "has batch size 1"),
    ],
    ids=str,
)
def test_the_pipelines_own_error_is_every_ranks(pair, name, negative, says):
    for message in pair.run(refused, name, negative):
        assert says in message


# Where nothing is exchanged.


def alone(after):
    """Rank 1's own `encode_prompt` while rank 0 does something else; and a plain pipeline's."""
    pipe, texts = pipeline("emoji-sd3"), dict(prompt=PROMPT, negative_prompt=NEGATIVE)
    expected = pipe.encode_prompt(PROMPT, None, None, negative_prompt=NEGATIVE)
    apply_hybrid(pipe, HybridConfig(policy="cfg"))
    try:
        if after == "a call":
            call(pipe, "emoji-sd3", **texts)
        elif after == "a call that was refused":
            for _ in range(2):
                with pytest.raises(ValueError, match="divisible"):
                    pipe(**texts, height=33)
        found = pipe.encode_prompt(PROMPT, None, None, negative_prompt=NEGATIVE) if dist.get_rank() else expected
        return found, expected, call(pipe, "emoji-sd3", **texts)[1]
    finally:
        remove_hybrid(pipe)


@pytest.mark.parametrize("after", ["nothing", "a call", "a call that was refused"])
def test_a_users_own_call_waits_for_nobody(pair, after):
    for found, expected, counts in pair.run(alone, after):
        assert all(map(torch.equal, found, expected))
        assert counts == [1, 1, 1]


def bytes_sent():
    """As reported, where text is given and where embeddings are."""
    pipe, name = pipeline("emoji-sd3"), "emoji-sd3"
    counts = []
    for kwargs in (dict(prompt=PROMPT, negative_prompt=NEGATIVE), embeddings(pipe, name)):
        apply_hybrid(pipe, HybridConfig(policy="cfg"))
        call(pipe, name, **kwargs)
        counts.append(last_report(pipe)["bytes_sent"])
    remove_hybrid(pipe)
    return counts


def test_the_report_counts_the_denoising_only(pair):
    for text, embeds in pair.run(bytes_sent):
        assert text == embeds


def simulated():
    pipe = pipeline("emoji-sd3")
    apply_hybrid(pipe, HybridConfig(policy="cfg"), simulate=True)
    try:
        return call(pipe, "emoji-sd3", prompt=PROMPT)[1]
    finally:
        remove_hybrid(pipe)


def test_one_process_that_plays_all_ranks_encodes_both(pair):
    assert pair.run(simulated) == [[2, 2, 2]] * 2
