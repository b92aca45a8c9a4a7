"""Recipes: what their fields hold, within which limits, and the presets."""

from dataclasses import fields

import pytest

from splice_engine import (
    INVERSION_PRESETS,
    PRESETS,
    InstantSettings,
    InversionSettings,
    Settings,
    SpliceError,
    inversion_preset,
    preset,
)


@pytest.mark.parametrize(
    ("recipe", "changes", "message"),
    [
        (Settings, {"steps": 2.5}, "steps must be a whole number, not 2.5"),
        (Settings, {"size": 64.5}, "size must be a whole number, not 64.5"),
        (Settings, {"flip": True}, "flip must be a number, not True"),
        (Settings, {"compile": 1}, "compile must be true or false, not 1"),
        (Settings, {"steps": True}, "steps must be a whole number, not True"),
        (Settings, {"steps": None}, "steps must be a whole number, not None"),
        (Settings, {"learning_rate": "0.1"}, "learning_rate must be a number, not '0.1'"),
        (Settings, {"recompute": None}, "recompute must be true or false, not None"),
        (InstantSettings, {"match_passes": 1.5}, "match_passes must be a whole number, not 1.5"),
        (InversionSettings, {"size": None}, "size must be a whole number, not None"),
    ],
    ids=str,
)
def test_values_of_another_type_are_refused(recipe, changes, message):
    with pytest.raises(SpliceError, match=message):
        recipe(**changes)


def test_whole_numbers_are_numbers_and_no_size_is_full_size():
    settings = Settings(flip=1, learning_rate=0, size=None)
    assert (settings.flip, settings.learning_rate, settings.size) == (1, 0, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, not 0"),
        ({"steps": -3}, "steps must be at least 1, not -3"),
        ({"size": 63}, "size must be at least 64"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"learning_rate": -1e-3}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"learning_rate": float("inf")}, "learning_rate"),
        ({"beta1": 1.0}, "beta1"),
        ({"beta2": 1.0}, "beta2"),
        ({"beta2": 1.01}, "beta2"),
        ({"warm_steps": -1}, "warm_steps"),
        ({"match_passes": 0}, "match_passes"),
        ({"density": 3}, "density must be one of 1, 2, 4, not 3"),
        ({"texture": 1.1}, "texture"),
        ({"colour_end": 1.1}, "colour_end"),
        ({"appearance_weight": -1.0}, "appearance_weight"),
        ({"structure_weight": float("inf")}, "structure_weight"),
        ({"identity_weight": float("nan")}, "identity_weight"),
        ({"crop": 0.05}, "crop"),
        ({"crop": 1.2}, "crop"),
        ({"flip": -0.1}, "flip"),
        ({"jitter": 1.1}, "jitter"),
        ({"blur": 2.0}, "blur"),
        ({"whole_every": -1}, "whole_every"),
        ({"vit_size": 31}, "vit_size"),
        ({"vit_longest": 31}, "vit_longest"),
        ({"ema": 1.0}, "ema must be from 0 to 0.9999, not 1.0"),
    ],
    ids=str,
)
def test_values_out_of_their_limits_are_refused(changes, message):
    """Known before the first step: nobody waits to learn of a slip."""
    with pytest.raises(SpliceError, match=message):
        preset("paper", **changes)


@pytest.mark.parametrize("recipe", [InstantSettings, Settings, InversionSettings])
def test_every_field_has_help_and_lets_its_limits_in(recipe):
    for item in fields(recipe):
        assert item.metadata["help"], item.name
        for limit in (item.metadata["low"], item.metadata["high"]):
            if limit is not None:
                assert getattr(recipe(**{item.name: limit}), item.name) == limit


@pytest.mark.parametrize(("choose", "presets"), [(preset, PRESETS), (inversion_preset, INVERSION_PRESETS)])
def test_presets_by_name(choose, presets):
    for name, recipe in presets.items():
        assert choose(name) == recipe
        assert choose(name, steps=7).steps == 7
    with pytest.raises(SpliceError, match=r"unknown preset 'papre'.*paper"):
        choose("papre")
