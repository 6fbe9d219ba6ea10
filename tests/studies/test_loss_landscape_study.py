"""The study of the landscape against the loss itself, known planes, and what its numbers say of surfaces that are known."""

from __future__ import annotations

import dataclasses

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import linear, make_subject

from robust_vit import classifier, errors, evaluate, files, losses, plots, studies, trees
from robust_vit.studies import landscape_numbers

SMALL = {"points": 5, "examples": 20, "microbatch": 8, "block": 9}
TRACES = []


def counted(variables, images):
    TRACES.append(None)
    return linear(variables, images)


def _loss(subject, params, *, smoothing=0.0):
    images, labels = subject.train.images[:20], subject.train.labels[:20]
    each = losses.cross_entropy(linear(params, jnp.asarray(images)), jnp.asarray(labels), smoothing=smoothing)
    return float(each.mean())


def _history(subject, way):
    """Checkpoints at known places of a known plane through the weights."""
    params = subject.classifier.params
    generator = np.random.default_rng(0)
    plane = np.linalg.qr(generator.normal(size=(111, 2)))[0].T.astype(np.float32)

    def reader(place):
        step = place @ plane
        return lambda: {
            "kernel": np.asarray(params["kernel"]) + step[:108].reshape(36, 3),
            "bias": np.asarray(params["bias"]) + step[108:],
        }

    history = {10 * number: reader(place) for number, place in enumerate(np.asarray(way, np.float32))}
    return dataclasses.replace(subject, history=history)


@pytest.mark.parametrize("stream_batch", [16, 5])
def test_each_point_has_the_loss_of_its_weights(subject, stream_batch):
    subject = dataclasses.replace(subject, train=subject.train.with_batch(stream_batch), label_smoothing=0.1)
    records = studies.build("loss_landscape", **SMALL).run(subject).records
    assert len(records["loss"]) == 25
    np.testing.assert_array_equal(records["row"], np.arange(25))
    np.testing.assert_array_equal(records["exhibit/image_row"], np.arange(20))
    centre = (records["coordinates"] == 0).all(axis=1)
    assert centre.sum() == 1
    params = subject.classifier.params
    np.testing.assert_allclose(records["nll"][centre], _loss(subject, params, smoothing=0.1), rtol=1e-6)
    np.testing.assert_allclose(records["l2"][centre], 0.005 * float(trees.dot(params, params)), rtol=1e-6)
    np.testing.assert_allclose(records["nll"] + records["l2"], records["loss"])
    np.testing.assert_allclose(records["example_loss"].mean(axis=1), records["nll"], rtol=1e-6)
    # Away from the centre too: the kernel moves by its columns' norms, and the bias rests.
    assert records["nll"][[0, 4, 20, 24]].min() > records["nll"][centre][0]
    # |θ + a d1 + b d2|² with |d| = |kernel| for both.
    size = float(jnp.sum(jnp.square(params["kernel"])))
    corners = records["l2"][[2, 22]].sum() - 2 * records["l2"][12]
    np.testing.assert_allclose(corners, 0.005 * 2 * size, rtol=1e-5)


