"""Guards: each broken model, and each broken attack, trips its own guard; a healthy model under a fair attack trips none."""

from __future__ import annotations

import dataclasses
import json

import broken_models
import closed_forms
import jax.numpy as jnp
import numpy as np
import pytest

from robust_vit import attacks, errors
from robust_vit.attacks import apgd, checks, gradient, guards

EPSILON = broken_models.EPSILON


class Forgetful(gradient.ProjectedAscent, kw_only=True):
    """Meets adversarial images, and returns the clean ones."""

    def answer(self, model, state):
        return state.clean


class Careless(gradient.ProjectedAscent, kw_only=True):
    """Returns images at twice the distance."""

    def answer(self, model, state):
        return jnp.clip(state.clean + 2.0 * (state.images - state.clean), 0.0, 1.0)


def _options(**changes):
    return {
        "epsilon": np.float32(EPSILON),
        "relative_step": np.float32(0.05),
        "steps": 50,
        **changes,
    }


def _check(defects, **options):
    model = broken_models.build(**defects)
    images = broken_models.images()
    return checks.check(
        model,
        images,
        broken_models.labels(model, images),
        **{"epsilon": EPSILON, "neighbours": 30, "queries": 300, **options},
    )


BROKEN = {
    "stochastic": (1e-2, {"stochastic"}),
    "probabilities": (1.0, {"probabilities"}),
    "shattered": (2.0, {"unstable loss"}),
    "saturated": (1.0, {"gradient/cross_entropy"}),
    "unbreakable": (1.0, {"unbounded"}),
    # Where no gradient is left at all, an attack without a bound cannot succeed either, and one without gradients may.
    "constant": (1.0, {"gradient/*", "unbounded"}),
    "quantised": (1.0, {"gradient/*", "unbounded", "black box/square"}),
    "exploding": (1.0, {"gradient/*", "unbounded", "black box/square"}),
}


def test_a_healthy_model_trips_no_guard():
    report = _check({})
    assert report.fired == ()
    assert {guard.name.partition("/")[0] for guard in report.guards} == {
        "stochastic",
        "probabilities",
        "gradient",
        "unstable loss",
        "silent success",
        "budget",
        "ball",
        "rising accuracy",
        "unbounded",
        "black box",
    }
    # It is neither invulnerable nor broken at once, so that the guards have something to look at.
    assert 0.2 < report.accuracies["pgd margin"].value < 0.8
    assert report.accuracies["clean"].value == 1.0


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_model_trips_exactly_its_guard(name):
    size, expected = BROKEN[name]
    # Steps of one length never rest on a shattered loss, and more guards see it; shrinking ones do.
    shrinking = gradient.ProjectedAscent(**_options(schedule=gradient.cosine, relative_step=np.float32(0.2)))
    options = {"white_box": {"pgd": shrinking}} if name == "shattered" else {}
    fired = set(_check({name: size}, **options).fired)
    if "gradient/*" in expected:
        expected = expected - {"gradient/*"} | {f"gradient/{loss}" for loss in guards.LOSSES}
    assert fired == expected


@pytest.mark.parametrize("loss", guards.LOSSES)
@pytest.mark.parametrize("defect", ["deaf", "choked"])
def test_a_gradient_that_one_loss_lacks_is_told_of_this_loss_alone(defect, loss):
    assert _check({defect: broken_models.READS[loss]}).fired == (f"gradient/{loss}",)


def test_the_larger_balls_that_auto_pgd_comes_from_are_not_its_own():
    """In L1 it walks in balls of three and two epsilon, where it meets adversarial images that are none in the ball."""
    model = closed_forms.model(3, (4, 4, 2), 5)
    images = np.random.default_rng(1).uniform(size=(24, 4, 4, 2)).astype(np.float32)
    labels = np.asarray(model(jnp.asarray(images))).argmax(axis=1).astype(np.int32)
    epsilon = float(np.median(closed_forms.distances("l1", model, images, labels)))
    attack = apgd.apgd_ce(epsilon=epsilon, norm="l1", steps=30)
    keys = attacks.example_keys(0, np.arange(24))
    path = checks.follow(attack, model, keys, jnp.asarray(images), jnp.asarray(labels))
    right = np.ones(24, bool)
    assert not path.inside.all()
    assert not guards.silent("apgd", path, right).fired
    # What is met on the way, in whatever ball, is more than what is returned.
    outside = dataclasses.replace(path, adversarial=path.margins > 0)
    assert guards.silent("apgd", outside, right).fired
    # And no margin outside of the ball counts as progress.
    assert not np.asarray(path.result.success).all()
    assert (
        checks.check(model, images, labels, epsilon=epsilon, norm="l1", white_box={"apgd": attack}, neighbours=5).fired
        == ()
    )


def test_a_black_box_that_beats_the_white_boxes_is_told():
    report = _check({"half_masked": 1.0})
    assert report.fired == ("black box/square",)
    assert report.accuracies["square"].value < report.accuracies["pgd margin"].value - guards.WEAKER


