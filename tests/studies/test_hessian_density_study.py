"""The density of a linear model against its dense Hessian, and its summary against closed forms."""

from __future__ import annotations

import dataclasses

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import linear_hessian, make_subject

from robust_vit import errors, studies
from robust_vit.curvature import krylov
from robust_vit.studies import hessian_density, identity

SMALL = {"batch": 16, "probes": 3, "rank": 12}


@pytest.fixture(scope="module")
def plain():
    """A subject, the study and what it found, run once."""
    subject, study = make_subject(), studies.build("hessian_density", **SMALL)
    return subject, study, study.run(subject)


def test_each_probe_is_the_quadrature_of_the_dense_hessian(plain):
    subject, study, finding = plain
    batch = subject.train.batch(0)
    dense = linear_hessian(subject.classifier.params, batch["image"]) + 0.01 * np.eye(111)
    operator = study._operator(subject, subject.classifier, {"image": batch["image"], "label": batch["label"]})
    keys = [jax.random.fold_in(jax.random.fold_in(jax.random.key(0), hessian_density._PURPOSE), i) for i in range(3)]
    records = finding.records
    np.testing.assert_allclose(records["weights"].sum(axis=1), 1.0, rtol=1e-12)
    for index, key in enumerate(keys):
        probe = krylov.start(operator, key, rank=1).following
        vector = np.asarray(jax.flatten_util.ravel_pytree(probe)[0], np.float64)
        for power in (1, 2, 3):
            moment = (records["weights"] * records["nodes"] ** power)[index].sum()
            expected = vector @ np.linalg.matrix_power(dense, power) @ vector
            np.testing.assert_allclose(moment, expected, rtol=1e-4)
    eigenvalues = np.linalg.eigvalsh(dense)
    top = finding.summary["largest"]
    assert abs(top["value"] - eigenvalues[-1]) <= top["residual"] + 1e-5
    assert finding.summary["condition_number_at_least"] <= eigenvalues[-1] / eigenvalues[0] * (1 + 1e-3)


def test_a_chunk_is_the_same_alone_and_another_width_asks_for_no_products(plain):
    subject, study, finding = plain
    for name, value in study.chunk(subject, 2).items():
        np.testing.assert_array_equal(value[0], finding.records[name][2])
    found = hessian_density.density(finding.records)
    at = np.linspace(-3, 12, 3001)
    for width in (0.05, 0.3):
        mean, error = found.curve(at, width=width)
        np.testing.assert_allclose(mean.sum() * (at[1] - at[0]), 1.0, atol=1e-3)
        assert (error >= 0).all()


def test_weight_decay_shifts_nodes_and_leaves_what_is_of_the_loss(plain):
    subject, _, finding = plain
    shifted = studies.build("hessian_density", weight_decay=0.26, **SMALL).run(subject)
    weighted = [(one.records["weights"] * one.records["nodes"]).sum(axis=1) for one in (finding, shifted)]
    np.testing.assert_allclose(weighted[1], weighted[0] + 0.25, atol=1e-5)
    assert shifted.summary["trace_of_l2"] == pytest.approx(0.26 * 111)
    for name in ("trace", "frobenius", "effective_rank"):
        np.testing.assert_allclose(shifted.summary[name]["value"], finding.summary[name]["value"], rtol=1e-3)


def test_gauss_newton_of_a_linear_model_is_its_hessian(plain):
    subject, _, finding = plain
    other = studies.build("hessian_density", operator="gauss_newton", **SMALL).run(subject)
    largest = finding.summary["largest"]["value"]
    # Exactly the same matrix, multiplied in another order: measured 4e-7 of the largest.
    np.testing.assert_allclose(other.records["nodes"], finding.records["nodes"], atol=1e-4 * largest)
    assert other.summary["negative_share"]["value"] == 0.0


def _known(finding, nodes, weights, *, decay=0.0, noise=1e-6):
    records = dict(finding.records)
    count, rank = nodes.shape
    records = {name: value[:count] for name, value in records.items()}
    return {
        **records,
        "nodes": nodes,
        "weights": weights,
        "residuals": np.zeros((count, rank)),
        "weight_decay": np.full(count, decay),
        "noise": np.full(count, noise),
        "parameters": np.full(count, 100),
    }


