"""The layouts of public checkpoints: each gives timm's features, whatever wraps it, or is called by what it is."""

import argparse
import pathlib
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from splice_engine import Backbone, Generator, Request, SpliceError
from splice_engine.vit.checkpoints import read

SIZE = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 3, "image_size": 56, "patch_size": 14}
DINOV3 = {**SIZE, "image_size": 64, "patch_size": 16, "num_register_tokens": 4, "intermediate_size": 192}

TRANSFORMERS = {
    "dino": ("ViT", {**SIZE, "intermediate_size": 192, "layer_norm_eps": 1e-6}),
    "dinov2": ("Dinov2", SIZE),
    "dinov2_reg": ("Dinov2WithRegisters", {**SIZE, "num_register_tokens": 4}),
    "dinov2_swiglu": ("Dinov2", {**SIZE, "use_swiglu_ffn": True}),
    "dinov3_qkvb": ("DINOv3ViT", DINOV3),
    "dinov3_plus_qkvb": ("DINOv3ViT", {**DINOV3, "use_gated_mlp": True, "hidden_act": "silu"}),
}
"""transformers' models and configurations, by the tiny timm model that is the same architecture."""


@pytest.fixture(scope="module")
def make_transformer():
    """Builds a model of transformers with strong random weights."""
    transformers = pytest.importorskip("transformers")

    def make(kind, **options):
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(1)
            model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**options))
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model.eval()

    return make


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_transformers_layouts_give_the_features_of_their_authors_code(
    kind, make_transformer, tiny_model, tmp_path, gap
):
    name, options = TRANSFORMERS[kind]
    model = make_transformer(name, **options)
    model.save_pretrained(tmp_path)
    ours = tiny_model(kind)
    ours.load_state_dict(read(tmp_path / "model.safetensors"))
    picture = torch.rand(2, 3, options["image_size"], options["image_size"])
    with torch.no_grad():
        assert gap(ours.forward_features(picture), model(picture).last_hidden_state) < 1e-4


@pytest.mark.parametrize(
    ("kind", "options", "name"),
    [
        ("ViT", {"intermediate_size": 1536, "patch_size": 16, "image_size": 64}, "dino_vits16"),
        ("Dinov2", {"patch_size": 14, "image_size": 56}, "dinov2_vits14"),
        ("Dinov2WithRegisters", {"patch_size": 14, "image_size": 56}, "dinov2_vits14_reg"),
        ("DINOv3ViT", {"intermediate_size": 1536, "num_register_tokens": 4}, "dinov3_vits16_qkvb"),
    ],
)
def test_a_file_of_transformers_loads_as_it_is(kind, options, name, make_transformer, tmp_path, gap):
    model = make_transformer(kind, hidden_size=384, num_hidden_layers=12, num_attention_heads=6, **options)
    model.save_pretrained(tmp_path)
    backbone = Backbone.load(tmp_path / "model.safetensors")
    assert backbone.name == name
    picture = torch.rand(1, 3, 4 * backbone.patch, 4 * backbone.patch)
    request = Request(11, "token")
    with torch.no_grad():
        expected = model((picture - backbone.mean) / backbone.std).last_hidden_state
        got = backbone.model.norm(backbone(picture, [request])[request])
    assert gap(got, expected) < 1e-4


def rename(tensors, *pairs):
    """Keys as a table of patterns says."""
    for pattern, new in pairs:
        tensors = {re.sub(pattern, new, key): value for key, value in tensors.items()}
    return tensors


def with_registers(tensors):
    """As DINOv2's authors keep registers: their table of positions has one for [CLS], which timm adds to the token."""
    position = torch.rand(1, 1, 48)
    positions = {
        "pos_embed": torch.cat([position, tensors["pos_embed"]], dim=1),
        "cls_token": tensors["cls_token"] - position,
    }
    return rename({**tensors, **positions, "mask_token": torch.rand(1, 48)}, ("reg_token", "register_tokens"))