def test_in_l1_the_black_box_estimates_gradients():
    report = _check({"quantised": 1.0}, epsilon=0.25, norm="l1")
    assert "black box/nes" in report.fired
    assert report.accuracies["nes"].value < 0.5
    assert _check({}, epsilon=0.25, norm="l1").fired == ()


def test_a_fall_within_chance_is_told_with_its_images():
    small = np.arange(40) < 12
    hit = {0.5: small, 1.0: small, 2.0: small & (np.arange(40) >= 3)}
    (first, second) = guards.falls(hit)
    assert (first.small, second.small, first.large, first.images) == (0.5, 1.0, 2.0, 3)
    assert first.p_value == pytest.approx(0.25)  # Three images of one sign: twice an eighth.
    guard = guards.rising("pgd", hit)
    assert not guard.fired
    assert guard.detail.startswith("3 fewer images break at 2 epsilon")
    assert guards.rising("pgd", {1.0: small, 2.0: small & (np.arange(40) >= 9)}).fired
    assert guards.falls({1.0: small, 2.0: ~small}) == []


def test_accuracy_that_rises_with_epsilon_is_told():
    """FGSM steps over what it would meet half-way; PGD beside it does not."""
    white_box = {"fgsm": gradient.fgsm(epsilon=EPSILON), "pgd": gradient.ProjectedAscent(**_options())}
    report = _check({"periodic": 3.0}, white_box=white_box, multiples=(0.5, 3.0))
    assert report.fired == ("rising accuracy/fgsm",)


@pytest.mark.parametrize(
    ("attack", "expected"),
    [
        (Forgetful(**_options()), {"silent success/pgd", "unbounded"}),
        (Careless(**_options()), {"ball/pgd", "unbounded"}),
        (gradient.ProjectedAscent(**_options(relative_step=np.float32(1e-3))), {"budget/pgd", "unbounded"}),
    ],
    ids=["forgetful", "careless", "short of steps"],
)
def test_a_broken_attack_trips_its_guard_on_a_healthy_model(attack, expected):
    healthy = gradient.pgd(epsilon=EPSILON, steps=50, loss="margin")
    report = _check({}, white_box={"pgd": attack, "fair": healthy})
    # A fair attack beside it shows that the model can be broken.
    assert set(report.fired) == expected - {"unbounded"}
    assert set(_check({}, white_box={"pgd": attack}, black_box={}).fired) == expected


def test_what_lies_outside_the_ball_is_no_success():
    report = _check({}, white_box={"pgd": Careless(**_options())})
    broken = 1.0 - report.accuracies["pgd"].value
    fair = 1.0 - _check({}).accuracies["pgd cross_entropy"].value
    assert broken <= fair


def test_following_an_attack_changes_nothing():
    model, images = broken_models.build(), jnp.asarray(broken_models.images())
    labels = broken_models.labels(model, images)
    keys = attacks.example_keys(0, np.arange(len(images)))
    attack = gradient.pgd(epsilon=EPSILON, steps=8)
    path, plain = checks.follow(attack, model, keys, images, labels), attack(model, keys, images, labels)
    assert path.margins.shape == path.adversarial.shape == (attack.evaluations + 1, len(images))
    np.testing.assert_array_equal(path.result.success, plain.success)
    np.testing.assert_allclose(path.result.images, plain.images, atol=1e-6)
    assert (path.adversarial.any(axis=0) == np.asarray(plain.success)).all()
    assert not path.adversarial[0].any()


def test_the_report_reads_as_text_table_and_json():
    report = _check({"saturated": 1.0})
    (line,) = [line for line in str(report).splitlines() if "FIRED" in line]
    assert "gradient/cross_entropy" in line
    assert report.table().rows[0][1] == "FIRED"
    assert report.table().csv()
    summary = json.loads(json.dumps(report.summary(), allow_nan=False))
    assert summary["fired"] == ["gradient/cross_entropy"]
    assert summary["guards"]["gradient/cross_entropy"]["value"] == 1.0
    assert report.backward_passes > 0


def test_a_second_model_compiles_nothing():
    _check({})
    before = broken_models.apply.traces
    _check({"shattered": 0.5})
    assert broken_models.apply.traces == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"defects": {"not_finite": 1.0}}, "NaN or infinite"),
        ({"shift": 1}, "wrong on every image"),
        ({"epsilon": 0.0}, "positive"),
        ({"scale": 255.0}, "divide by 255"),
    ],
)
def test_what_no_guard_could_be_right_about_is_refused(change, message):
    model, images = broken_models.build(**change.get("defects", {})), broken_models.images()
    labels = (broken_models.labels(broken_models.build(), images) + change.get("shift", 0)) % broken_models.CLASSES
    with pytest.raises(errors.UserError, match=message):
        checks.check(model, change.get("scale", 1.0) * images, labels, epsilon=change.get("epsilon", EPSILON))
