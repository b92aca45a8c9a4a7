"""The command line: what it writes, what it says, and how it ends."""

import json
import pickle
import shutil
import signal
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from splice_engine import (
    CATALOGUE,
    OFFLINE_BACKBONE,
    PRESETS,
    Generator,
    InstantSettings,
    InstantTransfer,
    Inversion,
    SpliceError,
    Transfer,
    images,
    load_picture,
    preset,
    save_picture,
)
from splice_engine.analysis import heatmaps
from splice_engine.cli.main import build_parser
from splice_engine.cli.outputs import Log
from splice_engine.images import load_alpha, resize

pytestmark = pytest.mark.usefixtures("coarse_matching")

VIT = ("--backbone", OFFLINE_BACKBONE, "--device", "cpu")
TRAINING = (*VIT, "--dtype", "fp32", "--preset", "paper", "--vit-size", 56, "--quiet")
SHAPE = (72, 88)
ANALYSES = ("pca", "similarity", "attention", "invert", "ablate")
COMMANDS = ("transfer", "weights", "measure", "apply", "instant", *ANALYSES, "curves")


@pytest.fixture
def files(tmp_path, pair):
    """A folder with a pair of pictures, and places to write to."""
    for folder in ("in", "out"):
        (tmp_path / folder).mkdir()
    places = SimpleNamespace(
        root=tmp_path,
        structure=tmp_path / "in" / "structure.png",
        appearance=tmp_path / "in" / "appearance.png",
        result=tmp_path / "out" / "result.png",
        strip=tmp_path / "out" / "strip.png",
        log=tmp_path / "out" / "log.jsonl",
        generator=tmp_path / "out" / "generator.safetensors",
        other=tmp_path / "in" / "other.png",
    )
    save_picture(resize(pair[0], SHAPE), places.structure)
    save_picture(resize(pair[1], (80, 66)), places.appearance)
    return places


@pytest.fixture
def transfer(splice, files):
    """Runs `splice transfer` on the pair."""

    def run(*extra, structure=files.structure, appearance=files.appearance, output=files.result):
        return splice("transfer", structure, appearance, "-o", output, *TRAINING, *extra)

    return run


@pytest.fixture
def analyse(splice, files):
    """Runs one of the commands of analysis, quickly."""

    def run(command, *extra, picture=files.structure, output=files.result):
        arguments = {
            "pca": ("--size", 112),
            "similarity": (
                *("--density", 1),
                *(() if "--mask" in extra and "mask.png" not in extra else ("--point", 0.4, 0.3)),
            ),
            "attention": ("--size", 112),
            "invert": ("--size", 84, "--steps", 1, "--quiet"),
            "ablate": (files.appearance, "--size", 64, "--vit-size", 56, "--steps", 1, "--quiet"),
        }[command]
        return splice(command, picture, *arguments, "-o", output, *VIT, *extra)

    return run


@pytest.fixture
def write_to(splice, files, transfer, analyse):
    """Runs any command that writes a picture, quickly, with a place for it."""

    def run(command, path):
        if command == "apply":
            return splice("apply", files.generator, files.structure, "-o", path, "--device", "cpu")
        if command == "instant":
            return splice("instant", files.structure, files.appearance, "-o", path, *VIT)
        return analyse(command, output=path) if command in ANALYSES else transfer("--steps", 1, output=path)

    return run


