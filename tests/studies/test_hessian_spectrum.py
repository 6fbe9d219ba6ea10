"""The spectrum of a linear model against the dense Hessian, and its summary against closed forms."""

from __future__ import annotations

import dataclasses

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from conftest import linear, linear_hessian, make_subject

from robust_vit import classifier, errors, losses, runs, settings, studies
from robust_vit.studies import identity, spectrum_figures, training_loss

TRACES = []


def counted(variables, images):
    TRACES.append(None)
    return linear(variables, images)


def dense(subject, batch, *, smoothing=0.0, decay=0.0):
    flat, unravel = jax.flatten_util.ravel_pytree(subject.classifier.params)

    def loss(vector):
        logits = linear(unravel(vector), batch["image"])
        return losses.cross_entropy(logits, batch["label"], smoothing=smoothing).mean()

    return np.linalg.eigvalsh(np.asarray(jax.hessian(loss)(flat), np.float64)) + decay


@pytest.mark.parametrize("stream_batch", [16, 5, 64])
def test_eigenvalues_are_those_of_the_dense_hessian_on_the_right_images(subject, stream_batch):
    subject = dataclasses.replace(subject, train=subject.train.with_batch(stream_batch), label_smoothing=0.1)
    study = studies.build("hessian_spectrum", batch=8, mini_batches=2, top=4, rank=20)
    record = study.chunk(subject, 1)
    chosen = np.arange(8, 16)
    np.testing.assert_array_equal(record["rows"][0], chosen)
    batch = {"image": jnp.asarray(subject.train.images[chosen]), "label": jnp.asarray(subject.train.labels[chosen])}
    expected = dense(subject, batch, smoothing=0.1, decay=0.01)
    order = np.argsort(-np.abs(expected))[:4]
    # Measured difference: 3e-7 of the largest.
    np.testing.assert_allclose(record["eigenvalues"][0], expected[order], atol=1e-5 * expected.max())
    assert record["converged"].all()


def bent(variables, images):
    """A network whose Hessian depends on the labels, which that of a linear one does not."""
    flat = images.reshape(images.shape[0], -1)
    return jnp.tanh(flat @ variables["first"]) @ variables["second"]


def mixing_subject(subject, *, mixup=0.0, cutmix=0.0):
    keys = jax.random.split(jax.random.key(0))
    variables = {"first": jax.random.normal(keys[0], (36, 2)) / 3, "second": jax.random.normal(keys[1], (2, 3))}
    mixing = {"mixup": mixup, "cutmix": cutmix, "switch": 0.5} if mixup or cutmix else {}
    return dataclasses.replace(subject, classifier=classifier.wrap(bent, variables), mixing=mixing)


def soft(labels, share, *, smoothing=0.0):
    targets = np.eye(3)[labels]
    return (1 - smoothing) * (share * targets + (1 - share) * np.roll(targets, 1, axis=0)) + smoothing / 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "how"), [("hessian_spectrum", "mixup"), ("hessian_spectrum", "cutmix"), ("hessian_density", "mixup")]
)
def test_mixed_mini_batches_have_the_dense_hessian_of_the_mixed_loss(subject, name, how):
    subject = mixing_subject(subject, **{how: 1.0})
    options = {"mini_batches": 3, "top": 8} if name == "hessian_spectrum" else {"probes": 2}
    study = studies.build(name, batch=8, rank=90, label_smoothing=0.1, **options)
    index = 2 if name == "hessian_spectrum" else 0
    record = study.chunk(subject, index)
    chosen = np.arange(8 * index, 8 * index + 8)
    np.testing.assert_array_equal(record["rows"][0], chosen)
    share = float(record["share"][0])
    assert 0.02 < share < 0.98
    images, second = subject.train.images[chosen], np.roll(subject.train.images[chosen], 1, axis=0)
    if how == "mixup":
        images = share * images + (1 - share) * second
    else:
        found = training_loss.mini_batch(subject, index, 8, mixing=subject.mixing)["image"]
        pasted = np.isclose(found, second) & ~np.isclose(found, images)
        assert (np.isclose(found, second) | np.isclose(found, images)).all()
        assert pasted.mean() <= 1 - share + 1e-6
        images = found
    targets = soft(subject.train.labels[chosen], share, smoothing=0.1)
    flat, unravel = jax.flatten_util.ravel_pytree(subject.classifier.params)

    def loss(vector):
        return -(targets * jax.nn.log_softmax(bent(unravel(vector), images))).sum(axis=1).mean()

    expected = np.linalg.eigvalsh(np.asarray(jax.hessian(loss)(flat), np.float64)) + 0.01
    scale = np.abs(expected).max()
    if name == "hessian_spectrum":
        order = np.argsort(-np.abs(expected))[:8]
        # Measured difference: 4e-7 of the largest.
        np.testing.assert_allclose(record["eigenvalues"][0], expected[order], atol=1e-5 * scale)
    else:
        np.testing.assert_allclose(np.nanmin(record["nodes"]), expected.min(), atol=1e-5 * scale)
        np.testing.assert_allclose(np.nanmax(record["nodes"]), expected.max(), atol=1e-5 * scale)
    np.testing.assert_allclose(record["loss"], loss(flat), rtol=1e-5)


