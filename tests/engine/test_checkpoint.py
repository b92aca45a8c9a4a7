"""Checkpoints: the same bits after a break, whole files, and runs that they do not belong to."""

import json
import time
from contextlib import closing
from dataclasses import replace

import pytest
import torch

from splice_engine import (
    OFFLINE_BACKBONE,
    Generator,
    Settings,
    SpliceError,
    Transfer,
    load_picture,
    preset,
    save_picture,
)
from splice_engine.cli.outputs import Log
from splice_engine.files import atomic_path
from splice_engine.images import resize
from splice_engine.training.checkpoint import Checkpoint

pytestmark = pytest.mark.usefixtures("coarse_matching")

SMALL = {"size": 64, "vit_size": 56, "steps": 6, "density": 1}
WARM = preset("draft", **SMALL, warm_steps=4, cached_crops=3)
RECIPES = {
    "warm start, residual, average, cached crops": WARM,
    "all augmentation": Settings(**SMALL, whole_every=2),
    "refinement": replace(WARM, refine_steps=3),
    "recompute": replace(WARM, recompute=True, cached_crops=0, identity_every=2),
}


def begin(pair, backbone, settings, **options):
    return Transfer(*(resize(picture, (72, 88)) for picture in pair), backbone, settings, **options)


def take(run, steps):
    totals = []
    for step in run:
        totals.append(step.total.item())
        if run.step == steps:
            break
    return totals


@pytest.mark.parametrize("settings", RECIPES.values(), ids=RECIPES)
def test_a_run_that_goes_on_gives_the_same_bits(pair, tiny, tmp_path, settings):
    """Broken off before its first step, in each of its phases, and between them."""
    mask = torch.zeros(1, 1, 72, 88)
    mask[..., 10:60, 20:70] = 1
    options = {"structure_mask": mask, "appearance_mask": mask} if settings.ema else {}
    whole = begin(pair, tiny(), settings, **options)
    totals = take(whole, settings.all_steps)
    for broken_at in ([0, settings.warm_steps], [2, settings.all_steps - 2]):
        path, got = tmp_path / "a.checkpoint", []
        for stop in broken_at:
            run = begin(pair, tiny(), settings, **options)
            checkpoint = Checkpoint(run, path)
            if checkpoint.exists:
                assert checkpoint.restore() == 2.5
            if stop:
                got += take(run, stop)
            checkpoint.save(seconds=2.5)
        run = begin(pair, tiny(), settings, **options)
        Checkpoint(run, path).restore()
        assert run.step == broken_at[-1]
        got += take(run, settings.all_steps)
        assert got == totals
        assert torch.equal(run.image(), whole.image())
        path.unlink()


def test_a_checkpoint_belongs_to_its_run(pair, tiny, tmp_path):
    """Whatever differs is named."""
    path = tmp_path / "a.checkpoint"
    Checkpoint(begin(pair, tiny(), WARM), path).save()
    mask = torch.ones(1, 1, 72, 88)
    for other, words in (
        (begin((pair[1], pair[1]), tiny(), WARM), "structure picture"),
        (begin((pair[0], pair[0]), tiny(), WARM), "appearance picture"),
        (begin(pair, tiny(), WARM, structure_mask=mask), "structure mask"),
        (begin(pair, tiny(), WARM, appearance_mask=mask), "appearance mask"),
        (begin(pair, tiny(seed=1), WARM), "backbone"),
        (begin(pair, tiny("dino"), WARM), "backbone"),
        (begin(pair, tiny(), replace(WARM, steps=7, texture=0.5)), "setting texture, setting steps"),
        (begin(pair, tiny(), WARM, generator=Generator(seed=5)), "generator to start from"),
    ):
        with pytest.raises(SpliceError, match=f"is the checkpoint of another run.*{words}"):
            Checkpoint(other, path).restore()
        assert other.step == 0


@pytest.mark.parametrize("damage", [lambda content: b"", lambda content: content[:5000], lambda content: b"{}" * 50])
def test_a_damaged_file_is_told(pair, tiny, tmp_path, damage):
    path = tmp_path / "a.checkpoint"
    checkpoint = Checkpoint(begin(pair, tiny(), WARM), path)
    checkpoint.save()
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(SpliceError, match="is no checkpoint: remove it"):
        checkpoint.restore()


def test_a_file_with_code_in_it_is_not_run(pair, tiny, tmp_path):
    path = tmp_path / "a.checkpoint"
    torch.save({"format": "splice-checkpoint-2", "identity": pytest.fail}, path)
    with pytest.raises(SpliceError, match="is no checkpoint"):
        Checkpoint(begin(pair, tiny(), WARM), path).restore()


