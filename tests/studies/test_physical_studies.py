"""Patches and photographs: rates counted by hand from records that are made up, settings that are refused."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from conftest import make_subject

from robust_vit import errors, studies


def _common(labels, predictions):
    labels, predictions = np.asarray(labels, np.int32), np.asarray(predictions, np.int32)
    return {
        "row": np.arange(len(labels), dtype=np.int32),
        "label": labels,
        "prediction": predictions,
        "correct": labels == predictions,
        "exhibit/class_names": np.asarray(["ash", "birch", "cedar"]),
    }


def test_patches_are_counted_among_right_images_and_off_the_target():
    records = {
        **_common([0, 1, 2, 2, 0, 1], [0, 1, 2, 2, 1, 1]),
        "prediction/patch": np.asarray([[0, 1], [1, 1], [1, 1], [2, 0], [1, 1], [0, 1]], np.int32),
        "prediction/noise": np.asarray([[0, 0], [1, 1], [2, 2], [2, 2], [1, 1], [1, 1]], np.int32),
        "exhibit/areas": np.asarray([0.1, 0.3]),
        "exhibit/target": np.asarray([1]),
    }
    summary = studies.build("patch_attack", target=1).summarise(records)
    first, second = summary["curves"]["patch"]
    assert summary["target"] == "birch"
    assert (summary["clean"]["value"], first["accuracy"]["value"], second["accuracy"]["value"]) == (5 / 6, 3 / 6, 2 / 6)
    # Of five right images two and three are wrong; of the four that are no birch two and three become one.
    assert (first["success"]["value"], second["success"]["value"]) == (2 / 5, 3 / 5)
    assert (first["on_target"]["value"], second["on_target"]["value"]) == (2 / 4, 3 / 4)
    assert summary["curves"]["noise"][1]["accuracy"]["value"] == 5 / 6
    assert len(summary["caveats"]) == 1
    swapped = {
        **records,
        "prediction/patch": records["prediction/noise"],
        "prediction/noise": records["prediction/patch"],
    }
    assert "too few steps" in studies.build("patch_attack", target=1).summarise(swapped)["caveats"][0]


def test_what_a_photograph_destroys_are_attacks_that_worked():
    records = {
        **_common([0, 1, 2, 0], [0, 1, 2, 1]),
        "file/clean": np.asarray([0, 1, 2, 1], np.int32),
        "file/digital": np.asarray([1, 2, 2, 1], np.int32),
        "file/expectation": np.asarray([1, 2, 0, 1], np.int32),
        "photograph/clean": np.asarray([[0, 0], [1, 1], [2, 0], [1, 0]], np.int32),
        "photograph/digital": np.asarray([[1, 0], [1, 1], [2, 0], [0, 0]], np.int32),
        "photograph/expectation": np.asarray([[1, 1], [2, 2], [0, 2], [1, 1]], np.int32),
        "exhibit/strengths": np.asarray([0.5, 1.0]),
        "exhibit/threat": np.asarray(["noise/linf-0.1"]),
    }
    study = studies.build("physical_attack")
    summary = study.summarise(records)
    digital, expectation = (summary["kinds"][kind] for kind in ("digital", "expectation"))
    assert digital["file"]["value"] == 1 / 4
    # Two attacks on files worked: of these the weaker channel destroys one, the stronger both. The fourth never counts.
    assert [point["destruction"]["value"] for point in digital["photographs"]] == [1 / 2, 1.0]
    assert [point["destruction"]["value"] for point in expectation["photographs"]] == [0.0, 1 / 3]
    assert [point["accuracy"]["value"] for point in digital["photographs"]] == [3 / 4, 3 / 4]
    assert summary["kinds"]["clean"]["photographs"][1]["accuracy"]["value"] == 3 / 4
    harmless = {**records, "file/digital": records["label"]}
    summary = study.summarise(harmless)
    assert summary["kinds"]["digital"]["photographs"][0]["destruction"] is None
    assert "nothing that the channel could destroy" in summary["caveats"][-1]
    assert not any("keeps" in caveat for caveat in summary["caveats"])
    blurred = {**records, "photograph/clean": np.full((4, 2), 2, np.int32)}
    assert "keeps 33% of its accuracy" in study.summarise(blurred)["caveats"][1]


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("patch_attack", {"areas": (0.3, 0.1)}, "rising order"),
        ("patch_attack", {"areas": (0.1, 0.9)}, "0.785 for a circle"),
        ("patch_attack", {"shape": "heart"}, "circle"),
        ("patch_attack", {"learned_images": 0}, "learned_images is 0"),
        ("physical_attack", {"attack": "pdg"}, "did you mean 'pgd'"),
        ("physical_attack", {"strengths": ()}, "rising order"),
        ("physical_attack", {"samples": 0}, "samples is 0"),
        ("physical_attack", {"blur": -1.0}, "blur is"),
        ("physical_attack", {"threat": "cifar10/linf8"}, "threat model"),
    ],
)
def test_wrong_settings_are_told_before_anything_runs(name, options, words):
    with pytest.raises(errors.UserError, match=words):
        studies.build(name, **options)


def test_when_they_do_not_apply():
    subject = make_subject()
    patch, physical = studies.build("patch_attack"), studies.build("physical_attack")
    assert patch.applicable(subject) is None
    assert "to learn the patch from" in patch.applicable(dataclasses.replace(subject, train=None, validation=None))
    assert patch.applicable(dataclasses.replace(subject, train=None)) is None
    assert "none of the 3 classes" in studies.build("patch_attack", target=3).applicable(subject)
    assert "threat" in physical.applicable(dataclasses.replace(subject, threat=None))
    with pytest.raises(errors.UserError, match="nearest success"):
        studies.build("physical_attack", attack="fmn").applicable(subject)


def test_a_patch_is_learned_from_validation_images_where_there_is_no_training():
    study = studies.build("patch_attack", batch=50, examples=50, steps=2, learned_images=60, areas=(0.1, 0.3))
    subject = dataclasses.replace(make_subject(), train=None)
    held = jax.live_arrays()
    material = study._material(subject)
    assert len(jax.live_arrays()) == len(held)  # On the host, until a batch is learned from.
    assert all(isinstance(batch["image"], jax.Array) for batch in material)
    learned = study.learn(subject)
    assert study.learn(subject) is learned
    again = study.learn(dataclasses.replace(make_subject(), train=None))
    np.testing.assert_array_equal(learned.texture, again.texture)