def test_mixtures_are_drawn_from_seed_and_mini_batch_alone(subject):
    subject = mixing_subject(subject, mixup=0.8, cutmix=1.0)

    def share(index, **changes):
        changed = dataclasses.replace(subject, **changes)
        return float(training_loss.mini_batch(changed, index, 8, mixing=changed.mixing)["share"][0])

    assert share(0) == share(0, train=subject.train.with_batch(5))
    assert len({share(0), share(1), share(2), share(0, seed=1)}) == 4


def test_only_where_the_run_mixes_does_an_older_result_answer_another_question(subject):
    study, plain = (studies.build("hessian_spectrum", mixed=mixed, **SMALL) for mixed in (True, False))
    mixing = mixing_subject(subject, mixup=0.8)
    assert "mixed" not in study.settings()
    assert "mixing" not in identity.asked(study, subject)
    older = identity.asked(study, dataclasses.replace(mixing, mixing={}))
    assert identity.difference(older, identity.asked(study, mixing)) == "mixing"
    assert identity.difference(identity.asked(study, mixing), identity.asked(plain, mixing)) == "settings"
    assert "mixing" not in identity.asked(studies.build("accuracy"), mixing)
    objective = settings.default().objective
    assert runs._mixing(objective) == {}
    objective.update({"mixup": 0.8, "mix_switch": 0.3})
    assert runs._mixing(objective) == {"mixup": 0.8, "cutmix": 0.0, "switch": 0.3}


def test_the_loss_is_that_of_soft_labels_and_other_mixtures_are_not_compared(subject):
    study = studies.build("hessian_spectrum", **SMALL)
    mixing = mixing_subject(subject, mixup=0.8)
    mixed = study.run(mixing)
    images, share = subject.train.images[16:24], mixed.records["share"][2]
    images = share * images + (1 - share) * np.roll(images, 1, axis=0)
    logits = np.asarray(bent(mixing.classifier.params, images), np.float64)
    expected = (
        -(soft(subject.train.labels[16:24], share) * scipy.special.log_softmax(logits, axis=1)).sum(axis=1).mean()
    )
    np.testing.assert_allclose(mixed.records["loss"][2], expected, rtol=1e-5)
    plain = dataclasses.replace(mixed, records={key: value for key, value in mixed.records.items() if key != "share"})
    assert study.compare(mixed, mixed)
    assert study.compare(plain, mixed) == []
    other = dataclasses.replace(mixed, records={**mixed.records, "share": mixed.records["share"] + 0.1})
    assert study.compare(mixed, other) == []
    captions = [study.tables({"run": one})["hessian_spectrum"].caption for one in (plain, mixed)]
    assert ["mixed as in training (run)" in caption for caption in captions] == [False, True]
    assert study.programs(mixing)[-1].arguments[1].keys() == {
        "image",
        "label",
        "partner",
        "share",
    }


def test_weight_decay_is_an_exact_shift(subject):
    options = {"batch": 8, "mini_batches": 1, "top": 3, "rank": 20}
    plain = studies.build("hessian_spectrum", weight_decay=0.0, **options).chunk(subject, 0)
    shifted = studies.build("hessian_spectrum", weight_decay=0.25, **options).chunk(subject, 0)
    np.testing.assert_allclose(shifted["eigenvalues"], plain["eigenvalues"] + 0.25, rtol=1e-5)


