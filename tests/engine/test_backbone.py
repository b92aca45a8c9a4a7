"""The truncated single pass against a plain one: the whole model, with hooks."""

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import apply_rot_embed_cat
from torch.utils.flop_counter import FlopCounterMode

from splice_engine import CATALOGUE, Backbone, Request, SpliceError
from splice_engine.images import resize

KINDS = (
    "dino",
    "dinov2",
    "dinov2_reg",
    "dinov2_swiglu",
    "dinov3",
    "dinov3_qkvb",
    "dinov3_plus",
    "dinov3_plus_qkvb",
    "dinov3_unfused",
)
FACETS = ("cls", "token", "key", "query", "value", "cls_attention")
SIZES = ((56, 56), (64, 112), (101, 65))
EXACT = 2e-5


def plain_pass(model, picture):
    """Every facet of every block: inputs and outputs are caught in a full forward, the rest is worked out by hand."""
    attention_inputs, outputs = {}, {}

    def catch_input(layer):
        return lambda _module, inputs, options: attention_inputs.update({layer: (inputs[0], options.get("rope"))})

    def catch_output(layer):
        return lambda _module, _inputs, output: outputs.update({layer: output})

    hooks = []
    for layer, block in enumerate(model.blocks):
        hooks.append(block.attn.register_forward_pre_hook(catch_input(layer), with_kwargs=True))
        hooks.append(block.register_forward_hook(catch_output(layer)))
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    model((picture - mean) / std)
    for hook in hooks:
        hook.remove()
    answer = {}
    for layer, block in enumerate(model.blocks):
        x, rope = attention_inputs[layer]
        query, key, value = project(block.attn, x)
        facets = (outputs[layer][:, 0], outputs[layer], key, query, value, attend(block.attn, query, key, rope))
        answer.update({Request(layer, facet): tensor for facet, tensor in zip(FACETS, facets, strict=True)})
    return answer


def project(attn, x):
    if attn.qkv is None:
        return attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)
    biases = [attn.q_bias, attn.k_bias, attn.v_bias] if getattr(attn, "q_bias", None) is not None else None
    bias = torch.cat(biases) if biases else attn.qkv.bias
    return F.linear(x, attn.qkv.weight, bias).chunk(3, dim=-1)


def attend(attn, query, key, rope):
    heads = []
    for projected in (query, key):
        x = projected.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
        if rope is not None:
            prefix = attn.num_prefix_tokens
            patches = apply_rot_embed_cat(x[:, :, prefix:], rope, half=attn.rotate_half)
            x = torch.cat([x[:, :, :prefix], patches], dim=2)
        heads.append(x)
    return (heads[0] @ heads[1].mT / heads[0].shape[-1] ** 0.5).softmax(dim=-1)[:, :, 0]


def poison(*tensors):
    for tensor in tensors:
        tensor.data.fill_(torch.nan)


@pytest.fixture(scope="module")
def noise():
    def make(height, width, batch=1):
        return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(height + width))

    return make


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_tiny_models_agree_with_a_full_forward(kind, size, tiny, tiny_model, noise, gap):
    backbone, model = tiny(kind), tiny_model(kind)
    picture = resize(noise(*size, batch=2), backbone.grid_size(*size))
    with torch.no_grad():
        expected = plain_pass(model, picture)
        for request, tensor in expected.items():
            assert gap(backbone(picture, [request])[request], tensor) < EXACT, request
        together = backbone(picture, list(expected))
    assert together.keys() == expected.keys()
    assert max(gap(together[request], tensor) for request, tensor in expected.items()) < EXACT


@pytest.mark.parametrize("size", [(56, 70), (736, 720)], ids=str)
@pytest.mark.parametrize("kind", ["dino", "dinov2_reg", "dinov3_plus_qkvb"])
def test_gradients_agree_with_a_full_forward(kind, size, tiny, tiny_model, noise, gap):
    """The larger size has more tokens than attention keeps in memory on a CPU."""
    backbone = tiny(kind)
    asked = [Request(2, "cls"), Request(2, "key"), Request(0, "token")]
    gradients = []
    for extract in (lambda picture: backbone(picture, asked), lambda picture: plain_pass(tiny_model(kind), picture)):
        picture = resize(noise(*size), backbone.grid_size(*size)).requires_grad_()
        answer = extract(picture)
        sum((1 + index) * answer[request].square().sum() for index, request in enumerate(asked)).backward()
        gradients.append(picture.grad)
    assert gap(*gradients) < 1e-4


