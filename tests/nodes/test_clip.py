"""Clips in a real ComfyUI."""

import numpy as np
import pytest
import torch

from splice_engine import OFFLINE_BACKBONE

av = pytest.importorskip("av")
pytest.importorskip("cv2")

QUICK = {"preset": "draft", "steps": 1, "size": 72, "seed": 0, "key_frames": 2, "backbone_name": OFFLINE_BACKBONE}


def link(name, slot=0):
    return [name, slot]


def clip(count=4):
    rng = torch.Generator().manual_seed(1)
    wide = torch.nn.functional.interpolate(torch.rand(1, 3, 10, 30, generator=rng), (80, 240), mode="bilinear")
    frames = [wide[0, :, :, 2 * index : 2 * index + 112].movedim(0, -1) for index in range(count)]
    return torch.stack(frames).mul(255).round() / 255


def find_changed(pictures, frames):
    """Which pictures differ from their frames."""
    pairs = zip(pictures, frames.mul(255).numpy(), strict=True)
    return [np.abs(picture.astype(int) - frame).max() > 2 for picture, frame in pairs]


def test_a_clip_is_painted_where_its_masks_allow_it_and_measured(host, graph, tensor):
    frames, masks = clip(), torch.ones(4, 9, 9)
    masks[2] = 0
    nodes = {"frames": tensor(frames), "masks": tensor(masks, "TestMask")}
    nodes["flicker"] = {"class_type": "SpliceFlicker", "inputs": {"source": link("frames"), "result": link("it")}}
    nodes["text"] = {"class_type": "PreviewAny", "inputs": {"source": link("flicker", 2)}}
    inputs = {"frames": link("frames"), "appearance": link("b"), "structure_mask": link("masks"), **QUICK}
    outcome = host.run(graph("SpliceClip", nodes, **inputs))
    assert outcome.status == "success", outcome.message
    assert find_changed(host.pictures(outcome, "save"), frames) == [True, True, False, True]


def test_a_clip_is_painted_with_a_share_of_the_texture(host, graph, tensor):
    inputs = {"frames": link("frames"), "appearance": link("b"), **QUICK, "key_frames": 1}
    nodes = {"frames": tensor(clip(2))}
    full, plain = (host.run(graph("SpliceClip", nodes, **inputs, **more)) for more in ({}, {"texture": 0.0}))
    assert full.status == plain.status == "success", full.message or plain.message
    assert not np.array_equal(host.pictures(full, "save")[0], host.pictures(plain, "save")[0])


def test_an_instant_clip_is_painted_where_its_masks_allow_it(host, graph, tensor):
    frames, masks = clip(), torch.ones(4, 9, 9)
    masks[2] = 0
    nodes = {"frames": tensor(frames), "masks": tensor(masks, "TestMask")}
    nodes["vit"] = {
        "class_type": "SpliceLoadBackbone",
        "inputs": {"backbone_name": OFFLINE_BACKBONE, "precision": "fp32"},
    }
    inputs = {"appearance": link("b"), "structure_mask": link("masks"), "backbone": link("vit"), "density": 1}
    outcome = host.run(graph("SpliceInstantClip", nodes, frames=link("frames"), texture=1.0, feather=8.0, **inputs))
    assert outcome.status == "success", outcome.message
    assert find_changed(host.pictures(outcome, "save"), frames) == [True, True, False, True]


def write_video(path, frames):
    """A video with a second of silence for each 24 frames."""
    with av.open(str(path), "w") as container:
        video, sound = container.add_stream("libx264", rate=24), container.add_stream("aac", rate=48_000, layout="mono")
        video.height, video.width, video.pix_fmt = *frames.shape[1:3], "yuv420p"
        for index, frame in enumerate(frames.mul(255).byte().numpy()):
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame)))
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 2000), np.float32), "fltp", "mono")
            samples.sample_rate, samples.pts = 48_000, 2000 * index
            container.mux(sound.encode(samples))
        container.mux(video.encode())
        container.mux(sound.encode())


def test_a_video_goes_through_with_its_sound(host, graph):
    write_video(host.base / "input" / "clip.mp4", clip(6))
    nodes = {
        "video": {"class_type": "LoadVideo", "inputs": {"file": "clip.mp4"}},
        "parts": {"class_type": "GetVideoComponents", "inputs": {"video": link("video")}},
        "made": {
            "class_type": "CreateVideo",
            "inputs": {"images": link("it"), "audio": link("parts", 1), "fps": link("parts", 2)},
        },
        "saved": {
            "class_type": "SaveVideo",
            "inputs": {"video": link("made"), "filename_prefix": "painted", "format": "auto", "codec": "auto"},
        },
    }
    outcome = host.run(graph("SpliceClip", nodes, frames=link("parts"), appearance=link("b"), **QUICK))
    assert outcome.status == "success", outcome.message
    (path,) = (host.base / "output").glob("painted*.mp4")
    with av.open(str(path)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 6
        assert len(container.streams.audio) == 1


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"appearance": link("frames")}, "one appearance picture"),
        ({"structure_mask": link("masks")}, "4 frames need 1 or 4 structure masks, not 3"),
    ],
    ids=["appearances", "masks"],
)
def test_bad_clips_get_one_sentence(given, sentence, host, graph, tensor):
    nodes = {"frames": tensor(clip()), "masks": tensor(torch.ones(3, 9, 9), "TestMask")}
    inputs = {"frames": link("frames"), "appearance": link("b"), **QUICK, **given}
    outcome = host.run(graph("SpliceClip", nodes, **inputs))
    assert outcome.status == "error"
    assert sentence in outcome.message