def tree(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_everything_that_a_transfer_writes(transfer, splice, files):
    result = transfer(
        *("--steps", 3, "--every", 1, "--log", files.log),
        *("--strip", files.strip, "--save-generator", files.generator),
    )
    assert (result.status, result.err) == (0, "")
    assert result.out.startswith("3 steps in ")
    picture = load_picture(files.result)
    assert picture.shape[-2:] == SHAPE
    lines = [json.loads(line) for line in files.log.read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert all(line["total"] > 0 and line["seconds"] > 0 for line in lines)
    assert {"appearance", "structure", "identity"} <= lines[2].keys()
    numbered = sorted(path.name for path in files.result.parent.glob("result-*"))
    assert numbered == ["result-00001.png", "result-00002.png"]
    assert not torch.equal(load_picture(files.result.with_name(numbered[0])), picture)
    strip = Image.open(files.strip)
    assert strip.width > 3 * strip.height / 2
    for path in (files.result, files.log, files.strip, files.generator):
        assert str(path) in result.out
    applied = files.root / "out" / "applied.png"
    result = splice("apply", files.generator, files.structure, "-o", applied, "--device", "cpu")
    assert (result.status, result.out.strip(), result.err) == (0, str(applied), "")
    assert torch.equal(load_picture(applied), picture)


@pytest.mark.parametrize("recipe", [("--ema", 0.8), ("--warm-steps", 2, "--residual", 1.0, "--refine-steps", 1)])
def test_the_generator_that_is_saved_is_the_one_that_made_the_picture(recipe, transfer, splice, files):
    """Also where a running average made it, and where more than the generator did."""
    transfer("--steps", 4, *recipe, "--learning-rate", 0.02, "--save-generator", files.generator)
    applied = files.root / "out" / "applied.png"
    splice("apply", files.generator, files.structure, "-o", applied, "--device", "cpu")
    assert torch.equal(load_picture(applied), load_picture(files.result))


def test_a_run_goes_on_from_a_saved_generator(transfer, files):
    transfer("--steps", 2, "--learning-rate", 0.02, "--save-generator", files.generator)
    first = load_picture(files.result)
    slow = ("--steps", 1, "--learning-rate", 0, "--overwrite")
    transfer(*slow, "--start", files.generator)
    assert torch.equal(load_picture(files.result), first)
    transfer(*slow)
    assert not torch.equal(load_picture(files.result), first)


def test_a_warm_start_is_logged_too(transfer, files):
    result = transfer("--steps", 2, "--warm-steps", 3, "--match-passes", 1, "--log", files.log)
    assert result.out.startswith("5 steps in ")
    assert [json.loads(line)["step"] for line in files.log.read_text().splitlines()] == list(range(5))


def test_the_command_line_gives_what_the_library_gives(transfer, files, backbone):
    transfer("--steps", 3, "--seed", 7, "--learning-rate", 0.01, "--structure-weight", 3, "--crop", 0.8)
    settings = preset("paper", steps=3, vit_size=56, seed=7, learning_rate=0.01, structure_weight=3.0, crop=0.8)
    run = Transfer(load_picture(files.structure), load_picture(files.appearance), backbone, settings)
    list(run)
    assert (load_picture(files.result) - run.image()).abs().max() <= 0.5 / 255 + 1e-6


def test_size_of_training_does_not_change_the_size_of_the_result(transfer, files):
    assert transfer("--steps", 1, "--size", 64).status == 0
    assert load_picture(files.result).shape[-2:] == SHAPE
    assert transfer("--steps", 1, "--size", "full", "--overwrite").status == 0
    assert load_picture(files.result).shape[-2:] == SHAPE


def test_transparency_is_kept_on_request(transfer, files):
    picture = load_picture(files.structure)
    alpha = torch.linspace(0, 1, SHAPE[1]).mul(255).round().div(255).expand(1, 1, *SHAPE)
    save_picture(picture, files.other, alpha)
    transfer("--steps", 1, "--keep-alpha", structure=files.other)
    assert torch.equal(load_alpha(files.result), alpha)
    transfer("--steps", 1, "--overwrite", structure=files.other)
    assert load_alpha(files.result) is None


def test_instant(splice, files, monkeypatch):
    between, settings = InstantTransfer.between, []

    def record(*arguments, **options):
        settings.append(arguments[3])
        return between(*arguments, **options)

    monkeypatch.setattr(InstantTransfer, "between", record)
    command = ("instant", files.structure, files.appearance, "-o", files.result, *VIT)
    result = splice(*command, "--match-passes", 1, "--texture", 0.2, "--feather", 3)
    assert (result.status, result.out.strip(), result.err) == (0, str(files.result), "")
    assert settings == [InstantSettings(match_passes=1, texture=0.2, feather=3.0)]
    structure, painted = load_picture(files.structure), load_picture(files.result)
    assert painted.shape == structure.shape
    assert (painted - structure).abs().mean() > 0.02


def test_demo(splice, tmp_path):
    small = ("--preset", "paper", "--steps", 1, "--size", 64, "--vit-size", 56)
    result = splice("demo", "-o", tmp_path / "a" / "b", *small, "--quiet", "--device", "cpu")
    assert (result.status, result.err) == (0, "")
    assert load_picture(tmp_path / "a" / "b" / "demo.png").shape[-2:] == (512, 512)
    assert (tmp_path / "a" / "b" / "demo-strip.png").is_file()
    assert build_parser().parse_args(["demo"]).preset == "draft"


@pytest.fixture
def everything(files):
    """Options under which five steps write all that a transfer can write, and the files."""
    files.second, files.fourth = (files.result.with_stem(f"result-0000{step}") for step in (2, 4))
    writes = ("--every", 2, "--strip", files.strip, "--log", files.log, "--save-generator", files.generator)
    return writes, (files.result, files.strip, files.log, files.generator, files.second, files.fourth)


@pytest.mark.parametrize("warm", [0, 3])
@pytest.mark.parametrize("which", ["result", "strip", "log", "generator", "second", "fourth"])
def test_nothing_is_replaced_unless_asked_for(which, warm, transfer, everything, files):
    getattr(files, which).write_bytes(b"precious")
    before = tree(files.root)
    result = transfer(*everything[0], "--steps", 5 - warm, "--warm-steps", warm)
    refused(result, files, before, str(getattr(files, which)), "there already", "--overwrite")


def test_everything_is_replaced_when_asked_for(transfer, everything):
    for path in everything[1]:
        path.write_bytes(b"old")
    assert transfer(*everything[0], "--steps", 5, "--overwrite").status == 0
    assert [path.name for path in everything[1] if path.read_bytes() == b"old"] == []


def test_measure(splice, files):
    shape = ("measure", files.structure, files.appearance)
    result = splice(*shape, files.structure, *VIT, "--json", "--layer", 9, "--size", 112)
    assert (result.status, result.err, len(result.out.splitlines())) == (0, "", 1)
    values = json.loads(result.out)
    assert (values["backbone"], values["layer"], values["size"], values["dtype"]) == (
        *(OFFLINE_BACKBONE, 9, 112, "float32"),
    )
    assert values["structure_distance"] == pytest.approx(0, abs=1e-12)
    assert values["appearance_distance"] > 1e-3
    assert -1 <= values["appearance_cosine"] < 0.99
    values = json.loads(splice(*shape, files.appearance, *VIT, "--json", "--size", 112).out)
    assert values["layer"] == 11
    assert values["structure_distance"] > 1e-4
    text = splice(*shape, files.appearance, *VIT, "--size", 112).out
    assert "structure distance" in text
    assert f"{values['structure_distance']:.6g}" in text


def test_measure_of_the_appearance_picture_itself(splice, files):
    shutil.copy(files.appearance, files.structure)  # the output is resized to the aspect of the structure picture
    values = json.loads(
        splice("measure", files.structure, files.appearance, files.appearance, *VIT, "--json", "--size", 112).out
    )
    assert values["appearance_distance"] == pytest.approx(0, abs=1e-12)
    assert values["appearance_cosine"] == pytest.approx(1, abs=1e-6)


def test_weights_list(splice, cache, tmp_path, monkeypatch, backbone):
    def places():
        return {line.split()[0]: line.split()[3] for line in splice("weights", "list").out.splitlines()}

    assert list(places()) == list(CATALOGUE)
    assert places()[OFFLINE_BACKBONE] == "here"
    monkeypatch.setenv("SPLICE_CACHE", str(tmp_path))
    (tmp_path / "dino_vits16.safetensors").touch()
    assert {places()[name] for name in (OFFLINE_BACKBONE, "dino_vits16", "dino_vitb8")} == {
        *("package", "here", "hub"),
    }


def test_weights_where_and_get(splice, cache, weights_file):
    assert splice("weights", "where").out.strip() == str(cache)
    for action in ("where", "get"):
        result = splice("weights", action, OFFLINE_BACKBONE)
        assert (result.status, result.out.strip(), result.err) == (0, str(weights_file), "")


@pytest.mark.parametrize("arguments", [*((name,) for name in COMMANDS), ()])
def test_help_and_nothing_at_all(arguments, splice):
    asked = splice(*arguments, "--help")
    assert (asked.status, asked.err) == (0, "")
    assert asked.out.startswith("usage: splice")
    bare = splice(*arguments)
    assert (bare.status, bare.out, len(bare.complaint)) == (2, "", 1)


def picture_of(width, height):
    return lambda path: Image.new("RGB", (width, height), "red").save(path)


def truncated(path):
    Image.effect_noise((90, 90), 50).save(path)
    path.write_bytes(path.read_bytes()[:2000])


def torn(path):
    """The first bytes of a TIFF, over which Pillow warns before it gives up."""
    Image.new("RGB", (90, 90)).save(path, "TIFF")
    path.write_bytes(path.read_bytes()[:16])


BAD_PICTURES = {
    "missing": (lambda path: None, "no picture at"),
    "torn": (torn, "other.png"),
    "truncated": (truncated, "damaged"),
    "text": (lambda path: path.write_text("no picture"), "not a picture"),
    "empty": (lambda path: path.touch(), "not a picture"),
    "folder": (lambda path: path.mkdir(), "no picture at"),
    "one pixel": (picture_of(1, 1), "1x1 pixels"),
    "too small": (picture_of(63, 200), "at least 64"),
    "very wide": (picture_of(30_000, 10), "30000x10 pixels"),
    "too narrow": (picture_of(64, 600), "8 times"),
}


def refused(result, files, before, *parts, status=2):
    """One line, an exit status, and nothing left behind."""
    assert result.status == status
    assert result.out == ""
    assert "Traceback" not in result.err
    assert len(result.complaint) == 1, result.err
    assert result.complaint[0].startswith("splice")
    for part in parts:
        assert part in result.complaint[0]
    assert tree(files.root) == before


@pytest.mark.parametrize("place", ["structure", "appearance", "apply", "measure", "instant", *ANALYSES])
@pytest.mark.parametrize("kind", BAD_PICTURES)
def test_bad_pictures(kind, place, splice, transfer, analyse, files):
    write, message = BAD_PICTURES[kind]
    write(files.other)
    Generator().save(files.generator)
    before = tree(files.root)
    if place == "apply":
        result = splice("apply", files.generator, files.other, "-o", files.result, "--device", "cpu")
    elif place == "measure":
        result = splice("measure", files.structure, files.appearance, files.other, *VIT)
    elif place == "instant":
        result = splice("instant", files.structure, files.other, "-o", files.result, *VIT)
    elif place in ANALYSES:
        result = analyse(place, picture=files.other)
    else:
        result = transfer("--steps", 1, **{place: files.other})
    refused(result, files, before, message)


BAD_OPTIONS = {
    "unknown backbone": (("--backbone", "dino_vitb9"), ("unknown backbone 'dino_vitb9'", "dino_vitb8")),
    "missing checkpoint": (("--backbone", "nowhere/dino.pth"), ("no weights file at nowhere/dino.pth",)),
    "no steps": (("--steps", "0"), ("steps must be at least 1, not 0",)),
    "negative steps": (("--steps", "-3"), ("steps", "-3")),
    "broken steps": (("--steps", "2.5"), ("--steps", "2.5")),
    "steps in words": (("--steps", "many"), ("--steps", "many")),
    "small size": (("--size", "63"), ("size must be at least 64",)),
    "size in words": (("--size", "large"), ("--size", "large")),
    "negative seed": (("--seed", "-1"), ("seed",)),
    "huge seed": (("--seed", "99999999999999999999"), ("seed",)),
    "NaN": (("--learning-rate", "nan"), ("learning_rate",)),
    "infinity": (("--learning-rate", "inf"), ("learning_rate",)),
    "huge learning rate": (("--learning-rate", "1e30"), ("learning_rate must be from 0 to 1",)),
    "huge weight": (("--appearance-weight", "1e300", "--steps", "3"), ("diverged", "learning rate")),
    "Adam's beta": (("--beta2", "1"), ("beta2",)),
    "no such block": (("--layer", "12"), ("12 blocks", "layer must be from -12 to 11, not 12")),
    "no term": (("--appearance-weight=0", "--structure-weight=0", "--identity-weight=0"), ("no term",)),
    "absent device": (("--device", "cuda:7"), ("no device 'cuda:7'", "cpu")),
    "nonsense device": (("--device", "nonsense"), ("no device 'nonsense'",)),
    "unknown precision": (("--dtype", "int8"), ("int8",)),
    "unknown preset": (("--preset", "papre"), ("papre", *PRESETS)),
    "unknown option": (("--stpes", "3"), ("--stpes",)),
    "never": (("--every", "0"), ("--every", "at least 1")),
    "log in a missing folder": (("--log", "{root}/none/log.jsonl"), ("no folder",)),
    "log is a folder": (("--log", "{root}/out"), ("it is a folder",)),
    "strip of no format": (("--strip", "{root}/out/strip.txt"), ("'.txt' is no picture format",)),
    "strip over the result": (("--strip", "{root}/out/result.png"), ("result.png",)),
    "start from nothing": (("--start", "{root}/none.safetensors"), ("no generator at",)),
    "start from a picture": (("--start", "{root}/in/structure.png"), ("cannot be read as a generator",)),
    "generator in a missing folder": (("--save-generator", "{root}/none/g.safetensors"), ("no folder",)),
}


@pytest.mark.parametrize("options", BAD_OPTIONS)
def test_bad_options(options, transfer, files):
    extra, parts = BAD_OPTIONS[options]
    before = tree(files.root)
    result = transfer("--steps", 1, *(option.format(root=files.root) for option in extra))
    refused(result, files, before, *parts)


BAD_CHECKPOINTS = {
    "a generator": ("wrong.safetensors", lambda path: Generator().save(path), "is a generator of Splice"),
    "other tensors": ("wrong.pth", lambda path: torch.save({"a": torch.zeros(3)}, path), "is something else"),
    "under a known name": (
        "dino_vits16.safetensors",
        lambda path: save_file({"cls_token": torch.zeros(1, 1, 384)}, path),
        "not the weights of a DINO",
    ),
    "text": ("wrong.safetensors", lambda path: path.write_text("no weights"), "cannot be read as weights"),
    "a page": ("wrong.pth", lambda path: path.write_text("<html>\n</html>"), "is a web page"),
    "a pickle": ("wrong.pth", lambda path: path.write_bytes(pickle.dumps({"a": Generator})), "never run"),
    "a picture": ("wrong.png", picture_of(64, 64), "wrong.png"),
}


@pytest.mark.parametrize("kind", BAD_CHECKPOINTS)
def test_bad_checkpoints(kind, transfer, files):
    name, write, message = BAD_CHECKPOINTS[kind]
    path = files.root / "in" / name
    write(path)
    before = tree(files.root)
    refused(transfer("--steps", 1, "--backbone", path), files, before, message)


@pytest.mark.parametrize("command", ["transfer", "apply", "instant", *ANALYSES])
@pytest.mark.parametrize(
    ("output", "part"),
    [
        ("none/result.png", "no folder"),
        ("out/result.xyz", "'.xyz' is no picture format"),
        ("out/result", "'' is no picture format"),
        ("out/folder.png", "it is a folder"),
        ("out/there.png", "there already"),
        ("in/structure.png", "there already"),
        ("in/structure.png/result.png", "no folder"),
        (f"out/{'long' * 80}.png", "the name is too long"),
    ],
)
def test_bad_outputs(output, part, command, write_to, files):
    (files.root / "out" / "folder.png").mkdir()
    (files.root / "out" / "there.png").write_bytes(b"precious")
    Generator().save(files.generator)
    before = tree(files.root)
    path = files.root / output
    refused(write_to(command, path), files, before, part, str(path))


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("apply", "{root}/none.safetensors", "{root}/in/structure.png", "-o", "{root}/out/a.png"), "no generator"),
        (("apply", "{root}/in/structure.png", "{root}/in/structure.png", "-o", "{root}/out/a.png"), "generator"),
        (("weights", "get", "dino_vitb9"), "dino_vitb8"),
        (("weights", "where", "dino_vitb9"), "dino_vitb8"),
        (("weights", "where", "dinov3_vith16plus"), "`splice weights get dinov3_vith16plus`"),
        (("weights", "fetch"), "fetch"),
        (("demo", "-o", "{root}/in/structure.png"), "structure.png"),
        (("instant", "a.png", "b.png", "-o", "c.png", "--texture", "2"), "from 0 to 1"),
        (("instant", "a.png", "b.png", "-o", "c.png", "--match-passes", "0"), "match_passes must be from 1 to 8"),
        (("curves", "{root}/none.jsonl", "-o", "{root}/out/a.png"), "cannot read {root}/none.jsonl"),
        (("curves", "{root}/in/structure.png", "-o", "{root}/out/a.png"), "it is not text"),
        (("unknown",), "unknown"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value[:2]).replace("{root}/", ""),
)
def test_other_bad_command_lines(arguments, part, splice, files):
    before = tree(files.root)
    refused(splice(*(word.format(root=files.root) for word in arguments)), files, before, part.format(root=files.root))