def test_new_mini_batches_and_equal_models_compile_nothing(subject):
    subject = dataclasses.replace(subject, classifier=classifier.wrap(counted, subject.classifier.variables))
    study = studies.build("hessian_spectrum", batch=8, mini_batches=3, top=2, rank=20)
    study.chunk(subject, 0)
    count = len(TRACES)
    assert count > 0
    study.chunk(subject, 1)
    other = make_subject(seed=3)
    study.chunk(dataclasses.replace(other, classifier=classifier.wrap(counted, other.classifier.variables)), 2)
    assert len(TRACES) == count


def test_negative_share_and_mean_positive_of_known_eigenvalues(subject):
    study = studies.build("hessian_spectrum", batch=8, mini_batches=2, top=3, rank=20)
    records = dict(study.run(subject).records)
    records["eigenvalues"] = np.array([[4.0, -1.0, 1e-9], [2.0, -3.0, -1.0]])
    records["residuals"] = np.zeros((2, 3))
    records["noise"] = np.full(2, 1e-6)
    records["converged"] = np.array([[True, True, False], [True, True, True]])
    summary = study.summarise(records)
    np.testing.assert_allclose(summary["nep"]["value"], 3 / 6)
    np.testing.assert_allclose(summary["ape"]["value"], 3.0)
    np.testing.assert_allclose(summary["largest"]["value"], 3.0)
    np.testing.assert_allclose(summary["smallest"]["value"], -2.0)
    np.testing.assert_allclose(summary["unresolved"], 1 / 6)
    assert summary["nep"]["over"] == "mini-batches"
    assert any("did not reach" in caveat for caveat in summary["caveats"])
    assert any("no sign" in caveat for caveat in summary["caveats"])
    assert study.figures({"run": studies.Finding(study.settings(), records, summary)})


def test_smoothing_moves_no_mass_across_the_sign():
    grid = np.linspace(-30, 30, 6001)
    points = np.array([-2.0, 0.1, 0.2, 5.0])
    density = spectrum_figures._density(points, grid)
    step = grid[1] - grid[0]
    np.testing.assert_allclose(density.sum() * step, 1.0, atol=0.01)
    np.testing.assert_allclose(density[grid < 0].sum() * step, 0.25, atol=0.01)


def test_runs_that_saw_other_images_are_not_compared(subject):
    study = studies.build("hessian_spectrum", batch=8, mini_batches=3, top=2, rank=20)
    first = study.run(subject)
    other = dataclasses.replace(first, records={**first.records, "rows": first.records["rows"] + 1})
    assert study.compare(first, other) == []


def images_only(images):
    return linear({"kernel": jnp.ones((36, 3)), "bias": jnp.zeros(3)}, images)


def test_when_it_does_not_apply(subject):
    study = studies.build("hessian_spectrum")
    assert study.applicable(subject) is None
    assert "variables" in study.applicable(dataclasses.replace(subject, classifier=classifier.wrap(images_only)))
    assert "training images" in study.applicable(dataclasses.replace(subject, train=None))
    with pytest.raises(errors.UserError, match="training images"):
        study.run(dataclasses.replace(subject, train=None))
    with pytest.raises(errors.UserError, match="mini_batches is 0"):
        studies.build("hessian_spectrum", mini_batches=0)


SMALL = {"batch": 8, "mini_batches": 3, "top": 2, "rank": 20}


def with_history(subject, *, scale=0.5, steps=(2, 5, 9), warmup=5):
    """A subject whose weights at step `s` were `(scale + s / 100)` times what they are; reading is counted."""
    reads = []

    def reader(step):
        def read():
            reads.append(step)
            return jax.tree.map(lambda leaf: (scale + step / 100) * leaf, subject.classifier.params)

        return read

    past = dataclasses.replace(subject, history={step: reader(step) for step in steps}, warmup=warmup)
    return past, reads


def test_the_early_phase_is_the_first_checkpoint_after_the_warm_up(subject):
    past, reads = with_history(subject)
    study = studies.build("hessian_spectrum", early=True, **SMALL)
    assert study.looks_back(past) == (5,)
    finding = study.run(past)
    assert set(reads) == {5}
    alone = studies.build("hessian_spectrum", **SMALL)
    end = alone.run(past)
    for name in end.records:
        np.testing.assert_array_equal(end.records[name], finding.records[name])
    then = dataclasses.replace(subject, classifier=subject.classifier.with_params(past.history[5]()))
    early = alone.run(then)
    np.testing.assert_array_equal(finding.records["early/eigenvalues"], early.records["eigenvalues"])
    np.testing.assert_array_equal(finding.records["early/step"], 5)
    summary = finding.summary
    assert summary["early"]["step"] == 5
    assert summary["early"]["nep"] == early.summary["nep"]
    assert summary["early"]["ape"] == early.summary["ape"]
    assert summary["nep"] == end.summary["nep"]
    assert len(study.compare(finding, finding)) == 2
    rows = study.tables({"run": finding})["hessian_spectrum"].rows
    assert [row[1] for row in rows] == ["early (step 5)", "end"]
    assert study.passes(past) == tuple(2 * number for number in alone.passes(past))