def test_shares_norms_and_ranks_of_known_quadratures(plain):
    """Eigenvalues 4, 1, -1, and -1e-5 with weights 1, 2, 1, 4 of 8, in both probes alike."""
    _, study, finding = plain
    nodes = np.tile([-1.0, -1e-5, 1.0, 4.0, np.nan], (2, 1))
    weights = np.tile([1, 4, 2, 1, 0], (2, 1)) / 8
    summary = study.summarise(_known(finding, nodes, weights))
    small = 4e-5
    for name, expected in (
        ("trace", 100 * (4 + 2 - 1 - small) / 8),
        ("frobenius", np.sqrt(100 * (16 + 2 + 1) / 8)),
        ("effective_rank", 100 * ((4 + 2 + 1 + small) / 8) ** 2 / (19 / 8)),
        ("negative_share_by_rounding", 5 / 8),
        ("negative_share", 1 / 8),
        ("negative_mass", 1 / (7 + small)),
    ):
        np.testing.assert_allclose(summary[name]["value"], expected, rtol=1e-8)
        assert summary[name]["over"] == "probes"
        np.testing.assert_allclose(summary[name]["high"], expected, rtol=1e-8)
    assert summary["largest"] == {"value": 4.0, "residual": 1e-6}
    assert summary["smallest"]["value"] == -1.0
    np.testing.assert_allclose(summary["condition_number_at_least"], 4e5)
    assert any("62.50% of the eigenvalues are negative by more than rounding" in one for one in summary["caveats"])
    # The L2 term moves what is negative of the objective, and nothing that is of the loss.
    decayed = study.summarise(_known(finding, nodes + 0.5, weights, decay=0.5))
    assert decayed["negative_share"]["value"] == 1 / 8
    np.testing.assert_allclose(decayed["negative_mass"]["value"], 0.5 / (0.5 + 4 * (0.5 - 1e-5) + 2 * 1.5 + 4.5))
    np.testing.assert_allclose(decayed["negative_mass_of_loss"]["value"], 1 / (7 + small))
    np.testing.assert_allclose(decayed["effective_rank"]["value"], summary["effective_rank"]["value"], rtol=1e-8)
    zero = study.summarise(_known(finding, np.zeros((2, 3)), np.full((2, 3), 1 / 3)))
    assert zero["condition_number_at_least"] is None
    assert zero["negative_mass"]["value"] == zero["effective_rank"]["value"] == 0.0


def test_the_early_phase_stands_beside_the_end(plain):
    subject, _, finding = plain
    past = dataclasses.replace(
        subject, history={4: lambda: jax.tree.map(lambda leaf: 0.3 * leaf, subject.classifier.params)}
    )
    study = studies.build("hessian_density", early=True, **SMALL)
    both = study.run(past)
    for name, value in finding.records.items():
        np.testing.assert_array_equal(both.records[name], value)
    early = studies.build("hessian_density", **SMALL).run(dataclasses.replace(subject, classifier=past.past(4)))
    np.testing.assert_array_equal(both.records["early/nodes"], early.records["nodes"])
    assert both.summary["early"]["trace"] == early.summary["trace"]
    assert both.summary["early"]["step"] == 4
    assert [row[1] for row in study.tables({"run": both})["hessian_density"].rows] == ["early (step 4)", "end"]
    assert identity.asked(study, past)["history"] == [4]
    assert study.passes(past) == (2 * 3 * 16 * 25, 2 * 3 * 16 * 24)
    alone = study.run(subject)
    assert any("kept no checkpoint after its warm-up" in caveat for caveat in alone.summary["caveats"])


def test_a_rank_beyond_the_dimension_and_mistakes():
    def narrow(variables, images):
        return images.mean(axis=(1, 2)) @ variables["kernel"]

    subject = make_subject()
    model = subject.classifier.replace(variables={"kernel": jnp.asarray([[1.0, -1.0, 0.5]])}, apply=narrow)
    finding = studies.build("hessian_density", batch=16, probes=2, rank=9).run(
        dataclasses.replace(subject, classifier=model)
    )
    assert finding.records["nodes"].shape == (2, 9)
    assert np.isfinite(finding.records["nodes"][:, :3]).all()
    assert np.isnan(finding.records["nodes"][:, 3:]).all()
    assert finding.summary["trace"]["value"] > 0
    study = studies.build("hessian_density")
    assert "training images" in study.applicable(dataclasses.replace(subject, train=None))
    for options, message in (
        ({"probes": 1}, "probes is 1"),
        ({"batch": "auto"}, 'microbatch="auto" is what saves memory'),
        ({"operator": "hesian"}, "did you mean 'hessian'"),
        ({"floor": 1.0}, "floor is 1.0"),
    ):
        with pytest.raises(errors.UserError, match=message):
            studies.build("hessian_density", **options)


@pytest.mark.slow
def test_a_batch_in_parts_is_the_same(plain):
    subject, _, finding = plain
    parts = studies.build("hessian_density", microbatch=5, **SMALL).run(subject)
    moments = [(one.records["weights"] * one.records["nodes"] ** 2).sum(axis=1) for one in (parts, finding)]
    np.testing.assert_allclose(moments[0], moments[1], rtol=1e-5)
