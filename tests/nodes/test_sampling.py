"""Guidance of samplers in a real ComfyUI, with a tiny diffusion model (see `diffusion.py`)."""

import json
import time

import pytest
import torch
from safetensors.torch import load_file

from splice_engine import OFFLINE_BACKBONE

GUIDANCE = "SpliceSamplerGuidance"
WINDOW = {
    f"{group}_{part}": value
    for group in ("structure", "appearance")
    for part, value in (("strength", 0.3), ("start", 0.0), ("end", 1.0))
}


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def link(name, output=0):
    return [name, output]


def guidance(model="diffusion", **changes):
    """The node, with both pictures, on latent colours."""
    pictures = {"structure": link("a"), "appearance": link("b")}
    return node(
        GUIDANCE,
        **{
            "model": link(model),
            "backbone": link("vit"),
            "decoder": "latent colours",
            "inner_steps": 1,
            **WINDOW,
            **pictures,
            **changes,
        },
    )


def sampler(model="it", **changes):
    recipe = {"seed": 0, "steps": 3, "cfg": 1.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    both = {name: link("diffusion", 1) for name in ("positive", "negative")}
    return node("KSampler", **{"model": link(model), "latent_image": link("empty"), **both, **recipe, **changes})


def graph(it=None, nodes=None, **changes):
    """A sampling whose latents are saved, guided where there is a guidance."""
    return {
        "a": node("LoadImage", image="structure.png"),
        "b": node("LoadImage", image="appearance.png"),
        "vit": node("SpliceLoadBackbone", backbone_name=OFFLINE_BACKBONE, precision="fp32"),
        "diffusion": node("TestDiffusion"),
        "empty": node("EmptyLatentImage", width=128, height=96, batch_size=1),
        **({} if it is None else {"it": it}),
        "sampled": sampler("diffusion" if it is None else "it", **changes),
        "save": node("SaveLatent", samples=link("sampled"), filename_prefix="latents"),
        **(nodes or {}),
    }


@pytest.fixture
def sample(host):
    """Runs a graph to its end and gives the latents."""

    def run(*arguments, **changes):
        outcome = host.run(graph(*arguments, **changes))
        assert outcome.status == "success", outcome.message
        run.ran = outcome.ran
        return read(host, outcome)

    return run


def read(host, outcome):
    (saved,) = outcome.outputs["save"]["latents"]
    return load_file(host.base / "output" / saved["filename"])["latent_tensor"]


@pytest.fixture
def predict(host, tensor):
    """Calls what guides a model with a prediction, and tells what came back."""

    def call(latent, it=None, nodes=None):
        own = {
            "latent": tensor(latent),
            "called": node("TestPrediction", model=link("it"), latent=link("latent")),
            "save": node("PreviewAny", source=link("called")),
        }
        outcome = host.run({**graph(it or guidance(), {**own, **(nodes or {})})})
        if outcome.status == "success":
            return json.loads(outcome.outputs["save"]["text"][0])
        return outcome

    return call


@pytest.mark.parametrize(
    ("decoder", "vae"),
    [("latent colours", None), ("TAESD", None), ("VAE", link("diffusion", 2)), ("auto", link("kl"))],
    ids=["colours", "TAESD", "VAE", "KL"],
)
def test_each_decoder_guides(decoder, vae, sample):
    """The VAEs have been loaded by other nodes, in inference mode, in which no gradient flows through them."""
    plain = sample()
    it = guidance(decoder=decoder, decode_size=64, **({} if vae is None else {"vae": vae}))
    guided = sample(it, {"kl": node("TestVAE", wide=False)})
    assert guided.shape == plain.shape
    assert torch.isfinite(guided).all()
    assert (guided - plain).abs().mean() > 0.1 * plain.std()


@pytest.mark.parametrize(
    ("decoder", "vae"),
    [
        ("latent colours", link("diffusion", 2)),
        ("TAESD", link("diffusion", 2)),
        ("VAE", link("diffusion", 2)),
        ("VAE", link("kl")),
    ],
    ids=["colours", "TAESD", "VAE", "KL"],
)
def test_the_gradient_through_a_decoder_is_that_of_finite_differences(decoder, vae, host):
    given = {"backbone": link("vit"), "vae": vae, "image": link("a"), "decoder": decoder}
    nodes = {
        "kl": node("TestVAE", wide=False),
        "it": node("TestGradient", model=link("diffusion"), **given),
        "save": node("PreviewAny", source=link("it")),
    }
    outcome = host.run({key: value for key, value in graph(None, nodes).items() if key != "sampled"})
    assert outcome.status == "success", outcome.message
    slopes = json.loads(outcome.outputs["save"]["text"][0])
    assert slopes.keys() == {"structure", "appearance"}
    for by_gradient, by_differences in slopes.values():
        assert by_gradient == pytest.approx(by_differences, rel=1e-3)


def test_without_strength_the_bits_are_those_of_the_model(sample):
    off = {"structure_strength": 0.0, "appearance_strength": 0.0}
    assert torch.equal(sample(guidance(**off)), sample())


def custom_sampling(model):
    both = {name: link("diffusion", 1) for name in ("positive", "negative")}
    return {
        "sigmas": node("BasicScheduler", model=link(model), scheduler="normal", steps=3, denoise=1.0),
        "method": node("KSamplerSelect", sampler_name="euler"),
        "sampled": node(
            "SamplerCustom",
            model=link(model),
            add_noise=True,
            noise_seed=0,
            cfg=1.0,
            sampler=link("method"),
            sigmas=link("sigmas"),
            latent_image=link("empty"),
            **both,
        ),
    }


def advanced_sampling(model):
    plain = sampler(model)["inputs"]
    del plain["seed"], plain["denoise"]
    whole = {"add_noise": "enable", "noise_seed": 0, "start_at_step": 0, "end_at_step": 3}
    return {"sampled": node("KSamplerAdvanced", **plain, **whole, return_with_leftover_noise="disable")}


@pytest.mark.parametrize("nodes", [custom_sampling, advanced_sampling], ids=["custom", "advanced"])
def test_other_sampler_nodes_are_guided_as_the_ksampler(nodes, sample):
    assert torch.equal(sample(guidance(), nodes("it")), sample(guidance()))


@pytest.mark.parametrize(
    "changes",
    [{"sampler_name": "heun"}, {"sampler_name": "dpmpp_2m_sde"}, {"cfg": 3.0}],
    ids=lambda c: str(*c.values()),
)
def test_samplers_of_two_stages_or_with_noise_and_another_cfg(changes, sample):
    guided = sample(guidance(), **changes)
    assert torch.isfinite(guided).all()
    assert not torch.equal(guided, sample(**changes))


def test_guidances_are_chained_and_nodes_after_them_keep_them(sample):
    """ComfyUI copies what belongs to a model whenever a node changes it; the ViT must not be copied with it."""
    structure, appearance = {"structure": link("a")}, {"appearance": link("b")}
    both = {**WINDOW, "backbone": link("vit"), "decoder": "latent colours", "inner_steps": 1}
    first = node(GUIDANCE, model=link("diffusion"), **both, **structure)
    nodes = {
        "second": node(GUIDANCE, model=link("it"), **both, **appearance),
        "after": node("ModelSamplingDiscrete", model=link("second"), sampling="eps", zsnr=False),
    }
    one = sample(first)
    two = sample(first, {**nodes, "sampled": sampler("second")})
    assert not torch.equal(one, two)
    assert torch.equal(sample(first, {**nodes, "sampled": sampler("after")}), two)


def test_no_trace_is_left_and_a_cached_guidance_guides_again(sample):
    before = sample(seed=5)
    guided = sample(guidance(), seed=5)
    again = sample(guidance(), {"other": node("SaveLatent", samples=link("sampled"), filename_prefix="x")}, seed=6)
    assert "it" not in sample.ran
    assert not torch.equal(again, guided)
    assert torch.equal(sample(guidance(), seed=5), guided)
    assert torch.equal(sample(seed=5, steps=4), sample(seed=5, steps=4))
    assert torch.equal(sample(seed=5), before)


def test_outside_of_a_denoise_mask_the_latent_stays(sample, tensor):
    mask = torch.zeros(1, 96, 128)
    mask[..., 64:] = 1
    nodes = {
        "mask": tensor(mask, "TestMask"),
        "encoded": node("VAEEncode", pixels=link("small"), vae=link("diffusion", 2)),
        "small": node("ImageScale", image=link("b"), upscale_method="area", width=128, height=96, crop="center"),
        "empty": node("SetLatentNoiseMask", samples=link("encoded"), mask=link("mask")),
    }
    plain, guided = sample(None, nodes, denoise=0.7), sample(guidance(), nodes, denoise=0.7)
    assert torch.allclose(plain[..., :8], guided[..., :8], atol=1e-5)
    assert (plain - guided)[..., 8:].abs().mean() > 0.01


def test_each_picture_of_a_batch_has_its_guide(sample, tensor):
    """The second one's mask is empty: its object is not there."""
    masks = torch.zeros(2, 97, 123)
    masks[0, :, 60:] = 1
    nodes = {
        "two": node("RepeatImageBatch", image=link("a"), amount=2),
        "masks": tensor(masks, "TestMask"),
        "empty": node("EmptyLatentImage", width=128, height=96, batch_size=2),
    }
    plain, guided = sample(None, nodes), sample(guidance(structure=link("two"), structure_mask=link("masks")), nodes)
    assert torch.equal(plain[1], guided[1])
    assert not torch.equal(plain[0], guided[0])


def test_an_objective_replaces_the_terms(sample):
    only = {"term": node("SpliceStructureTerm", weight=1.0, layer=5)}
    terms = sample(guidance(objective=link("term")), only)
    assert not torch.equal(terms, sample(guidance(appearance_strength=0.0)))
    assert not torch.equal(terms, sample())


def test_cancelling_amid_the_guidance_of_one_step(host):
    started = []

    def interrupt(_):
        if not started:
            started.append(time.monotonic())
            host.post("/interrupt")

    outcome = host.run(graph(guidance(inner_steps=100, structure_start=0.2, appearance_start=0.2), steps=8), interrupt)
    assert outcome.status == "interrupted", outcome.message
    assert time.monotonic() - started[0] < 60  # all gradients of one step alone would take longer
    assert host.run(graph(guidance(), seed=9)).status == "success"


@pytest.mark.parametrize(
    ("shape", "same"),
    [((1, 4, 3, 12, 16), True), ((1, 4, 200), True), ((1, 4, 1, 12, 16), False), ((2, 4, 12, 16), False)],
    ids=["clip", "sound or nested", "one frame", "two pictures"],
)
def test_clips_pass_through_with_one_line(shape, same, host, predict):
    before = len(host.log())
    it = guidance(structure_strength=0.3 + 0.01 * len(shape))  # one that no other test has called
    told = predict(torch.randn(shape, generator=torch.Generator().manual_seed(0)), it)
    assert told["same"] == [same, same]
    assert told["shape"] == list(shape)
    assert host.log()[before:].count("are not guided") == int(same)


def test_half_precision_stays(predict):
    told = predict(torch.randn(1, 4, 12, 16, generator=torch.Generator().manual_seed(0)).half())
    assert told == {"same": [False, False], "shape": [1, 4, 12, 16], "dtype": "torch.float16"}


def test_lack_of_memory_falls_to_a_lighter_decoder(host, tensor):
    """And where there is none, one sentence, after which the queue goes on."""

    def run(megabytes, **changes):
        picture = tensor(torch.rand(1, 97, 123, 3, generator=torch.Generator().manual_seed(0)))
        nodes = {
            "picture": picture,
            "device": node("TestMemory", image=link("picture"), megabytes=megabytes, pixels=2**30),
        }
        it = guidance(decoder="VAE", vae=link("diffusion", 2), structure=link("device"), decode_size=2048)
        nodes["empty"] = node("EmptyLatentImage", width=384, height=288, batch_size=1)
        return host.run(graph(it, nodes, steps=1))

    before = len(host.log())
    try:
        fitted, refused = run(330.0), run(5.0)
    finally:
        host.free_memory()
    told = [line for line in host.log()[before:].splitlines() if "Splice: out of memory" in line]
    assert fitted.status == "success", fitted.message
    assert "guiding through TAESD instead of VAE" in told[0]
    assert "guiding through latent colours instead of TAESD" in told[1]
    assert refused.status == "error"
    assert "out of memory even with the lightest decoder" in refused.message
    assert host.run(graph(guidance(), seed=11)).status == "success"


MISTAKES = {
    "a VAE of another latent": (
        {"vae": link("kl"), "decoder": "VAE"},
        {"kl": node("TestVAE", wide=True)},
        "the VAE decodes latents of 16 channels, but those of the model have 4",
    ),
    "no VAE": ({"decoder": "VAE"}, {}, "the decoder is to be a VAE, but none is connected"),
    "no picture": ({"structure": None, "appearance": None}, {}, "nothing guides the sampler: give a structure picture"),
    "a backbone on another device": (
        {"backbone": link("far")},
        {"far": node("TestElsewhere", backbone=link("vit"))},
        "the backbone computes on meta, but decoders on ",
    ),
    "only an identity term": (
        {"objective": link("term")},
        {"term": node("SpliceIdentityTerm", weight=1.0, layer=-1)},
        "nothing guides the sampler",
    ),
    "start after end": (
        {"structure_start": 0.9, "structure_end": 0.4},
        {},
        "structure_start must be below structure_end",
    ),
    "three guides for one latent": (
        {"structure": link("many")},
        {"many": node("RepeatImageBatch", image=link("a"), amount=3)},
        "a batch of 1 latents needs 1 or 1 structure and appearance pictures, not 3",
    ),
    "batches that do not fit": (
        {"structure": link("many"), "appearance": link("two")},
        {
            "many": node("RepeatImageBatch", image=link("a"), amount=3),
            "two": node("RepeatImageBatch", image=link("b"), amount=2),
        },
        "3 pairs need 1 or 3 appearance pictures, not 2",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_get_one_sentence(mistake, host):
    changes, nodes, sentence = MISTAKES[mistake]
    it = guidance(**changes)
    it["inputs"] = {name: value for name, value in it["inputs"].items() if value is not None}
    outcome = host.run(graph(it, nodes))
    assert outcome.status == "error"
    assert outcome.message.startswith(f"Splice: {sentence}")
    assert len(outcome.message.splitlines()) == 1
    assert host.get("/queue") == {"queue_running": [], "queue_pending": []}
    assert host.run(graph(guidance(), seed=12)).status == "success"


@pytest.mark.parametrize(
    ("what", "value", "sentence"),
    [
        ("structure_mask", torch.full((1, 9, 9), 1 / 255), "of each guide one of the masks selects nothing"),
        ("structure_mask", torch.full((1, 9, 9), float("nan")), "the structure mask has values that are not numbers"),
        ("structure", torch.full((1, 97, 123, 3), float("nan")), "the structure picture has pixels that are not numb"),
        ("appearance", torch.rand(1, 16, 16, 3), "the appearance picture is 16x16 pixels"),
    ],
)
def test_pictures_and_masks_are_checked(what, value, sentence, host, tensor):
    nodes = {"given": tensor(value, "TestMask" if "mask" in what else "TestImage")}
    outcome = host.run(graph(guidance(**{what: link("given")}), nodes))
    assert outcome.status == "error"
    assert outcome.message.startswith(f"Splice: {sentence}")


def test_a_latent_that_is_no_number_is_named(predict):
    outcome = predict(torch.full((1, 4, 12, 16), float("nan")))
    assert outcome.status == "error"
    assert outcome.message.startswith("Splice: the latent has values that are not numbers")


def test_a_model_without_latent_colours_needs_a_decoder(host):
    nodes = {"bare": node("TestDiffusion", bare=True)}
    for decoder, sentence in (
        ("auto", "ComfyUI knows no latent colours of this model: connect its VAE"),
        ("TAESD", "ComfyUI knows no latent colours of this model: connect its VAE"),
    ):
        outcome = host.run(graph(guidance("bare", decoder=decoder), nodes))
        assert outcome.status == "error"
        assert outcome.message == f"Splice: {sentence}"
