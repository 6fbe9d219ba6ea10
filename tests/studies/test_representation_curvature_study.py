"""The study on features whose bends are known, what stays the same however it is cut, and what it says of what it cannot see."""

from __future__ import annotations

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_stream, make_subject

from robust_vit import classifier, errors, models, studies

SMALL = {"examples": 3, "directions": 4, "batch": 8, "steps": 4, "jump": 0.0, "step_sizes": (), "exhibits": 0}


@flax.struct.dataclass
class Arc(classifier.Wrapped):
    """A model whose features go round a circle `turns` radians fast while the mean pixel grows by one."""

    def features(self, images, gates=None):
        del gates
        mean = images.reshape(images.shape[0], -1).mean(axis=1)
        angle = mean * self.variables["turns"]
        found = jnp.stack([jnp.cos(angle), jnp.sin(angle), 0.0 * angle], axis=1)
        return self(images), {"pre_logits": found, "flat": images.reshape(images.shape[0], -1)}


def logits(variables, images):
    mean = images.reshape(images.shape[0], -1).mean(axis=1)
    return jnp.stack([4.0 * mean, 2.0 - mean, 0.0 * mean], axis=1)


def make_arc(turns=5.0, examples=6, **changes):
    images = np.random.default_rng(0).uniform(0.2, 0.8, (examples, 4, 4, 1))
    model = Arc(variables={"turns": jnp.float32(turns)}, apply=logits)
    stream = make_stream(images, np.arange(examples) % 3)
    return studies.Subject(classifier=model, test=stream, num_classes=3, class_names=("a", "b", "c"), **changes)


def test_features_on_a_circle_turn_by_what_the_mean_pixel_does():
    subject = make_arc()
    study = studies.build("representation_curvature", **{**SMALL, "jump": 0.1, "step_sizes": (0.01, 0.02, 0.04)})
    finding = study.run(subject)
    records = finding.records
    # Along d the mean pixel moves by mean(d) t, and the features turn by five times that, from wherever they start.
    speed = records["speed/start"]
    step = study.span / study.steps
    for name in ("start", "jump"):
        expected = np.repeat(speed[:, :, None] * step, study.steps - 1, axis=2)
        # What is left is rounding, and no more than the study says.
        assert np.all(np.abs(records[f"angles/{name}"] - expected) < 3 * records[f"noise/{name}"])
        assert np.median(records[f"noise/{name}"]) < 0.1 * np.median(expected)
        np.testing.assert_allclose(records[f"rate/{name}"], speed, rtol=1e-4)
    assert speed.shape == (3, 4)
    np.testing.assert_allclose(
        records["sizes/tangents"], speed[:, :, None] * np.asarray(study.step_sizes), rtol=1e-3, atol=1e-6
    )
    assert np.all(np.abs(records["sizes/angles"] - records["sizes/tangents"]) < 3 * records["sizes/noise"])
    summary = finding.summary
    np.testing.assert_allclose(summary["starts"]["start"]["rate"]["value"], speed.mean(), rtol=1e-4)
    np.testing.assert_allclose(summary["starts"]["start"]["angle"]["value"], (speed * step).mean(), rtol=1e-2)
    np.testing.assert_allclose(summary["starts"]["start"]["total"]["value"], 3 * (speed * step).mean(), rtol=1e-2)
    np.testing.assert_allclose(summary["change"]["value"], 0.0, atol=1e-4)
    assert summary["starts"]["start"]["no_rate"] == 0.0


def test_a_smooth_path_grows_with_the_first_power_of_the_step():
    study = studies.build("representation_curvature", **{**SMALL, "step_sizes": (1e-3, 3e-3, 1e-2)})
    summary = study.run(make_arc(turns=20.0)).summary
    np.testing.assert_allclose(summary["exponent"]["value"], 1.0, atol=1e-3)


def test_records_do_not_depend_on_how_they_are_cut():
    subject = make_arc()
    whole = studies.build("representation_curvature", **{**SMALL, "examples": 6, "batch": 8})
    assert whole.chunks(subject) == 3
    first = whole.run(subject).records
    cut = dataclasses.replace(whole, batch=3)
    assert cut.chunks(subject) == 6
    records = cut.run(subject).records
    assert first.keys() == records.keys()
    # Shapes differ, so rounding may.
    np.testing.assert_allclose(records["angles/start"], first["angles/start"], atol=2e-4)
    np.testing.assert_array_equal(records["row"], first["row"])
    # An image's directions are its own: they do not change with the company.
    turned = dataclasses.replace(
        subject,
        test=dataclasses.replace(
            subject.test, **{k: getattr(subject.test, k)[::-1] for k in ("images", "labels", "rows")}
        ),
    )
    records = whole.run(turned).records
    np.testing.assert_array_equal(records["row"], first["row"][::-1])
    np.testing.assert_allclose(records["angles/start"][::-1], first["angles/start"], atol=2e-4)
    other = whole.run(dataclasses.replace(subject, seed=1)).records
    assert np.abs(other["angles/start"] - first["angles/start"]).max() > 1e-3