BAD_ANALYSES = {
    "a point outside": ("similarity", ("--point", 90, 3), "outside of the picture, which is 88x72 pixels"),
    "a negative point": ("similarity", ("--point", -1, 0), "outside of the picture"),
    "no point": ("similarity", ("--point", "nan", 0), "outside of the picture"),
    "point and mask": ("similarity", ("--mask", "mask.png"), "not allowed with"),
    "a mask that selects nothing": ("similarity", ("--mask", "{root}/in/black.png"), "selects nothing"),
    "log over the result": ("invert", ("--log", "{root}/out/result.png"), "named for two outputs"),
    "mask over the result": ("similarity", ("--mask-out", "{root}/out/result.png"), "named for two outputs"),
    "mask of no format": ("attention", ("--mask-out", "{root}/out/mask.txt"), "'.txt' is no picture format"),
    "no such head": ("attention", ("--head", 6), "6 heads"),
    "no such share": ("attention", ("--mass", 1.5), "at most 1"),
    "no such block": ("attention", ("--layer", 12), "12 blocks"),
    "one block of several": ("pca", ("--layers", 3, 12), "12 blocks"),
    "unknown facet": ("pca", ("--facet", "cls"), "self-similarity"),
    "no size": ("pca", ("--size", 0), "at least 1"),
    "smooth and blocky": ("pca", ("--smooth", "--blocky"), "not allowed with"),
    "block to invert": ("invert", ("--layer", -13), "12 blocks"),
    "facet to invert": ("invert", ("--facet", "query"), "query"),
    "small inversion": ("invert", ("--size", 64), "size must be at least 72"),
    "huge learning rate": ("invert", ("--learning-rate", "1e30", "--steps", 3), "diverged"),
    "log in a missing folder": ("invert", ("--log", "{root}/none/log.jsonl"), "no folder"),
    "one loss only": ("ablate", ("--structure-weight=0", "--identity-weight=0"), "at least two losses"),
}