@pytest.mark.parametrize("size", [(224, 224), (100, 171)], ids=str)
def test_real_weights_agree_with_a_full_forward(size, backbone, plain_model, demo_pair, gap):
    picture = resize(demo_pair[0], backbone.grid_size(*size))
    asked = [Request(layer, facet) for layer in (0, 5, 11) for facet in FACETS]
    with torch.no_grad():
        expected = plain_pass(plain_model, picture)
        got = backbone(picture, asked)
        alone = {request: backbone(picture, [request])[request] for request in asked[-len(FACETS) :]}
    assert {request: gap(got[request], expected[request]) < EXACT for request in asked} == dict.fromkeys(asked, True)
    assert max(gap(alone[request], expected[request]) for request in alone) < EXACT


@pytest.mark.parametrize("asked", [{(1, "key"), (2, "cls")}, {(0, "token"), (2, "key")}, {(2, "key"), (2, "cls")}])
def test_mixed_requests(asked, tiny, tiny_model, noise, gap):
    picture = noise(56, 70)
    with torch.no_grad():
        expected = plain_pass(tiny_model(), picture)
        got = tiny()(picture, [Request(*pair) for pair in asked])
    assert got.keys() == asked
    assert max(gap(tensor, expected[request]) for request, tensor in got.items()) < EXACT


def test_negative_layers_count_from_the_end(tiny, noise):
    backbone, picture = tiny(), noise(56, 56)
    answer = backbone(picture, [Request(-1, "key"), Request(3, "key"), Request(-4, "cls"), Request(0, "cls")])
    assert torch.equal(answer[Request(-1, "key")], answer[Request(3, "key")])
    assert torch.equal(answer[Request(-4, "cls")], answer[Request(0, "cls")])
    assert len(answer) == 4


@pytest.mark.parametrize("facet", ["token", "key", "query", "value"])
@pytest.mark.parametrize("kind", ["dinov2", "dinov2_reg", "dinov3"])
def test_features_split_prefix_and_patches(kind, facet, tiny, tiny_model, noise, gap):
    """Also at a size that the patch does not divide, and one that is asked for."""
    backbone, picture = tiny(kind), noise(75, 117)
    height, width = backbone.grid_size(75, 117, short=64)
    features = backbone.features(picture, layer=1, facet=facet, size=64)
    with torch.no_grad():
        expected = plain_pass(tiny_model(kind), resize(picture, (height, width)))
    assert features.grid == (height // backbone.patch, width // backbone.patch)
    assert features.tokens.shape[1] == features.grid[0] * features.grid[1]
    assert (features.layer, features.facet, features.prefix.shape[1]) == (1, facet, backbone.prefix)
    assert gap(torch.cat([features.prefix, features.tokens], dim=1), expected[Request(1, facet)]) < EXACT
    assert gap(features.cls, expected[Request(1, "cls")]) < EXACT


@pytest.mark.parametrize("kind", ["dino", "dinov2_reg", "dinov3"])
def test_attention_rows_sum_to_one(kind, tiny, noise):
    backbone = tiny(kind)
    height, width = backbone.grid_size(64, 100)
    attention = backbone.cls_attention(noise(64, 100), layer=1)
    tokens = backbone.prefix + height * width // backbone.patch**2
    assert attention.shape == (1, 3, tokens)
    assert (attention.sum(dim=-1) - 1).abs().max() < 1e-5
    assert attention.min() >= 0


@pytest.mark.parametrize(
    ("height", "width", "short", "expected"),
    [
        (224, 224, None, (224, 224)),
        (100, 100, None, (98, 98)),
        (106, 90, None, (112, 84)),
        (512, 768, 224, (224, 336)),
        (900, 300, 56, (168, 56)),
        (3, 200, None, (14, 196)),
    ],
)
def test_grid_size_is_the_nearest_on_the_patch_grid(height, width, short, expected, tiny):
    assert tiny().grid_size(height, width, short) == expected


def test_weights_are_frozen_and_gradients_pass(tiny, noise):
    backbone, picture = tiny(), noise(56, 56).requires_grad_()
    answer = backbone(picture, [Request(2, "cls"), Request(1, "key")])
    sum(tensor.square().sum() for tensor in answer.values()).backward()
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in backbone.parameters())
    assert picture.grad.abs().max() > 0


