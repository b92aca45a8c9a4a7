"""Clips: read, written, transferred and measured, a frame at a time."""

import json
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from splice_engine import (
    OFFLINE_BACKBONE,
    ClipTransfer,
    InstantClip,
    InstantSettings,
    InstantTransfer,
    SpliceError,
    choose_key_frames,
    load_picture,
    measure_flicker,
    open_clip,
    preset,
    save_picture,
)
from splice_engine.clip_writer import write_clip
from splice_engine.images import resize
from splice_engine.matching import carried
from splice_engine.matching.flow import consistent, optical_flow, warp

av = pytest.importorskip("av")
pytest.importorskip("cv2")

pytestmark = pytest.mark.usefixtures("coarse_matching")

VIT = ("--backbone", OFFLINE_BACKBONE, "--device", "cpu", "--dtype", "fp32")
QUICK = ("--preset", "draft", "--steps", 1, "--warm-steps", 1, "--size", 72, "--vit-size", 56, "--density", 1)
TRAINING = (*VIT, *QUICK, "--key-frames", 2, "--quiet")
TINY = preset("draft", steps=2, warm_steps=2, size=72, vit_size=56, density=1)


def draw(index, size=(80, 112), rng_seed=0):
    """A picture that moves two pixels to the left from frame to frame: `[1, 3, H, W]`."""
    rng = torch.Generator().manual_seed(rng_seed)
    grey = torch.rand(1, 1, size[0] // 8, size[1] // 4, generator=rng)
    wide = resize(0.8 * grey + 0.2 * torch.rand(1, 3, *grey.shape[-2:], generator=rng), (size[0], 2 * size[1]))
    return wide[..., 2 * index : 2 * index + size[1]].contiguous()


def to_bytes(picture):
    return (picture[0] * 255).round().byte().permute(1, 2, 0).contiguous().numpy()


def make_video(path, pictures, times=None, sound=None, options=None):
    """A video of some pictures, shown at some times in units of 1/24 s, with the sound of a codec."""
    with av.open(str(path), "w", options=options or {}) as container:
        video = container.add_stream("libx264", rate=24, options={"crf": "4"})
        video.height, video.width = pictures[0].shape[-2:]
        video.pix_fmt = "yuv420p" if all(side % 2 == 0 for side in pictures[0].shape[-2:]) else "yuv444p"
        if sound:
            track = container.add_stream(sound, rate=48_000, layout="mono")
        for index, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(to_bytes(picture))
            frame.pts, frame.time_base = times[index] if times else index, Fraction(1, 24)
            container.mux(video.encode(frame))
            if sound:
                phase = (np.arange(2000) + 2000 * index) * (440 * 2 * np.pi / 48_000)
                wave = (np.sin(phase) * 8000).astype(np.int16)[None]
                samples = av.AudioFrame.from_ndarray(wave, "s16", "mono")
                samples.sample_rate, samples.pts = 48_000, 2000 * index
                container.mux(track.encode(samples))
        container.mux(video.encode())
        if sound:
            container.mux(track.encode())
    return path


def make_folder(path, pictures, name="frame{}.png"):
    path.mkdir()
    for index, picture in enumerate(pictures):
        save_picture(picture, path / name.format(index))
    return path


def read_sound(path):
    with av.open(str(path)) as container:
        return [
            (round(float(packet.pts * packet.time_base), 3), bytes(packet))
            for packet in container.demux(container.streams.audio)
            if packet.size
        ]


def files_in(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def appearance(tmp_path):
    save_picture(draw(0, (72, 72), rng_seed=7), tmp_path / "B.png")
    return tmp_path / "B.png"


def test_frames_of_a_folder_are_in_the_order_of_their_numbers(tmp_path):
    folder = make_folder(tmp_path / "frames", [draw(index) for index in range(11)])
    (folder / ".DS_Store").write_bytes(b"x")
    clip = open_clip(folder)
    assert [frame.name for frame in clip] == [f"frame{index}" for index in range(11)]
    assert (len(clip), clip.size) == (11, (80, 112))
    assert torch.allclose(next(iter(clip)).picture, draw(0), atol=1 / 255)


@pytest.mark.parametrize("ending", [".mp4", ".mov", ".mkv"])
@pytest.mark.parametrize("times", [None, [0, 1, 4, 5, 9, 30, 31, 40]], ids=["constant", "variable"])
def test_a_video_keeps_its_frames_times_and_sound(ending, times, tmp_path):
    source = open_clip(make_video(tmp_path / f"a{ending}", [draw(index) for index in range(8)], times, "aac"))
    frames = list(source)
    target = tmp_path / f"b{ending}"
    with write_clip(target, source) as write:
        for frame in source:
            write(1 - frame.picture, frame)
    written = list(open_clip(target))
    expected = [Fraction(time, 24) for time in times or range(8)]
    for clip in (frames, written):
        first = clip[0].time
        assert [float(frame.time - first) for frame in clip] == pytest.approx([float(t) for t in expected], abs=2e-3)
    for index, (ours, theirs) in enumerate(zip(frames, written, strict=True)):
        assert (ours.picture - draw(index)).abs().mean() < 0.02
        assert (1 - ours.picture - theirs.picture).abs().mean() < 0.03
    before, after = read_sound(source.path), read_sound(target)
    assert [data for _, data in before] == [data for _, data in after]
    shift = float(written[0].time - frames[0].time)
    assert [time for time, _ in after] == pytest.approx([time + shift for time, _ in before], abs=5e-3)
    assert list(tmp_path.glob(".splice-*")) == []


def test_a_video_is_left_at_any_frame(tmp_path):
    """Also where PyAV passes FFmpeg's log on to Python, as some versions of torchvision have it do."""
    make_video(tmp_path / "a.mp4", [draw(index) for index in range(8)])
    script = """
import av
from pathlib import Path
from splice_engine import open_clip
av.logging.set_level(av.logging.DEBUG)
for count in range(40):
    for index, frame in enumerate(open_clip(Path("a.mp4"))):
        if index == count % 8:
            break
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=120)


def test_a_video_of_odd_sides_gains_a_row_and_a_column(tmp_path):
    source = open_clip(make_video(tmp_path / "a.mkv", [draw(index, (81, 113)) for index in range(3)]))
    assert source.size == (81, 113)
    with write_clip(tmp_path / "b.mp4", source) as write:
        for frame in source:
            write(frame.picture, frame)
    written = next(iter(open_clip(tmp_path / "b.mp4"))).picture
    assert written.shape[-2:] == (82, 114)
    assert (written[..., :81, :113] - next(iter(source)).picture).abs().mean() < 0.02


def test_a_clip_that_is_not_finished_leaves_nothing(tmp_path):
    source = open_clip(make_folder(tmp_path / "frames", [draw(0), draw(1)]))
    before = files_in(tmp_path)
    for name in ("b.mp4", "folder"):
        with suppress(KeyboardInterrupt), write_clip(tmp_path / name, source) as write:
            write(draw(0), next(iter(source)))
            raise KeyboardInterrupt
    assert files_in(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} == {"frames"}


def test_flow_follows_what_moves():
    here, there = draw(0), draw(2)
    flow, back = optical_flow(here, there), optical_flow(there, here)
    inside = (..., slice(8, -8), slice(16, -16))
    assert (flow[:, :1][inside] + 4).abs().mean() < 0.2
    assert flow[:, 1:][inside].abs().mean() < 0.2
    assert (warp(there, flow) - here)[inside].abs().mean() < 0.01
    mask = consistent(flow, back)
    assert mask[inside].float().mean() > 0.95
    assert not mask[..., :3].any()  # what has left the frame


def test_flicker_is_told_from_motion():
    rng = torch.Generator().manual_seed(0)
    moving = [draw(index) for index in range(4)]
    noisy = [(picture + 0.1 * torch.randn(picture.shape, generator=rng)).clamp(0, 1) for picture in moving]
    steady = measure_flicker(zip(moving, (1 - picture for picture in moving), strict=True))
    flickers = measure_flicker(zip(moving, noisy, strict=True))
    still = measure_flicker([(moving[0], moving[0])] * 2)
    assert steady.warping_error == pytest.approx(steady.source_warping_error, rel=1e-4)
    assert steady.warping_error < 1e-3 < 0.01 < flickers.warping_error < 0.03
    assert steady.flickering < 0.96
    assert (still.flickering, still.source_flickering, still.frames) == (1, 1, 2)
    assert still.warping_error < 1e-9
    assert still.consistent == 1


@pytest.mark.parametrize(
    ("frames", "part"),
    [
        ([], "there is none"),
        ([(draw(0), draw(0))], "there is one"),
        ([(draw(0), draw(0)), (draw(0, (64, 64)), draw(0, (64, 64)))], "64x64"),
    ],
    ids=["none", "one", "sizes"],
)
def test_what_flicker_cannot_be_measured_of(frames, part):
    with pytest.raises(SpliceError, match=part):
        measure_flicker(frames)


def test_key_frames_show_what_others_do_not(backbone, pair):
    a, b = (resize(picture, (112, 140)) for picture in pair)
    assert choose_key_frames([a, a, b, b], backbone, 4) in ([0, 2], [1, 2], [0, 3], [1, 3])
    assert len(choose_key_frames([a, b], backbone, 1)) == 1
    assert choose_key_frames([a, a, a], backbone, 3) == [0]


def test_one_generator_makes_all_frames(tiny):
    frames = [draw(index) for index in (0, 12)]
    run = ClipTransfer(frames, draw(0, (72, 72), rng_seed=7), tiny(), TINY)
    assert [step.index for step in run] == list(range(10))  # two of warm start for each of four, then two
    other = draw(5)
    result = run.apply(other)
    assert torch.equal(run.apply(frames[0]), run.image())
    run.end("cpu")
    assert torch.equal(run.apply(other), result)
    assert torch.equal(run.apply(other, torch.zeros(1, 1, 8, 8)), other)
    half = torch.zeros(1, 1, 80, 112)
    half[..., :40] = 1
    masked = run.apply(other, half)
    assert torch.equal(masked[..., 60:], other[..., 60:])
    assert torch.equal(masked[..., :40], result[..., :40])


def test_all_key_frames_are_trained_on(tiny):
    seen = []

    class Watched(ClipTransfer):
        def __iter__(self):
            for step in super().__iter__():
                phase = self._warm_start if self.step <= self.settings.warm_steps else self._splicing
                seen.append(phase.pair.structure)
                yield step

    frames = [draw(index) for index in (0, 6, 12, 18, 24)]
    run = Watched(frames, draw(0, (72, 72), rng_seed=7), tiny(), TINY)
    assert len(list(run)) == 12
    small = [resize(frame, seen[0].shape[-2:]) for frame in frames]
    order = [next(i for i, frame in enumerate(small) if torch.allclose(frame, picture)) for picture in seen]
    assert order == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]


def test_a_clip_from_the_command_line(splice, tmp_path, appearance):
    """Of a folder with a mask for each frame; the generator that is kept makes the same pictures."""
    frames = make_folder(tmp_path / "frames", [draw(index) for index in range(4)])
    full, empty = torch.ones(1, 3, 8, 8), torch.zeros(1, 3, 8, 8)
    masks = make_folder(tmp_path / "masks", [empty, full, full, full])
    generator = tmp_path / "g.safetensors"
    arguments = (frames, appearance, "-o", tmp_path / "out", "--structure-mask", masks, "--save-generator", generator)
    result = splice("clip", *arguments, *TRAINING)
    assert (result.status, result.err) == (0, "")
    assert str(tmp_path / "out") in result.out
    assert str(generator) in result.out
    made = {path.name: load_picture(path) for path in (tmp_path / "out").iterdir()}
    assert sorted(made) == [f"frame{index}.png" for index in range(4)]
    assert torch.equal(made["frame0.png"], load_picture(frames / "frame0.png"))
    applied = splice("apply", generator, frames / "frame2.png", "-o", tmp_path / "c.png", "--device", "cpu")
    assert applied.status == 0
    assert torch.equal(load_picture(tmp_path / "c.png"), made["frame2.png"])
    measured = splice("flicker", frames, tmp_path / "out", "--json", "--quiet")
    assert measured.status == 0
    assert json.loads(measured.out)["frames"] == 4
    again = splice("clip", *arguments, *TRAINING)
    assert again.status == 2
    assert "files in it" in again.err


def test_a_video_from_the_command_line(splice, tmp_path, appearance):
    video = make_video(tmp_path / "a.mp4", [draw(index) for index in range(4)], sound="aac")
    result = splice("clip", video, appearance, "-o", tmp_path / "out.mp4", *TRAINING)
    assert (result.status, result.err) == (0, "")
    written = open_clip(tmp_path / "out.mp4")
    assert (len(written), written.size) == (4, (80, 112))
    assert [data for _, data in read_sound(video)] == [data for _, data in read_sound(tmp_path / "out.mp4")]


def cut(path, share=0.6):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


FRAMES = [draw(index) for index in range(12)]

BAD_CLIPS = {
    "missing": (lambda folder: folder / "none.mp4", "no video or folder of frames at"),
    "no video": (lambda folder: Path(__file__), "cannot be read as a video"),
    "index lost": (lambda folder: cut(make_video(folder / "a.mp4", FRAMES)), "cannot be read as a video"),
    "ends in the middle": (
        lambda folder: cut(make_video(folder / "a.mp4", FRAMES, options={"movflags": "faststart"})),
        "ends in the middle",
    ),
    "ends in the middle of Matroska": (
        lambda folder: cut(make_video(folder / "a.mkv", FRAMES), 0.97),
        "ends in the middle",
    ),
    "one frame": (lambda folder: make_video(folder / "a.mp4", FRAMES[:1]), "one"),
    "one picture": (lambda folder: make_folder(folder / "frames", FRAMES[:1]), "one"),
    "empty folder": (lambda folder: make_folder(folder / "frames", []), "no pictures in"),
    "several sizes": (
        lambda folder: make_folder(folder / "frames", [*FRAMES[:2], draw(0, (64, 64))]),
        "is 64x64 pixels and frame0.png is 112x80",
    ),
    "other files": (lambda folder: (make_folder(folder / "frames", FRAMES[:2]) / "notes.txt").write_text("x"), "notes"),
    "a damaged picture": (lambda folder: cut(make_folder(folder / "frames", FRAMES[:2]) / "frame1.png"), "is damaged"),
    "too small": (lambda folder: make_video(folder / "a.mp4", [draw(0, (48, 64))] * 2), "enlarge"),
}


@pytest.mark.parametrize("command", ["clip", "flicker"])
@pytest.mark.parametrize("case", BAD_CLIPS)
def test_bad_clips(case, command, splice, tmp_path, appearance):
    make, part = BAD_CLIPS[case]
    place = tmp_path / "in"
    place.mkdir()
    made = make(place)
    path = made if isinstance(made, Path) and made.parent != place / "frames" else place / "frames"
    before = files_in(tmp_path)
    if command == "clip":
        result = splice("clip", path, appearance, "-o", tmp_path / "out.mp4", *TRAINING)
    else:
        result = splice("flicker", path, path, "--quiet")
    assert result.status == 2
    assert len(result.complaint) == 1, result.err
    assert part in result.err
    assert files_in(tmp_path) == before


BAD_OUTPUTS = {
    "another format": ("out.avi", (), "end the name in one of .mp4"),
    "there already": ("there.mp4", (), "there already"),
    "no folder": ("none/out.mp4", (), "no folder"),
    "sound that does not fit": ("out.mp4", ("sound",), "end the name in .mkv"),
    "too few masks": ("out.mp4", ("--structure-mask", "two"), "has 2 masks for 4 frames"),
    "empty masks": ("out.mp4", ("--structure-mask", "empty"), "selects nothing in any frame"),
    "no masks": ("out.mp4", ("--structure-mask", "none"), "no video or folder of frames"),
    "key frames": ("out.mp4", ("--key-frames", "0"), "key_frames must be from 1"),
}


@pytest.mark.parametrize("case", BAD_OUTPUTS)
def test_bad_outputs_and_masks(case, splice, tmp_path, appearance):
    name, options, part = BAD_OUTPUTS[case]
    sound, options = ("tta", ()) if options == ("sound",) else (None, options)
    video = make_video(tmp_path / "a.mkv", FRAMES[:4], sound=sound)
    make_folder(tmp_path / "two", [torch.ones(1, 3, 8, 8)] * 2)
    make_folder(tmp_path / "empty", [torch.zeros(1, 3, 8, 8)] * 4)
    (tmp_path / "there.mp4").write_bytes(b"precious")
    before = files_in(tmp_path)
    words = [tmp_path / word if word in ("two", "empty", "none") else word for word in options]
    result = splice("clip", video, appearance, "-o", tmp_path / name, *TRAINING, *words)
    assert result.status == 2
    assert len(result.complaint) == 1, result.err
    assert part in result.err
    assert files_in(tmp_path) == before


@pytest.mark.parametrize(("module", "package"), [("av", "av"), ("cv2", "opencv-python-headless")])
def test_a_missing_package_is_named(module, package, splice, tmp_path, appearance, monkeypatch):
    video = make_video(tmp_path / "a.mp4", FRAMES[:2])
    monkeypatch.setitem(sys.modules, module, None)
    result = splice("flicker", video, video, "--quiet")
    assert result.status == 2
    assert len(result.complaint) == 1
    assert f"pip install {package}`" in result.err


def test_a_picture_is_one_mask_for_all_frames(splice, tmp_path, appearance):
    frames = make_folder(tmp_path / "frames", FRAMES[:2])
    mask = np.zeros((80, 112), np.uint8)
    mask[:, :30] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    splice("clip", frames, appearance, "-o", tmp_path / "out", "--structure-mask", tmp_path / "mask.png", *TRAINING)
    for index in range(2):
        a, b = (load_picture(folder / f"frame{index}.png") for folder in (frames, tmp_path / "out"))
        assert torch.equal(a[..., 50:], b[..., 50:])
        assert not torch.equal(a[..., :30], b[..., :30])


INSTANT = InstantSettings(density=1)


@pytest.fixture
def picture():
    return draw(0, (72, 72), rng_seed=7)


def test_an_instant_clip_moves_as_its_frames_do(picture, tiny):
    frames = [draw(index) for index in range(6)]
    vit = tiny()
    clip = InstantClip(picture, vit, INSTANT)
    moved = [clip.apply(frame) for frame in frames]
    single = [InstantTransfer.between(frame, picture, vit, INSTANT).image() for frame in frames]
    assert torch.allclose(moved[0], single[0], atol=0.05)
    errors = [measure_flicker(zip(frames, results, strict=True)).warping_error for results in (moved, single)]
    assert errors[0] < 0.25 * errors[1]
    contrast = [picture.std().item() for picture in (moved[-1], moved[0])]
    assert contrast[0] > 0.8 * contrast[1]  # it does not fade


def test_an_instant_clip_matches_a_new_scene_anew(picture, tiny):
    vit = tiny()
    clip, fresh = (InstantClip(picture, vit, INSTANT) for _ in range(2))
    clip.apply(draw(0))
    scene = draw(0, rng_seed=3)
    assert torch.equal(clip.apply(scene), fresh.apply(scene))


def test_an_instant_clip_matches_what_has_come_into_view(picture, tiny, monkeypatch):
    frames = [draw(index) for index in range(12)]  # of 112 columns 22 are new in the last one
    vit = tiny()
    colours = replace(INSTANT, texture=0.0)  # which patch of the same colours is laid there may differ
    fresh = InstantTransfer.between(frames[-1], picture, vit, colours).image()

    def miss():
        clip = InstantClip(picture, vit, colours)
        last = [clip.apply(frame) for frame in frames][-1]
        return (last - fresh)[..., -20:].abs().mean()

    matched = miss()
    monkeypatch.setattr(carried, "NEW_SHARE", 1.0)
    assert matched < 0.7 * miss()


def test_an_instant_clip_stays_as_it_is_where_its_mask_is_empty(picture, tiny):
    clip = InstantClip(picture, tiny(), INSTANT)
    frame, mask = draw(0), torch.zeros(1, 1, 80, 112)
    assert torch.equal(clip.apply(frame, mask), frame)
    mask[..., 20:60, 60:] = 1
    result = clip.apply(draw(1), mask)
    assert torch.equal(result[..., :40], draw(1)[..., :40])
    assert not torch.equal(result[..., 30:50, 80:], draw(1)[..., 30:50, 80:])


def test_frames_of_an_instant_clip_have_one_size(picture, tiny):
    clip = InstantClip(picture, tiny(), INSTANT)
    clip.apply(draw(0))
    with pytest.raises(SpliceError, match="of one size"):
        clip.apply(draw(0, (96, 112)))


def test_a_clip_without_training(appearance, tmp_path, splice):
    folder = make_folder(tmp_path / "frames", [draw(index) for index in range(3)])
    words = ("clip", folder, appearance, *VIT, "--instant", "--density", 1, "--match-passes", 1, "--quiet")
    result = splice(*words, "-o", tmp_path / "out")
    assert (result.status, result.err) == (0, "")
    pictures = [load_picture(path) for path in sorted((tmp_path / "out").iterdir())]
    assert len(pictures) == 3
    assert all((made - draw(index)).abs().mean() > 0.05 for index, made in enumerate(pictures))
    refused = splice(*words, "-o", tmp_path / "again", "--save-generator", tmp_path / "g.safetensors")
    assert refused.status == 2
    assert "no generator" in refused.err
    assert not (tmp_path / "again").exists()