@pytest.mark.parametrize("kind", BAD_ANALYSES)
def test_bad_options_of_an_analysis(kind, analyse, files):
    command, options, part = BAD_ANALYSES[kind]
    Image.new("L", (30, 30)).save(files.root / "in" / "black.png")
    before = tree(files.root)
    refused(analyse(command, *(str(option).format(root=files.root) for option in options)), files, before, part)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "no loss above 0"),
        ('{"step": 0, "total": 0}\n', "no loss above 0"),
        ('{"step": 0, "total": 1}\nnonsense\n', "line 2"),
        ("[1, 2]\n", "line 1"),
        ('{"total": "x"}\n', "line 1"),
        ('{"total": null}\n', "line 1"),
    ],
)
def test_bad_logs(text, part, splice, files):
    files.log.write_text(text)
    before = tree(files.root)
    refused(splice("curves", files.log, "-o", files.result), files, before, part)


def changes(picture):
    """How many pixels of a row differ from the one before."""
    return int((picture[0, :, 40, 1:] != picture[0, :, 40, :-1]).any(dim=0).sum())


def test_pca(analyse, splice, files):
    result = analyse("pca")
    assert (result.status, result.out.strip(), result.err) == (0, str(files.result), "")
    one = load_picture(files.result)
    assert one.shape[-2:] == SHAPE
    assert one.amax(dim=(2, 3)).min() > 0.9
    analyse("pca", "--blocky", "--overwrite")
    blocks = load_picture(files.result)
    assert not torch.equal(blocks, one)
    analyse("pca", "--blocky", "--density", 2, "--overwrite")
    assert changes(load_picture(files.result)) > 1.5 * changes(blocks)  # twice as many cells
    analyse("pca", "--foreground", "--facet", "token", "--layer", 5, "--overwrite")
    assert (load_picture(files.result) == 0).all(dim=1).float().mean() > 0.1
    several = ("pca", files.structure, files.appearance, "-o", files.result, "--size", 112, *VIT, "--overwrite")
    assert splice(*several, "--layers", 2, -1).status == 0
    width, height = Image.open(files.result).size
    assert height > 2 * 320
    assert width > 3 * 320 * 66 / 80