def dinov3(tensors):
    """The biases of queries, keys and values are one tensor, with a mask for that of the keys."""
    renamed = rename(
        tensors,
        ("reg_token", "storage_tokens"),
        (r"gamma_(\d)", r"ls\1.gamma"),
        ("fc1_g", "w1"),
        ("fc1_x", "w2"),
        *((("fc2", "w3"),) if "blocks.0.mlp.fc1_g.weight" in tensors else ()),
    )
    for index in range(4):
        parts = [renamed.pop(f"blocks.{index}.attn.{part}_bias", torch.zeros(48)) for part in "qv"]
        renamed[f"blocks.{index}.attn.qkv.bias"] = torch.cat([parts[0], torch.rand(48), parts[1]])
        renamed[f"blocks.{index}.attn.qkv.bias_mask"] = torch.ones(144)
    return {
        **renamed,
        "mask_token": torch.rand(1, 48),
        "rope_embed.periods": torch.rand(4),
        "local_cls_norm.weight": torch.rand(48),
    }


AUTHORS = {
    "dino": lambda tensors: tensors,
    "dinov2": lambda tensors: {**tensors, "mask_token": torch.rand(1, 48)},
    "dinov2_reg": with_registers,
    "dinov2_swiglu": lambda tensors: rename(tensors, ("fc1", "w12"), ("fc2", "w3")),
    "dinov3_qkvb": dinov3,
    "dinov3_plus_qkvb": dinov3,
}
"""timm's keys under the authors' names, by the kind of tiny model."""


@pytest.mark.parametrize("kind", [*AUTHORS, "dinov3", "dinov3_plus"])
@pytest.mark.parametrize("layout", ["timm", "authors"])
def test_layouts_of_timm_and_of_the_authors(kind, layout, tiny_model, tmp_path):
    tensors = tiny_model(kind).state_dict()
    written = AUTHORS.get(kind, dict)(tensors) if layout == "authors" else tensors
    save_file({key: value.contiguous() for key, value in written.items()}, tmp_path / "model.safetensors")
    converted = read(tmp_path / "model.safetensors")
    assert converted.keys() == tensors.keys()
    assert all(torch.allclose(converted[key], tensors[key], atol=1e-6) for key in tensors)


HEADS = {
    "mlp.0.weight": torch.rand(8, 48),
    "last_layer.weight_g": torch.rand(8, 1),
    "last_layer.weight_v": torch.rand(8, 8),
}


def under(prefix, tensors):
    return {f"{prefix}{key}": value for key, value in tensors.items()}


def other(tensors):
    """Weights that must not be taken."""
    return {key: torch.zeros_like(value) for key, value in tensors.items()}


def chunked(tensors):
    return {re.sub(r"^blocks\.(\d)", r"blocks.0.\1", key): value for key, value in tensors.items()}


def state_of_dino(tensors):
    """What DINO's own training writes."""
    return {
        "student": {**under("module.backbone.", other(tensors)), **under("module.head.", HEADS)},
        "teacher": {**under("backbone.", tensors), **under("head.", HEADS)},
        "optimizer": {"state": {0: {"exp_avg": torch.rand(3)}}, "param_groups": [{"lr": 0.1}]},
        "epoch": 3,
        "args": argparse.Namespace(arch="vit_small", output_dir=pathlib.Path("out"), lr=0.1),
        "best": np.float64(0.7),
        "seen": np.int64(7),
        "dino_loss": {"center": torch.rand(1, 8)},
    }


WRAPPERS = {
    "plain": lambda tensors: tensors,
    **{f"in {name}": lambda t, name=name: {name: t, "epoch": 3} for name in ("state_dict", "model", "teacher")},
    **{
        f"after {prefix}": lambda t, prefix=prefix: under(prefix, t)
        for prefix in ("module.", "backbone.", "module.backbone.", "teacher.backbone.", "encoder.module.model.vit.")
    },
    "DINO's training": state_of_dino,
    "DINOv2's training": lambda t: {
        "model": {**under("student.backbone.", other(t)), **under("teacher.backbone.", t)},
        "iteration": 4,
    },
    "DINOv2's teacher": lambda t: {"teacher": {**under("backbone.", t), **under("dino_head.", HEADS)}},
    "the student alone": lambda t: {"student": under("module.backbone.", t)},
    "timm's training": lambda t: {"state_dict": other(t), "state_dict_ema": t},
    "chunks of blocks": lambda t: {"teacher": under("backbone.", chunked(t))},
    "a classifier": lambda t: {**t, "head.weight": torch.rand(1000, 48), "head.bias": torch.rand(1000)},
    "an upsampler": lambda t: {**t, "naf.encoder.weight": torch.rand(3, 3)},
    "dictionaries in dictionaries": lambda t: {"model": {"deep": {"deeper": t}}},
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_what_wraps_a_vit_is_taken_off(wrap, tiny_model, tmp_path):
    tensors = tiny_model("dinov2").state_dict()
    torch.save(wrap(tensors), tmp_path / "checkpoint.pth")
    loaded = read(tmp_path / "checkpoint.pth")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[key], value) for key, value in tensors.items())


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
def test_suffixes(suffix, tiny_model, tmp_path):
    tensors = tiny_model("dino").state_dict()
    torch.save(tensors, tmp_path / f"mine{suffix}")
    assert read(tmp_path / f"mine{suffix}").keys() == tensors.keys()


