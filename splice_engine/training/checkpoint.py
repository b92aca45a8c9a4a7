"""Checkpoints: what a transfer needs to go on after its process has ended, in a file."""

import copy
import hashlib
import io
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import SpliceError
from ..files import write_error
from .pair import Sample
from .terms import FeatureTerm
from .transfer import Transfer

FORMAT = "splice-checkpoint-2"
"""Marks a file as a checkpoint."""

SCHEDULES = {"_warm_start": "cycle", "_splicing": "decay"}
"""The learning rate's schedule of what takes the steps, by the attribute of a run that it is."""

CACHES = ("_structure_cache", "_appearance_cache")
PARTS = ("picture", "target", "residual", "mask")
"""Of a cached crop, besides its features."""


class Checkpoint:
    """The file from which a run goes on.

    On one CPU, a run that goes on gives the bits that it would have given without a break. The file holds the
    generator, its average and the one that the recipe began with, the optimiser, the state of the random numbers and
    the cached crops, and knows the pair, the settings and the backbone.

        checkpoint = Checkpoint(run, "pair.checkpoint")
        if checkpoint.exists:
            checkpoint.restore()
        for step in run:
            if run.step % 100 == 0:
                checkpoint.save()

    Args:
        run: Of which no step has been taken yet.
        path: The file.
    """

    def __init__(self, run: Transfer, path: str | Path) -> None:
        self.run, self.path = run, Path(path)
        self._identity = _identify(run)
        self._part = self.path.with_name(f"{self.path.name}.part")  # one name, so that no kill leaves more than one

    @property
    def exists(self) -> bool:
        """Whether there is a file to go on from."""
        return self.path.is_file()

    def save(self, seconds: float = 0.0) -> None:
        """Writes the run as it is between two steps; the file is replaced whole or not at all.

        Args:
            seconds: That the run has taken; `restore` returns them.

        Raises:
            SpliceError: The file cannot be written.
        """
        content = {"format": FORMAT, "identity": self._identity, "seconds": seconds, "state": _take_state(self.run)}
        try:
            with self._part.open("wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
            self._part.replace(self.path)
        except (OSError, RuntimeError) as error:  # torch's writer raises a RuntimeError on a full disk
            raise write_error(self.path, error) from None

    def restore(self) -> float:
        """Brings the run to where the file was written; returns the seconds that it had taken.

        Raises:
            SpliceError: The file cannot be read, or is of another pair, other settings or another backbone.
        """
        content = _read(self.path)
        self._check_identity(content["identity"])
        self._part.unlink(missing_ok=True)
        _put_state(self.run, content["state"])
        return float(content["seconds"])

    def remove(self) -> None:
        """Removes the file, once what it was for is done."""
        for path in (self.path, self._part):
            path.unlink(missing_ok=True)

    def _check_identity(self, other: Mapping[str, Any]) -> None:
        own = self._identity
        differing = [name for name in own if name != "settings" and own[name] != other.get(name)]
        settings = other.get("settings", {})
        differing += [
            f"setting {name}" for name, value in own["settings"].items() if value != settings.get(name, value)
        ]
        if differing or own["settings"].keys() != settings.keys():
            what = ", ".join(differing) or "version"
            raise SpliceError(
                f"{self.path} is the checkpoint of another run (other {what}): give what that was begun with, or begin "
                "anew without --resume"
            )


def _read(path: Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SpliceError(f"cannot read {path} ({error.strerror}): check the path") from None
    with suppress(Exception):  # a damaged file makes torch raise almost anything
        content: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        if content["format"] == FORMAT:
            return content
    raise SpliceError(f"{path} is no checkpoint: remove it, or name another result")


def _identify(run: Transfer) -> dict[str, Any]:
    """What a checkpoint and its run must have in common."""
    # Norms and biases stand for all weights of the ViT: they are few, and any training changes them.
    small = {name: value for name, value in run.backbone.model.named_parameters() if value.ndim == 1}
    terms = [[name, type(term).__name__, term.weight] for name, term in run.objective.terms.items()]
    return {
        "structure picture": _hash(run.picture),
        "appearance picture": [_hash(picture) for picture in run.appearances],
        "weights": list(run.shares),
        "structure mask": _hash(run.mask),
        "appearance mask": [_hash(mask) for mask in run.appearance_masks],
        "backbone": [run.backbone.name, str(run.backbone.dtype), _hash(*small.values())],
        "objective": terms,
        "generator to start from": _hash(*run._trained.state_dict().values()),
        "settings": asdict(run.settings),
    }


def _hash(*tensors: Tensor | None) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        if tensor is not None:
            array = tensor.detach().float().cpu().contiguous().numpy()
            digest.update(repr(array.shape).encode())
            digest.update(array.tobytes())
    return digest.hexdigest()


def _take_state(run: Transfer) -> dict[str, Any]:
    """All that steps change, as tensors and plain values."""
    reference, name = vars(run).get("_reference"), _phase_name(run)
    phase = vars(run).get(name)  # not there before its first step
    refinement = vars(run).get("refinement")
    return {
        "step": run.step,
        "generator": run._trained.state_dict(),
        "average": None if run._average is None else run._average.state_dict(),
        "refinement": None if refinement is None else refinement.state(),
        "reference": None if reference is None else reference.state_dict(),
        "phase": phase
        and {
            "index": phase.index,
            "optimizer": phase.optimizer.state_dict(),
            "schedule": getattr(phase, SCHEDULES[name]).state_dict(),
            "rng": phase.sampler.rng.get_state(),
        },
        "crops": [
            {index: _to_plain(run, sample) for index, sample in vars(run._sampler)[cache].items()} for cache in CACHES
        ],
    }


def _put_state(run: Transfer, state: Mapping[str, Any]) -> None:
    """Brings a run to a state that `_take_state` gave."""
    run.step = state["step"]
    run._trained.load_state_dict(state["generator"])
    if run._average is not None:
        run._average.load_state_dict(state["average"])
    if state["refinement"] is not None:
        run.refinement.restore(state["refinement"])
    if state["reference"] is not None:
        reference = vars(run)["_reference"] = copy.deepcopy(run._trained)
        reference.load_state_dict(state["reference"])
    if state["phase"] is not None:
        name = _phase_name(run)
        phase = getattr(run, name)
        phase.index = state["phase"]["index"]
        phase.optimizer.load_state_dict(state["phase"]["optimizer"])
        getattr(phase, SCHEDULES[name]).load_state_dict(state["phase"]["schedule"])
        phase.sampler.rng.set_state(state["phase"]["rng"])
    for cache, crops in zip(CACHES, state["crops"], strict=True):
        vars(run._sampler)[cache] = {index: _from_plain(run, values) for index, values in crops.items()}


def _phase_name(run: Transfer) -> str:
    """The attribute of a run with what takes its next step, once refinement is over."""
    return "_warm_start" if run.step < run.settings.steps_before else "_splicing"


def _to_plain(run: Transfer, sample: Sample) -> dict[str, Any]:
    names = {term: name for name, term in run.objective.terms.items()}
    features = [[picture, names[term], value] for (picture, term), value in sample.features.items()]
    return {**{name: getattr(sample, name) for name in PARTS}, "features": features}


def _from_plain(run: Transfer, values: Mapping[str, Any]) -> Sample:
    def move(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.to(run.device)

    target, residual, mask = (move(values[name]) for name in PARTS[1:])
    sample = Sample(values["picture"].to(run.device), target, residual, mask)
    for picture, name, value in values["features"]:
        term = run.objective.terms[name]
        assert isinstance(term, FeatureTerm)
        sample.features[picture, term] = value.to(run.device)
    return sample