def test_killed_and_resumed_it_ends_with_the_same_bytes(subject, tmp_path):
    study = studies.build("loss_landscape", draws=2, dimensions=1, **{**SMALL, "block": 3})
    whole = evaluate.run_study(study, "landscape", subject, tmp_path / "whole")
    polls = iter([False, False, True])
    with pytest.raises(evaluate.Stopped):
        evaluate.run_study(study, "landscape", subject, tmp_path / "killed", stop=lambda: next(polls))
    resumed = evaluate.run_study(study, "landscape", make_subject(), tmp_path / "killed")
    assert resumed.finding.records.keys() == whole.finding.records.keys()
    for name in ("examples.npz", "result.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()
    planes = whole.finding.records["example_loss"].reshape(2, 5, 20)
    np.testing.assert_array_equal(planes[0, 2], planes[1, 2])
    assert np.abs(planes[0, 4] - planes[1, 4]).max() > 1e-3
    assert whole.finding.summary["rise"]["over"] == "planes"


def test_new_chunks_draws_and_equal_models_compile_nothing(subject):
    subject = dataclasses.replace(subject, classifier=classifier.wrap(counted, subject.classifier.variables))
    study = studies.build("loss_landscape", draws=3, **{**SMALL, "examples": 16})
    study.chunk(subject, 0)
    count = len(TRACES)
    assert count > 0
    study.chunk(subject, 2)
    study.chunk(subject, 5)
    other = make_subject(seed=3)
    study.chunk(dataclasses.replace(other, classifier=classifier.wrap(counted, other.classifier.variables)), 1)
    assert len(TRACES) == count


@pytest.mark.slow
def test_along_eigenvectors_the_curvature_is_the_eigenvalue(subject):
    study = studies.build("loss_landscape", plane="eigenvectors", span=0.02, l2=True, rank=40, tolerance=1e-4, **SMALL)
    finding = study.run(subject)
    values = finding.summary["eigenvalues"]
    # The largest is known: that of the dense Hessian, shifted by the weight decay.
    flat, unravel = jax.flatten_util.ravel_pytree(subject.classifier.params)
    batch = jnp.asarray(subject.train.images[:20]), jnp.asarray(subject.train.labels[:20])
    dense = jax.hessian(lambda vector: losses.cross_entropy(linear(unravel(vector), batch[0]), batch[1]).mean())(flat)
    expected = np.linalg.eigvalsh(np.asarray(dense, np.float64))[::-1][:2] + 0.01
    np.testing.assert_allclose(values, expected, rtol=1e-4)
    bent = [entry["value"] for entry in finding.summary["curvature"]]
    np.testing.assert_allclose(bent, expected, rtol=2e-3)  # Second differences of float32 losses. Measured: 2e-4.
    assert not any("did not reach" in caveat for caveat in finding.summary["caveats"])
    loose = studies.build("loss_landscape", plane="eigenvectors", rank=2, tolerance=1e-6, **SMALL)
    assert any("did not reach" in caveat for caveat in loose.run(subject).summary["caveats"])


def test_a_trajectory_is_drawn_in_the_plane_that_it_lies_in(subject):
    way = [[3.0, 0.5], [2.0, 1.0], [1.0, 0.8], [0.3, 0.2], [0.0, 0.0]]
    subject = _history(subject, way)
    study = studies.build("loss_landscape", plane="trajectory", **{**SMALL, "points": 6})
    # Another history asks for another result; a random plane does not look at it.
    assert study.looks_back(subject) == (0, 10, 20, 30, 40)
    assert studies.build("loss_landscape", **SMALL).looks_back(subject) == ()
    finding = study.run(subject)
    records = finding.records
    # The last checkpoint is the weights themselves: the origin, and no point of its own.
    np.testing.assert_array_equal(records["exhibit/trajectory_step"], [0, 10, 20, 30])
    lengths = np.linalg.norm(np.asarray(way[:4]), axis=1)
    np.testing.assert_allclose(np.linalg.norm(records["exhibit/trajectory"], axis=1), lengths, rtol=1e-4)
    np.testing.assert_allclose(records["exhibit/trajectory_distance"], lengths, rtol=1e-4)
    np.testing.assert_allclose(sum(finding.summary["explained"]), 1.0, atol=1e-5)
    for axis in range(2):
        places = records["coordinates"][:, axis]
        assert places.min() < records["exhibit/trajectory"][:, axis].min()
        assert places.max() > records["exhibit/trajectory"][:, axis].max()
    assert (records["coordinates"] == 0).all(axis=1).sum() == 1
    assert finding.summary["rise"] is None
    assert plots.rasterize(study.figures({"run": finding})["contours"]).std() > 0
    assert study.compare(finding, finding) == []
    assert study.tables({"run": finding})["loss_landscape"].columns[-1] == "variance explained"
    files.jsonable(finding.summary)


def _fabricated(function, *, planes=1, images=50, l2=0.0):
    """Records of losses `function(x, y) + a number of each image` on [-1, 1]²."""
    axis = np.arange(-5, 6) / 5
    x, y = (each.ravel() for each in np.meshgrid(axis, axis, indexing="ij"))
    nll = np.concatenate([function(x, y, plane) for plane in range(planes)])
    noise = np.random.default_rng(0).normal(0, 0.1, images)
    count = len(x)
    return {
        "row": np.arange(planes * count),
        "label": np.full(planes * count, -1),
        "plane": np.repeat(np.arange(planes), count),
        "coordinates": np.tile(np.stack([x, y], axis=1), (planes, 1)),
        "example_loss": nll[:, None] + (noise - noise.mean())[None],
        "nll": nll,
        "l2": l2 * (1 + np.tile(x**2 + y**2, planes)),
        "loss": nll,
        "accuracy": np.full(planes * count, 0.5),
    }


def test_numbers_of_a_known_surface():
    study = studies.build("loss_landscape", points=11)
    summary = study.summarise(_fabricated(lambda x, y, plane: 1 + 2 * x**2 + 4 * y**2, l2=0.25))
    np.testing.assert_allclose(summary["loss"]["value"], 1.0)
    assert summary["loss"]["low"] < 1 < summary["loss"]["high"]
    np.testing.assert_allclose([entry["value"] for entry in summary["curvature"]], [4, 8])
    np.testing.assert_allclose(
        summary["rise"]["value"], (0.26 * 2 + 0.26 * 4) / 2
    )  # Half is between two points, 0.16 and 0.36.
    np.testing.assert_allclose(summary["radius"]["value"], 0.4 + 0.2 * 0.36 / 0.8)  # From 1.64 at 0.4 to 2.44 at 0.6.
    assert summary["rise_at"] == 0.5
    assert summary["radius"]["reached"] == 1
    assert summary["negative"]["value"] == summary["roughness"]["value"] == 0
    assert summary["l2"] == 0.25
    assert len(summary["caveats"]) == 1
    steep = study.summarise(_fabricated(lambda x, y, plane: 0.01 + np.abs(x)))
    assert any("within one step of the grid (0.2)" in caveat for caveat in steep["caveats"])
    decayed = studies.build("loss_landscape", points=11, l2=True)
    with_l2 = decayed.summarise(_fabricated(lambda x, y, plane: 1 + 2 * x**2 + 4 * y**2, l2=3.0))
    np.testing.assert_allclose(with_l2["loss"]["value"], 4.0)
    np.testing.assert_allclose([entry["value"] for entry in with_l2["curvature"]], [10, 14])
    assert any("75% of the loss at the weights is the L2 term" in caveat for caveat in with_l2["caveats"])


def test_several_planes_and_what_is_not_reached_or_not_finite():
    study = studies.build("loss_landscape", points=11, draws=3)
    records = _fabricated(lambda x, y, plane: 1 + (plane + 1) * 0.6 * x**2, planes=3)
    summary = study.summarise(records)
    np.testing.assert_allclose(summary["curvature"][0]["value"], 2.4)
    assert summary["curvature"][0]["over"] == "planes"
    np.testing.assert_allclose(summary["radius"]["reached"], 2 / 3)
    assert any("in every plane" in caveat and "lower bound" in caveat for caveat in summary["caveats"])
    records["example_loss"][0] = np.inf
    broken = study.summarise(records)
    np.testing.assert_allclose(broken["finite"], 1 - 1 / 363)
    assert any("not finite" in caveat for caveat in broken["caveats"])
    files.jsonable(broken)
    figures = study.figures({"run": studies.Finding(study.settings(), records, broken)})
    assert set(figures) == {"contours", "surface", "profiles"}
    flat = study.summarise(_fabricated(lambda x, y, plane: np.ones_like(x), planes=3))
    assert flat["radius"]["value"] == 1.0
    assert flat["negative"]["value"] == 0


def test_a_bootstrap_by_counts_is_that_of_the_rows():
    records = _fabricated(lambda x, y, plane: 1 + x**2, images=7)
    records["example_loss"] *= np.random.default_rng(1).uniform(0.5, 2, (1, 7))
    surface = landscape_numbers.surface(records, l2=False)
    found = landscape_numbers._estimate(surface, lambda values: values[:, 0, 5])
    each = surface.losses[0, 0, 5]
    expected = landscape_numbers.statistics.mean(each, draws=landscape_numbers._DRAWS)
    np.testing.assert_allclose(
        [found[key] for key in ("value", "low", "high")], [expected.value, expected.low, expected.high]
    )


def test_runs_are_compared_on_the_same_images_in_the_same_units(subject):
    study = studies.build("loss_landscape", **SMALL)
    first, second = study.run(subject), study.run(make_subject(seed=1, noise=2.0))
    found = study.compare(first, second)
    assert [entry.quantity.split()[0] for entry in found] == ["rise", "curvature"]
    rises = [landscape_numbers.surface(each.records, l2=False).losses.mean(axis=-1)[0] for each in (first, second)]
    rises = [(each[1, 2] + each[3, 2] + each[2, 1] + each[2, 3]) / 4 - each[2, 2] for each in rises]
    np.testing.assert_allclose(found[0].difference, rises[1] - rises[0], rtol=1e-5)
    moved = dict(second.records)
    moved["exhibit/image_row"] = moved["exhibit/image_row"] + 1
    assert study.compare(first, dataclasses.replace(second, records=moved)) == []
    raw = studies.build("loss_landscape", normalisation="none", **SMALL)
    assert raw.compare(first, second) == []


def images_only(images):
    return linear({"kernel": jnp.ones((36, 3)), "bias": jnp.zeros(3)}, images)


def test_when_it_does_not_apply(subject):
    study = studies.build("loss_landscape")
    assert study.applicable(subject) is None
    assert "variables" in study.applicable(dataclasses.replace(subject, classifier=classifier.wrap(images_only)))
    assert "training images" in study.applicable(dataclasses.replace(subject, train=None))
    trajectory = studies.build("loss_landscape", plane="trajectory", points=6)
    assert "keeps 0 checkpoints" in trajectory.applicable(subject)
    assert trajectory.applicable(_history(subject, [[1, 0], [0, 1]])) is None
    with pytest.raises(errors.UserError, match="1 of the run's checkpoints differ"):
        trajectory.run(_history(subject, [[1, 0], [0, 0]]))
    other = dataclasses.replace(subject, history={0: lambda: {"kernel": np.zeros(3)}, 1: lambda: {}})
    with pytest.raises(errors.UserError, match="step 0 is of another model"):
        trajectory.run(other)
    poisoned = classifier.wrap(linear, jax.tree.map(lambda leaf: leaf * np.nan, subject.classifier.variables))
    with pytest.raises(errors.UserError, match="at the weights themselves is not finite"):
        studies.build("loss_landscape", **SMALL).run(dataclasses.replace(subject, classifier=poisoned))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"plane": "plain"}, "did you mean 'plane'|unknown plane"),
        ({"normalisation": "filter"}, "unknown normalisation"),
        ({"vectors": "move"}, "unknown way with vectors"),
        ({"points": 10}, "expected an odd number"),
        ({"points": 1}, "expected an odd number"),
        ({"dimensions": 3}, "expected 1 or 2"),
        ({"examples": 0}, "examples is 0"),
        ({"span": -1.0}, "span is -1.0"),
        ({"plane": "eigenvectors", "draws": 2}, "only random ones"),
        ({"plane": "eigenvectors", "rank": 1}, "rank is 1"),
        ({"plane": "trajectory", "normalisation": "li2018"}, "would no longer hold it"),
    ],
)
def test_settings_that_make_no_sense(options, words):
    with pytest.raises(errors.UserError, match=words):
        studies.build("loss_landscape", **options)