def test_a_full_disk_keeps_the_checkpoint_before(pair, tiny, tmp_path, limit_file_size):
    path = tmp_path / "a.checkpoint"
    run = begin(pair, tiny(), WARM)
    checkpoint = Checkpoint(run, path)
    checkpoint.save()
    before = path.read_bytes()
    take(run, 1)
    with limit_file_size(4096), pytest.raises(SpliceError, match=r"cannot write .*a\.checkpoint"):
        checkpoint.save()
    assert path.read_bytes() == before


@pytest.fixture
def command(pair, tmp_path):
    """A short training on the command line, with all that it can write."""
    for name, picture in zip(("a.png", "b.png"), pair, strict=True):
        save_picture(resize(picture, (72, 88)), tmp_path / name)

    def build(folder):
        folder.mkdir(exist_ok=True)
        return (
            *(
                "transfer",
                tmp_path / "a.png",
                tmp_path / "b.png",
                "-o",
                folder / "out.png",
                "--strip",
                folder / "s.png",
            ),
            *("--log", folder / "log.jsonl", "--save-generator", folder / "g.safetensors", "--every", 2, "--quiet"),
            *("--backbone", OFFLINE_BACKBONE, "--device", "cpu", "--dtype", "fp32"),
            *("--preset", "paper", "--size", 64, "--vit-size", 56, "--steps", 9, "--checkpoint-every", 2),
        )

    return build


def read_log(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["seconds"] for line in lines] == sorted(line.pop("seconds") for line in [*map(dict, lines)])
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def test_a_killed_command_goes_on(start, splice, command, tmp_path):
    """What it wrote is replaced without --overwrite, the log goes on, and nothing else is left."""
    splice(*command(tmp_path / "whole"))
    folder = tmp_path / "killed"
    child = start(*command(folder))
    try:
        while not (folder / "out.png.checkpoint").exists():
            assert child.poll() is None
            time.sleep(0.02)
    finally:
        child.kill()
        child.communicate()
    assert not (folder / "out.png").exists()
    writing = atomic_path(folder / "out-00002.png")  # not closed: it leaves what a kill at that moment leaves
    writing.__enter__().write_bytes(b"half")
    result = splice(*command(folder), "--resume")
    assert result.status == 0
    assert "going on after step" in result.err
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "whole").iterdir())
    for name in names:
        if name == "log.jsonl":
            assert read_log(folder / name) == read_log(tmp_path / "whole" / name)
        elif name == "s.png":
            assert load_picture(folder / name).shape == load_picture(tmp_path / "whole" / name).shape
        elif name == "g.safetensors":
            states = (Generator.load(path / name).state_dict() for path in (folder, tmp_path / "whole"))
            torch.testing.assert_close(*states, rtol=0, atol=0)
        else:
            assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_log_that_goes_on_loses_no_line(tmp_path, limit_file_size):
    """Those that stay are not written anew, which a kill might prevent, or a full disk."""
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 0}\n{"step": 1}\n{"step": 2}\n')
    with limit_file_size(0), closing(Log(path, kept=2)):
        assert path.read_bytes() == b'{"step": 0}\n{"step": 1}\n'
    with closing(Log(path, kept=2)) as log:
        log.write({"step": 5})
    assert path.read_bytes() == b'{"step": 0}\n{"step": 1}\n{"step": 5}\n'
    with closing(Log(path)):
        assert path.read_bytes() == b""


def test_resuming_asks_for_the_same_run(splice, command, tmp_path, monkeypatch):
    """A run without a checkpoint begins, and one with that of another run is refused in one line."""
    arguments, folder = command(tmp_path / "out"), tmp_path / "out"
    result = splice(*arguments, "--resume")
    assert (result.status, len(result.complaint)) == (0, 1)
    assert "no checkpoint at" in result.err
    assert not (folder / "out.png.checkpoint").exists()
    result = splice(*arguments, "--resume")
    assert result.status == 2
    assert "is there already" in result.err
    (folder / "out.png.checkpoint").write_bytes(b"")
    for path in folder.glob("*.*g"):
        path.unlink()
    result = splice(*arguments)
    assert (result.status, len(result.complaint)) == (2, 1)
    assert "of a run that was broken off: go on with --resume" in result.err
    result = splice(*arguments, "--resume")
    assert (result.status, len(result.complaint)) == (2, 1)
    assert "is no checkpoint" in result.err