def test_similarity(analyse, files):
    mask = files.root / "out" / "mask.png"
    result = analyse("similarity", "--mask-out", mask)
    assert (result.status, result.err) == (0, "")
    assert result.out.startswith("best match at 3")
    assert result.out.strip().endswith(f"{files.result}, {mask}")
    assert load_picture(files.result).shape[-2:] == load_picture(mask).shape[-2:] == SHAPE
    share, saved = load_picture(files.result), mask.read_bytes()
    analyse("similarity", "--point", 0.4 * SHAPE[1], 0.3 * SHAPE[0], "--overwrite")  # the last one counts
    assert torch.equal(load_picture(files.result), share)
    assert analyse("similarity", "--mask-out", mask).status == 2
    assert mask.read_bytes() == saved


def test_similarity_with_another_picture_and_a_mask(splice, files):
    area = torch.zeros(1, 3, *SHAPE)
    area[..., 5:30, 28:50] = 1
    save_picture(area, files.other)
    arguments = ("similarity", files.structure, files.appearance, "--mask", files.other, "-o", files.result, *VIT)
    assert splice(*arguments, "--density", 1).status == 0
    assert load_picture(files.result).shape[-2:] == (80, 66)


@pytest.mark.parametrize("half", ["opaque", "white"])
def test_every_command_reads_a_mask_in_one_way(half, splice, files):
    """A cut-out selects what is opaque, as for a transfer."""
    area = torch.zeros(1, 1, *SHAPE)
    area[..., 5:30, 28:50] = 1
    save_picture(area.expand(1, 3, -1, -1), files.other)
    command = ("similarity", files.structure, "-o", files.result, *VIT, "--density", 1, "--mask", files.other)
    assert splice(*command).status == 0
    expected = load_picture(files.result)
    if half == "opaque":
        save_picture(load_picture(files.structure), files.other, area, overwrite=True)
    else:
        save_picture(area.expand(1, 3, -1, -1) * torch.tensor([1.0, 0, 0]).view(3, 1, 1), files.other, overwrite=True)
    assert splice(*command, "--overwrite").status == 0
    assert torch.equal(load_picture(files.result), expected)