def test_running_statistics_are_those_of_the_step():
    def normed(variables, images):
        return linear(variables["params"], images) / variables["statistics"]

    model = classifier.Classifier(
        {"params": {"w": jnp.ones(1)}, "statistics": jnp.float32(2.0)}, module=None, spec=None
    )
    then = {"params": {"w": jnp.zeros(1)}, "statistics": jnp.float32(7.0)}
    subject = dataclasses.replace(make_subject(), classifier=model, history={3: studies.Snapshot(lambda: then)})
    assert subject.past(3).variables is then
    assert subject.history[3]() is then["params"]
    plain = dataclasses.replace(subject, history={3: lambda: then["params"]})
    assert plain.past(3).variables["statistics"] == 2.0
    assert dataclasses.replace(subject, warmup=4).early() is None


def test_without_a_checkpoint_of_the_early_phase_it_says_so(subject):
    study = studies.build("hessian_spectrum", early=True, **SMALL)
    finding = study.run(subject)
    assert "early" not in finding.summary
    assert any("kept no checkpoint after its warm-up" in caveat for caveat in finding.summary["caveats"])
    assert study.looks_back(subject) == ()
    later, _ = with_history(subject)
    assert identity.difference(identity.asked(study, subject), identity.asked(study, later)) == "history"
    # What is off is no setting, so that results from before there was one are still the answer.
    plain = studies.build("hessian_spectrum", **SMALL)
    assert not {"early", "overlaps", "blocks"} & plain.settings().keys()
    assert "history" not in identity.asked(plain, later)
    assert study.settings()["early"] is True


def test_overlaps_are_those_of_dense_eigenvectors_and_the_same_after_a_resume(subject):
    past, _ = with_history(subject, scale=0.1)
    study = studies.build("hessian_spectrum", early=True, overlaps=True, **SMALL)
    finding = study.run(past)
    again = study.chunk(past, 1)
    for name, value in again.items():
        np.testing.assert_array_equal(value[0], finding.records[name][1])
    spaces = {}
    for phase, scale in (("early", 0.15), ("end", 1.0)):
        for index in range(2):
            params = jax.tree.map(lambda leaf, scale=scale: scale * leaf, subject.classifier.params)
            values, vectors = np.linalg.eigh(linear_hessian(params, subject.train.images[8 * index : 8 * index + 8]))
            spaces[phase, index] = vectors[:, np.argsort(-np.abs(values))[:2]]

    def overlap(first, second):
        return np.sum((first.T @ second) ** 2) / 2

    assert np.isnan(finding.records["overlap"][0])
    records = finding.records
    # Ritz vectors are as exact as residual over gap: measured 2e-4.
    for found, expected in (
        (records["overlap"][1], overlap(spaces["end", 0], spaces["end", 1])),
        (records["early/overlap"][1], overlap(spaces["early", 0], spaces["early", 1])),
        (records["early/overlap_with_end"][1], overlap(spaces["early", 1], spaces["end", 1])),
    ):
        np.testing.assert_allclose(found, expected, atol=2e-3)
        assert 0.02 < expected < 0.98
    summary = finding.summary
    assert summary["chance_overlap"] == 2 / summary["parameters"]
    np.testing.assert_allclose(summary["overlap"]["value"], records["overlap"][1:].mean())
    assert "hessian_overlaps" in study.figures({"run": finding})
    assert "overlap" in study.tables({"run": finding})["hessian_spectrum"].columns[6]