def zeros(*keys):
    return {key: torch.zeros(3) for key in keys}


@pytest.mark.parametrize(
    ("tensors", "kind"),
    [
        (zeros("embedder.embedder.convolution.weight", "encoder.stages.0.layers.0.weight"), "a transformers ResNet"),
        (zeros("conv1.weight", "layer1.0.conv1.weight"), "a ResNet"),
        (under("module.backbone.", zeros("layer1.0.conv1.weight")), "a ResNet"),
        (zeros("downsample_layers.0.0.weight", "stages.0.0.dwconv.weight"), "a ConvNeXt"),
        (zeros("stages.0.layers.0.depthwise_conv.weight"), "a ConvNeXt"),
        (zeros("cls_attn_blocks.0.attn.q.weight"), "an XCiT"),
        (zeros("vision_model.embeddings.patch_embedding.weight"), "a CLIP vision model"),
        (zeros("visual.class_embedding"), "a CLIP vision model"),
        (zeros("blocks.0.attn.relative_position_bias_table"), "a Swin or BEiT transformer"),
        (zeros("lora_unet_down_blocks_0.lora_down.weight"), "a LoRA"),
        (zeros("model.diffusion_model.input_blocks.0.0.weight"), "a diffusion model"),
        (zeros("decoder.conv_in.weight"), "a VAE"),
        (zeros("weight", "bias"), "a head without its backbone"),
        (zeros("some.layer"), r"something else \(its first tensor is some.layer\)"),
        (zeros("patch_embed.proj.weight"), r"something else \(its first tensor is patch_embed.proj.weight\)"),
    ],
)
def test_other_models_are_called_by_what_they_are(tensors, kind, tmp_path):
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(SpliceError, match=f"model.safetensors is {kind}, not the weights of a DINO"):
        Backbone.load(tmp_path / "model.safetensors")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ("<!DOCTYPE html><html>\n</html>\n", "a web page, not weights"),
        ('\n<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "a web page, not weights"),
        ("version git-lfs/spec/v1\noid sha256:00\nsize 3\n", "a Git LFS pointer"),
        ("GGUF\0\0", "a GGUF file"),
        ('{"architectures": ["Dinov2Model"], "hidden_size": 384, "model_type": "dinov2"}', "text, not weights"),
    ],
)
def test_files_that_hold_no_tensors(content, kind, suffix, tmp_path):
    path = tmp_path / f"dino_vits16{suffix}"
    path.write_text(content)
    with pytest.raises(SpliceError, match=f"dino_vits16{suffix} is {kind}"):
        Backbone.load(path)


def test_a_generator_of_ours_is_named(tmp_path):
    Generator().save(tmp_path / "kept.safetensors")
    with pytest.raises(SpliceError, match=r"kept.safetensors is a generator of Splice"):
        Backbone.load(tmp_path / "kept.safetensors")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: {**t, "blocks.0.attn.rel_pos_h": torch.zeros(3)}, "no DINO has blocks.0.attn.rel_pos_h"),
        (lambda t: {**t, "blocks.1.adapter.weight": torch.zeros(3)}, "no DINO has blocks.1.adapter.weight"),
    ],
)
def test_a_vit_of_another_kind(change, reason, tiny_model, tmp_path):
    save_file(change(tiny_model("dino").state_dict()), tmp_path / "model.safetensors")
    with pytest.raises(SpliceError, match=reason):
        read(tmp_path / "model.safetensors")


def test_a_part_that_is_missing_is_named(make_transformer, tmp_path):
    make_transformer("ViT", **TRANSFORMERS["dino"][1]).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    key = "encoder.layer.1.attention.attention.key.weight"
    save_file({name: value for name, value in tensors.items() if name != key}, tmp_path / "cut.safetensors")
    with pytest.raises(SpliceError, match=rf"a ViT as transformers saves it, but incomplete: it lacks {key}"):
        read(tmp_path / "cut.safetensors")