def test_attention(analyse, files):
    mask = files.root / "out" / "mask.png"
    assert analyse("attention", "--mask-out", mask).out.strip() == f"{files.result}, {mask}"
    kept, heat = load_picture(mask), load_picture(files.result)
    assert heat.shape[-2:] == SHAPE
    assert kept.unique().tolist() == [0, 1]
    analyse("attention", "--mask-out", mask, "--mass", 0.9, "--head", 2, "--layer", 5, "--overwrite")
    assert load_picture(mask).mean() > kept.mean()
    assert not torch.equal(load_picture(files.result), heat)


def test_invert(analyse, files):
    result = analyse("invert", "--log", files.log, "--steps", 2, "--facet", "key", "--layer", 4)
    assert (result.status, result.err) == (0, "")
    assert load_picture(files.result).shape[-2:] == SHAPE
    lines = [json.loads(line) for line in files.log.read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1]
    assert all(line["key, layer 4"] > 0 for line in lines)
    assert analyse("invert", "--layers", 1, 11, "--overwrite").status == 0
    assert Image.open(files.result).width > 3 * 320


def test_ablate(analyse, files):
    result = analyse("ablate")
    assert (result.status, result.err) == (0, "")
    assert Image.open(files.result).height > 2 * 320


def test_curves(transfer, splice, files):
    transfer("--steps", 4, "--log", files.log)
    result = splice("curves", files.log, "-o", files.strip)
    assert (result.status, result.out.strip(), result.err) == (0, str(files.strip), "")
    assert Image.open(files.strip).size == (960, 540)
    before = files.strip.read_bytes()
    assert splice("curves", files.log, "-o", files.strip).status == 2
    assert files.strip.read_bytes() == before


@pytest.mark.parametrize("command", ["transfer", "instant", "apply", "pca", "similarity", "attention", "invert"])
def test_what_a_format_cannot_hold_is_refused_before_the_work(command, write_to, files, monkeypatch):
    monkeypatch.setitem(images.MOST_PIXELS, ".webp", 80)
    path = files.result.with_suffix(".webp")
    Generator().save(files.generator)
    before = tree(files.root)
    refused(write_to(command, path), files, before, "at most 80 pixels")


def test_transparency_that_a_format_cannot_hold(transfer, files):
    before = tree(files.root)
    result = transfer("--steps", 1, "--keep-alpha", output=files.result.with_suffix(".jpg"))
    refused(result, files, before, "transparency", ".png")


NAMES = ("фото.png", "写真 100% {x}.png", "a b'\".png", "-dash.png")


@pytest.mark.parametrize("encoding", ["cp1252:strict", "ascii", "ascii:strict", "utf-8"])
def test_a_console_of_any_encoding(encoding, process, files):
    """What it cannot print is replaced; the file has its name."""
    output = files.root / "out" / "выход.png"
    shutil.copy(files.structure, files.root / "in" / NAMES[0])
    Generator().save(files.generator)
    given = ("apply", files.generator, files.root / "in" / NAMES[0], "-o", output, "--device", "cpu")
    result = process(*given, env={"PYTHONIOENCODING": encoding}, encoding=encoding.partition(":")[0])
    assert (result.status, result.err) == (0, "")
    assert ("выход" if encoding == "utf-8" else "?????.png") in result.out
    assert load_picture(output).shape[-2:] == SHAPE