def test_the_gradient_is_a_direction_of_its_own_and_the_jump_a_corner():
    study = studies.build(
        "representation_curvature",
        **{**SMALL, "direction": "gradient", "jump": 0.05, "exhibits": 2, "layer": "flat", "examples": 5},
    )
    subject = make_arc()
    finding = study.run(subject)
    records = finding.records
    assert records["angles/start"].shape == (5, 1, 3)
    # All pixels the same way: the loss depends on their mean.
    np.testing.assert_allclose(records["speed/start"], 4.0, rtol=1e-5)
    assert not records["vanished/start"].any()
    # Features that are the pixels go as these do: straight, and around a right angle after the jump.
    planes, pixels = records["exhibit/plane/jump"], records["exhibit/pixels/jump"]
    assert planes.shape == (2, 1, 9, 2)
    np.testing.assert_allclose(planes, pixels, atol=1e-3)
    np.testing.assert_allclose(records["exhibit/pixels/start"][..., 1], 0.0, atol=1e-6)
    corner = pixels[0, 0, 4]
    away, on = -corner, pixels[0, 0, -1] - corner
    cosine = away @ on / np.linalg.norm(away) / np.linalg.norm(on)
    assert abs(cosine) < 0.6
    assert study.figures({"arc": finding}).keys() == {"direction_change", "paths"}
    assert study.passes(subject)[1] == 2 * 8


def test_what_is_straight_says_that_its_angles_are_rounding():
    study = studies.build("representation_curvature", **{**SMALL, "layer": "logits", "span": 1e-4, "examples": 2})
    summary = study.run(make_subject()).summary
    assert summary["starts"]["start"]["below_noise"] > 0.5
    assert summary["starts"]["start"]["no_rate"] == 1.0
    caveats = " ".join(summary["caveats"])
    assert "rounding makes of a straight path" in caveats
    assert "piecewise linear" in caveats
    assert "2 images" in caveats


def test_half_precision_is_asked_in_float32():
    spec = classifier.ImageSpec(size=(8, 8), channels=1, mean=(0.5,), std=(0.5,))
    module = models.build("vit", num_classes=3, width=16, depth=1, heads=2, patch=4, dtype="bfloat16")
    model = classifier.Classifier(models.init(module, spec, jax.random.key(0)), module, spec)
    subject = dataclasses.replace(make_arc(), classifier=model)
    study = studies.build("representation_curvature", **SMALL)
    assert study.applicable(subject) is None
    paths = study.programs(subject)[1]
    layer = paths.arguments[-1][0]
    assert layer.model.module.dtype == "float32"


def images_only(images):
    return jax.pure_callback(
        lambda x: np.zeros((len(x), 3), np.float32), jax.ShapeDtypeStruct((len(images), 3), "float32"), images
    )


def test_when_it_does_not_apply():
    study = studies.build("representation_curvature")
    reason = study.applicable(make_subject())
    assert "names no features" in reason
    assert "layer='logits'" in reason
    assert dataclasses.replace(study, layer="logits").applicable(make_subject()) is None
    assert "did you mean 'flat'" in dataclasses.replace(study, layer="flt").applicable(make_arc())
    foreign = dataclasses.replace(make_subject(), classifier=classifier.wrap(images_only))
    assert "cannot be differentiated" in dataclasses.replace(study, layer="logits").applicable(foreign)
    with pytest.raises(errors.UserError, match="names no features"):
        study.run(make_subject())


def test_features_that_overflow_are_told():
    model = Arc(variables={"turns": jnp.float32(jnp.inf)}, apply=lambda variables, x: jnp.zeros((len(x), 3)))
    subject = dataclasses.replace(make_arc(), classifier=model)
    with pytest.raises(errors.UserError, match="not finite along a path of row 0"):
        studies.build("representation_curvature", **SMALL).run(subject)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"direction": "gradent"}, "did you mean 'gradient'"),
        ({"steps": 1}, "steps from 2"),
        ({"span": 0.0}, "positive lengths"),
        ({"step_sizes": (0.0,)}, "positive lengths"),
    ],
)
def test_wrong_settings_are_told(options, message):
    with pytest.raises(errors.UserError, match=message):
        studies.build("representation_curvature", **options)