@pytest.mark.parametrize("facet", FACETS)
@pytest.mark.parametrize("kind", ["dinov2", "dinov3_qkvb"])
def test_blocks_past_the_last_request_are_not_computed(kind, facet, tiny, noise):
    backbone = tiny(kind)
    poison(*backbone.model.blocks[2].parameters(), *backbone.model.norm.parameters())
    size = (4 * backbone.patch,) * 2
    assert backbone(noise(*size), [Request(1, facet)])[Request(1, facet)].isfinite().all()
    assert not backbone(noise(*size), [Request(2, facet)])[Request(2, facet)].isfinite().all()


def work(backbone, picture, *requests):
    """Multiplications and additions of a pass."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        backbone(picture, [Request(*request) for request in requests])
    return counter.get_total_flops()


@pytest.mark.parametrize("kind", ["dino", "dinov2_reg", "dinov3", "dinov3_qkvb"])
def test_the_last_block_computes_no_more_than_was_asked(kind, tiny, noise):
    backbone, side = tiny(kind), 5
    picture = noise(side * backbone.patch, side * backbone.patch)
    tokens, width = backbone.prefix + side**2, backbone.width
    before = work(backbone, picture, (0, "token"))
    one_projection = 2 * tokens * width**2
    for facet in ("query", "key", "value"):
        assert work(backbone, picture, (1, facet)) - before == one_projection
    # Keys and values of all tokens; query, attention, projection and MLP of [CLS] alone.
    cls_row = 2 * (2 * width**2 + 2 * tokens * width + 8 * width**2)
    for asked in ([(1, "cls")], [(1, "cls"), (1, "key")]):
        assert work(backbone, picture, *asked) - before <= 2 * one_projection + cls_row
    assert work(backbone, picture, (1, "token")) - before > 4 * one_projection


def test_bf16_stays_close_and_lets_gradients_through(load_real, backbone, demo_pair):
    low = load_real("cpu", torch.bfloat16)
    asked = [Request(11, facet) for facet in FACETS]
    gradients = []
    answers = []
    for vit in (backbone, low):
        picture = resize(demo_pair[0], (112, 154)).requires_grad_()
        answer = vit(picture, asked)
        assert all(tensor.dtype == torch.float32 for tensor in answer.values())
        answer[Request(11, "key")].square().mean().backward()
        gradients.append(picture.grad.flatten())
        answers.append({request: tensor.detach() for request, tensor in answer.items()})
    for request in asked:
        error = (answers[1][request] - answers[0][request]).norm() / answers[0][request].norm()
        assert 0 < error < 0.05, request
    assert F.cosine_similarity(*gradients, dim=0) > 0.95


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_precisions_are_refused(dtype, tiny):
    with pytest.raises(SpliceError, match="float32 or bfloat16"):
        tiny(dtype=dtype)


@pytest.mark.parametrize("layer", [4, 12, -5])
def test_unknown_layer(layer, tiny, noise):
    backbone = tiny()
    for ask in (
        lambda: backbone(noise(56, 56), [Request(layer, "key")]),
        lambda: backbone.features(noise(56, 56), layer=layer),
        lambda: backbone.cls_attention(noise(56, 56), layer=layer),
    ):
        with pytest.raises(SpliceError, match=f"4 blocks.*not {layer}"):
            ask()


def test_unknown_facet(tiny, noise):
    with pytest.raises(SpliceError, match=r"unknown facet 'keys'.*key"):
        tiny().features(noise(56, 56), facet="keys")


@pytest.mark.parametrize(
    ("name", "offer"),
    [("dino_vitb9", "dino_vitb8"), ("dinov2-vits14", "dinov2_vits14"), ("zzz", "splice weights list")],
)
def test_unknown_backbone_offers_the_near_ones(name, offer):
    with pytest.raises(SpliceError, match=f"unknown backbone '{name}'.*{offer}"):
        Backbone.load(name)


@pytest.mark.parametrize("entry", CATALOGUE.values(), ids=CATALOGUE)
def test_catalogue_row_is_what_timm_builds(entry):
    architecture, tag = entry.timm_id.split(".")
    known = timm.get_pretrained_cfg(entry.timm_id)
    assert (known.architecture, known.tag, known.hf_hub_id) == (architecture, tag, entry.hub_id)
    assert known.hf_hub_filename in (None, "model.safetensors")
    with torch.device("meta"):  # shapes without memory: the largest ones have billions of weights
        model = timm.create_model(architecture, num_classes=0, dynamic_img_size=True)
    backbone = Backbone(model, entry.name)
    assert backbone.patch == entry.patch
    assert backbone.prefix == (5 if "dinov3" in entry.name or entry.name.endswith("_reg") else 1)