def test_help_on_a_console_of_ascii(process):
    result = process("transfer", "--help", env={"PYTHONIOENCODING": "ascii"})
    assert (result.status, result.err) == (0, "")
    assert "mps ?" in result.out


@pytest.mark.parametrize("name", NAMES)
def test_names_of_any_kind(name, analyse, files):
    """As a picture's name it stands on the sheet too."""
    picture, output = files.root / "in" / name, files.root / "out" / name
    shutil.copy(files.structure, picture)
    result = analyse("pca", "--layers", 1, 2, picture=picture, output=output)
    assert (result.status, result.out, result.err) == (0, f"{output}\n", "")
    assert output.is_file()


def test_the_longest_name_that_the_system_has_can_be_written(analyse, files):
    output = files.root / "out" / f"{'n' * 251}.png"
    assert analyse("attention", output=output).status == 0
    assert output.is_file()


def test_a_remark_of_the_engine_is_one_line(analyse, files):
    picture = files.root / "in" / "float.tif"
    Image.linear_gradient("L").convert("F").save(picture)
    result = analyse("attention", picture=picture)
    assert result.status == 0
    assert result.err == f"splice: {picture} has values up to 255 and does not tell which is white: 255 is taken\n"


def test_a_process_says_one_line_too(process, files):
    """Nothing that is imported adds a warning of its own."""
    before = tree(files.root)
    refused(process("transfer", files.other, files.appearance, "-o", files.result), files, before, "no picture at")


@pytest.mark.parametrize(
    ("limit", "extra"),
    [(100, None), (0, None), (100, "log"), (4000, "generator")],
    ids=["at the end", "no temporary folder either", "in the log", "in the generator"],
)
def test_a_full_disk(limit, extra, transfer, limit_file_size, files, monkeypatch):
    """The limit is on the size of a file; the rescue of the picture into the temporary folder meets it too."""
    monkeypatch.setattr(tempfile, "tempdir", str(files.root / "out"))
    before = tree(files.root)
    options = {None: (), "log": ("--log", files.log), "generator": ("--save-generator", files.generator)}
    with limit_file_size(limit):
        result = transfer("--steps", 2, *options[extra])
    assert (result.status, result.out, len(result.err.splitlines())) == (2, "", 1), result.err
    assert result.err.startswith("splice: cannot write")
    left = {path for path in tree(files.root).keys() - before.keys() if path.is_file()}
    assert left <= {files.log, files.result}  # the log of an unfinished run is worth keeping, a picture even more


def test_a_log_that_cannot_be_written(tmp_path):
    """A run does not end for it: the error comes at its end."""
    with pytest.raises(SpliceError, match="cannot write"):
        Log(tmp_path)
    full = Path("/dev/full")
    if full.exists():
        with closing(Log(full)) as log:
            log.write({"step": 0})
            log.write({"step": 1})
        with pytest.raises(SpliceError, match="cannot write /dev/full: the disk is full"):
            log.check(full)


@pytest.mark.parametrize(
    ("error", "known"), [(MemoryError(), True), (RuntimeError("CUDA out of memory"), True), (RuntimeError("?"), False)]
)
def test_out_of_memory(error, known, transfer, during, files):
    def fail():
        raise error

    during(Transfer, 1, fail)
    before = tree(files.root)
    if known:
        refused(transfer("--steps", 2), files, before, "out of memory", "--size")
    else:
        with pytest.raises(RuntimeError, match=r"\?"):
            transfer("--steps", 2)


@pytest.fixture
def during(monkeypatch):
    """Calls an action right after a step, while the run goes on."""

    def arrange(kind, step, action):
        take_steps = kind.__iter__

        def iterate(run):
            for taken in take_steps(run):
                if run.step == step:
                    action()
                yield taken

        monkeypatch.setattr(kind, "__iter__", iterate)

    return arrange


def press_ctrl_c():
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("gone", ["result", "strip", "generator", "everything"])
def test_what_cannot_be_written_any_more_is_rescued_and_the_rest_is_written(gone, transfer, during, files, monkeypatch):
    """Folders go away while the run goes on: a drive is pulled out, a network share lost."""
    rescue = files.root / "rescue"
    rescue.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(rescue))
    places = {name: files.root / name / getattr(files, name).name for name in ("result", "strip", "generator")}
    for path in places.values():
        path.parent.mkdir()
    lost = list(places) if gone == "everything" else [gone]
    during(Transfer, 1, lambda: [shutil.rmtree(places[name].parent) for name in lost])
    writes = ("--strip", places["strip"], "--save-generator", places["generator"], "--log", files.log)
    result = transfer("--steps", 2, *writes, output=places["result"])
    assert (result.status, result.out, len(result.err.splitlines())) == (2, "", 1), result.err
    assert {name for name, path in places.items() if path.is_file()} == places.keys() - set(lost)
    assert len(files.log.read_text().splitlines()) == 2
    saved = [path for path in rescue.rglob("*") if path.is_file()]
    assert len(saved) == len(lost)
    for path in saved:
        assert f"safe in {path}" in result.err
        assert load_picture(path).numel() if path.suffix == ".png" else Generator.load(path)
    for name, path in places.items():
        assert (f"cannot write {path}" in result.err) == (name in lost)
        assert (str(path) in result.err.partition("(written: ")[2]) == (name not in lost)