def test_blocks_are_those_of_the_dense_hessian(subject):
    study = studies.build("hessian_spectrum", blocks=True, batch=8, mini_batches=2, top=4, rank=30)
    finding = study.run(subject)
    assert list(finding.records["exhibit/blocks"]) == ["bias", "kernel"]
    dense = linear_hessian(subject.classifier.params, subject.train.images[8:16])
    values, known = finding.records["blocks/values"], []
    assert values.shape == (2, 2, 4)
    for place, block in enumerate((dense[:3, :3], dense[3:, 3:])):
        expected = np.sort(np.linalg.eigvalsh(block) + 0.01)[::-1][:4]
        # Lanczos stops at a relative residual of 1e-2, which is squared in the value.
        np.testing.assert_allclose(values[1, place, : len(expected)], expected, rtol=1e-3)
        known.append(len(expected))
    assert known == [3, 4]
    # The bias has three eigenvalues: a fourth would be one of the zeros outside of it.
    assert np.isnan(values[:, 0, 3]).all()
    assert np.isfinite(values[:, 1]).all()
    entry = finding.summary["blocks"]["kernel"]
    np.testing.assert_allclose([size["value"] for size in entry["magnitudes"]], values[:, 1].mean(axis=0))
    np.testing.assert_allclose(entry["ape"]["value"], values[:, 1].mean())
    assert entry["nep"]["value"] == 0
    assert len(finding.summary["blocks"]["bias"]["magnitudes"]) == 3
    figure = study.figures({"run": finding})["hessian_blocks"]
    marks = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    np.testing.assert_allclose(marks[1].get_xdata(), [finding.summary["blocks"]["bias"]["magnitudes"][1]["value"]])
    assert len(marks) == 7
    rows = study.tables({"run": finding})["hessian_blocks"].rows
    assert [row[1] for row in rows] == ["bias", "kernel"]
    assert rows[0][5] is None
    np.testing.assert_allclose([cell.value for cell in rows[1][2:6]], values[:, 1].mean(axis=0))
    forward, _ = study.passes(subject)
    assert forward == 2 * (8 + 3 * 2 * 30 * 8)
    # A result from before there was more than the largest of each block is still shown.
    summary = {**finding.summary, "blocks": {name: {"negative": 0.0} for name in finding.summary["blocks"]}}
    records = {**finding.records, "blocks/values": values[:, :, 0]}
    older = {"run": dataclasses.replace(finding, records=records, summary=summary)}
    assert "hessian_blocks" in study.figures(older)
    rows = study.tables(older)["hessian_blocks"].rows
    np.testing.assert_allclose([row[2].value for row in rows], values[:, :, 0].mean(axis=0))


def test_the_plan_holds_every_phase_and_block(subject):
    past, reads = with_history(subject)
    study = studies.build("hessian_spectrum", early=True, blocks=True, **SMALL)
    plain = studies.build("hessian_spectrum", **SMALL)
    spectrum, *_, value = study.programs(past)
    assert [one.times for one in (spectrum, value)] == [2 * one.times for one in plain.programs(past)]
    assert study.programs(past)[1].times == 2 * spectrum.times
    assert reads == []


EVERYTHING = {"early": True, "overlaps": True, "blocks": True}


@pytest.mark.parametrize("options", [{}, pytest.param(EVERYTHING, marks=pytest.mark.slow)])
def test_mini_batches_in_lock_step_are_those_one_by_one(subject, options):
    if options:
        params = jax.tree.map(lambda leaf: 0.5 * leaf, subject.classifier.params)
        subject = dataclasses.replace(subject, history={3: lambda: params})
    settings = {"batch": 8, "mini_batches": 4, "top": 3, "rank": 20, **options}
    alone = studies.build("hessian_spectrum", **settings)
    assert "together" not in alone.settings()  # As before there was a choice.
    study = studies.build("hessian_spectrum", together=2, **settings)
    assert (alone.chunks(subject), study.chunks(subject)) == (4, 2)
    found, expected = study.run(subject).records, alone.run(subject).records
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        scale = np.abs(values).max() if values.dtype.kind == "f" and np.isfinite(values).any() else 1.0
        if name.endswith(("residuals", "applications", "noise")):
            continue  # Of the same size, but what rounding makes of them.
        if values.dtype.kind == "f":
            np.testing.assert_allclose(found[name], values, atol=2e-5 * max(np.nanmax(np.abs(values)), scale, 1e-3))
        else:
            np.testing.assert_array_equal(found[name], values)
    with pytest.raises(errors.UserError, match="together is 3 for 4 mini-batches"):
        studies.build("hessian_spectrum", together=3, **settings)


def test_the_programs_of_lock_step_are_planned(subject):
    study = studies.build("hessian_spectrum", batch=8, mini_batches=4, rank=20, together=4)
    steps, loss = study.programs(subject)
    assert steps.times == 2  # Ten steps to a look, for all four at once.
    assert loss.times == 4