def test_a_mask_is_written_although_its_picture_cannot_be(analyse, files, monkeypatch):
    mask, heat = files.root / "mask.png", heatmaps.SimilarityMap.mask

    def lose(*arguments):
        shutil.rmtree(files.result.parent, ignore_errors=True)
        return heat(*arguments)

    monkeypatch.setattr(heatmaps.SimilarityMap, "mask", lose)
    result = analyse("similarity", "--mask-out", mask)
    assert (result.status, result.out, len(result.err.splitlines())) == (2, "", 1), result.err
    assert load_picture(mask).shape[-2:] == SHAPE


def lack_memory(*_arguments):
    raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 3221225472 bytes.")


@pytest.mark.parametrize("kept", [True, False])
def test_a_training_survives_a_lack_of_memory_for_the_last_rendering(kept, transfer, files, monkeypatch):
    monkeypatch.setattr(Transfer, "image", lack_memory)
    result = transfer("--steps", 2, *(("--save-generator", files.generator) if kept else ()))
    *tries, last = result.err.splitlines()
    assert (result.status, result.out, len(tries)) == (2, "", 3), result.err
    assert "out of memory for the result: shrink the structure picture" in last
    assert (str(files.generator) if kept else "--save-generator") in last
    assert files.generator.exists() == kept


def test_a_lack_of_memory_for_an_intermediate_picture_does_not_end_a_run(transfer, files, monkeypatch):
    image = Transfer.image
    monkeypatch.setattr(Transfer, "image", lambda run: lack_memory() if run.steps_left else image(run))
    result = transfer("--steps", 3, "--every", 1)
    assert (result.status, len(result.err.splitlines())) == (0, 1)
    assert files.result.is_file()


def test_a_failed_intermediate_picture_does_not_end_a_run(transfer, during, files):
    """It is said once, and no further one is tried."""
    blocked = files.result.with_stem("result-00001")
    during(Transfer, 1, blocked.mkdir)
    result = transfer("--steps", 3, "--every", 1)
    assert result.status == 0
    assert result.out.startswith("3 steps in ")
    assert (len(result.err.splitlines()), str(blocked) in result.err) == (1, True)
    assert files.result.is_file()
    assert not files.result.with_stem("result-00002").exists()


@pytest.mark.parametrize("command", ["transfer", "invert", "ablate"])
def test_ctrl_c_keeps_the_picture_so_far(command, transfer, analyse, during, files):
    during(Inversion if command == "invert" else Transfer, 2, press_ctrl_c)
    if command == "transfer":
        result = transfer("--steps", 9)
    else:
        result = analyse(command, "--steps", 9, *(("--layers", 3, 11) if command == "invert" else ()))
    steps = {"transfer": 9, "invert": 2 * 9, "ablate": 4 * 9}[command]
    assert (result.status, result.err) == (130, "")
    assert result.out.startswith(f"interrupted after 2 of {steps} steps")
    assert str(files.result) in result.out
    assert load_picture(files.result).shape[1] == 3


def test_a_second_ctrl_c_stops_at_once(transfer, during, files):
    def press_twice():
        press_ctrl_c()
        press_ctrl_c()

    during(Transfer, 1, press_twice)
    before, handler = tree(files.root), signal.getsignal(signal.SIGINT)
    refused(transfer("--steps", 9), files, before, "interrupted before there was a picture", status=130)
    assert signal.getsignal(signal.SIGINT) is handler


def test_the_progress_bar_counts_the_steps_left(splice, files):
    command = ("transfer", files.structure, files.appearance, "-o", files.result)
    result = splice(*command, *(word for word in TRAINING if word != "--quiet"), "--steps", 2)
    assert result.status == 0
    assert "2/2" in result.err
    assert "total=" in result.err


def wait_for(condition, child):
    deadline = time.monotonic() + 240
    while not condition():
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no interrupt to one process alone")
def test_ctrl_c_keeps_what_a_process_has_learnt(start, files):
    third = files.result.with_stem("result-00003")
    writes = ("--every", 3, "--log", files.log, "--strip", files.strip, "--save-generator", files.generator)
    command = ("transfer", files.structure, files.appearance, "-o", files.result, *TRAINING, "--steps", 100_000)
    with start(*command, *writes) as child:
        try:
            wait_for(third.exists, child)
            logged = files.log.read_text().splitlines()
            child.send_signal(signal.SIGINT)
            out, err = child.communicate(timeout=120)
        finally:
            child.kill()
    assert (child.returncode, err) == (130, "")
    lines = files.log.read_text().splitlines()
    assert out.startswith(f"interrupted after {len(lines)} of 100000 steps")
    assert str(files.result) in out
    assert load_picture(files.result).shape[-2:] == SHAPE
    assert files.strip.is_file()
    assert Generator.load(files.generator).metadata["backbone"] == OFFLINE_BACKBONE
    assert [path.name for path in files.result.parent.iterdir() if path.name.startswith(".")] == []
    assert len(logged) >= 3, "the log lags behind the run"
