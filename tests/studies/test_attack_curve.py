"""Robust accuracy of linear models in closed form, the guards on models that must trip them, and real images."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import linear, make_stream, make_subject

from robust_vit import attacks, classifier, data, errors, studies

TRACES = []


def two_class(variables, images):
    TRACES.append(None)
    score = images.reshape(images.shape[0], -1) @ variables["weight"] + variables["bias"]
    return jnp.stack([-score, score], axis=1)


def quantised(variables, images):
    return two_class(variables, jnp.round(images * 255.0) / 255.0)


def periodic(variables, images):
    """Right at the clean image and again at twice the distance that breaks it: a gradient that misleads a long step."""
    score = images.reshape(images.shape[0], -1) @ variables["weight"] + variables["bias"]
    score = jnp.cos(score)
    return jnp.stack([-score, score], axis=1)


def make_two_class(apply=two_class, scale=1.0, seed=0, bias=None):
    generator = np.random.default_rng(seed)
    images = generator.uniform(0.4, 0.6, (96, 5, 5, 1))
    weight = scale * generator.normal(0, 1, 25)
    score = (images.reshape(96, -1) - 0.5) @ weight
    variables = {"weight": jnp.asarray(weight, jnp.float32), "bias": jnp.float32(-0.5 * weight.sum())}
    if bias is not None:
        variables["bias"] += bias
    subject = studies.Subject(
        classifier=classifier.wrap(apply, variables),
        test=make_stream(images, (score > 0).astype(np.int32)),
        num_classes=2,
        threat="noise/linf-0.02",
    )
    return subject, np.abs(score) / np.abs(weight).sum(), np.abs(score) / np.linalg.norm(weight)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_linear_model_breaks_just_where_the_closed_form_says(norm):
    subject, *distances = make_two_class()
    distance = distances[0 if norm == "linf" else 1]
    sizes = tuple(np.quantile(distance, (0.2, 0.5, 0.8)).tolist())
    study = studies.build(
        "attack_curve", attacks=("fgsm", "pgd"), epsilons=sizes, norm=norm, batch=32, examples=None, steps=20
    )
    finding = study.run(dataclasses.replace(subject, threat=None))
    for name in ("fgsm", "pgd"):
        for column, size in enumerate(sizes):
            # PGD in L2 keeps a little of its random start: it breaks all that is within 0.98 of the size, not 0.999.
            clear = np.abs(distance / size - 1) > (1e-3 if (name, norm) != ("pgd", "l2") else 0.02)
            expected = distance < size
            found = finding.records[f"success/{name}"][:, column]
            np.testing.assert_array_equal(found[clear], expected[clear])
            assert finding.records[f"distance/{name}"][:, column].max() <= size * (1 + 1e-5)
    assert finding.summary["clean"]["value"] == 1.0
    assert not any(guard["fired"] for guard in finding.summary["guards"].values())
    assert finding.records["success/pgd"][:, -1].all()  # The box alone bounds the last one.


def test_one_compilation_for_all_sizes_chunks_and_equal_models():
    study = studies.build("attack_curve", batch=32, steps=2, examples=None)
    subject, *_ = make_two_class()
    study.chunk(subject, 0)
    count = len(TRACES)
    assert count > 0
    study.chunk(subject, 1)
    other = studies.build("attack_curve", batch=32, steps=2, examples=None, multiples=(0.3, 0.9, 1.7, 2.2))
    other.chunk(make_two_class(scale=2.0, seed=1)[0], 2)
    assert len(TRACES) == count


def test_what_is_misclassified_is_not_robust():
    subject, *_ = make_two_class(bias=0.2)
    finding = studies.build("attack_curve", batch=32, steps=2, examples=None).run(subject)
    wrong = ~finding.records["correct"]
    assert wrong.any()
    assert finding.records["success/fgsm"][wrong].all()
    assert finding.summary["clean"]["value"] == 1 - wrong.mean()


def test_the_envelope_never_rises_and_a_raw_curve_that_does_is_told():
    subject, distance, _ = make_two_class(apply=periodic, scale=1.0, bias=0.0)
    labels = np.ones(96, np.int32)
    # The score is 0 mod 2π in every image's centre; the wave turns back at twice the distance.
    stream = dataclasses.replace(subject.test, labels=labels)
    weight = np.abs(np.asarray(subject.classifier.variables["weight"])).sum()
    sizes = (0.6 * np.pi / weight, 1.9 * np.pi / weight)
    study = studies.build("attack_curve", attacks=("fgsm",), epsilons=sizes, batch=32, examples=None, unbounded=False)
    summary = study.run(dataclasses.replace(subject, test=stream, threat=None)).summary
    del distance
    points = summary["curves"]["fgsm"]
    assert points[1]["raw"] > points[0]["raw"] + 0.3
    assert points[1]["value"] <= points[0]["value"]
    assert summary["guards"]["monotone/fgsm"]["fired"]
    assert any("masking" in caveat for caveat in summary["caveats"])


def test_a_masked_gradient_trips_its_guards():
    subject, *_ = make_two_class(apply=quantised)
    summary = studies.build("attack_curve", attacks=("fgsm",), batch=32, examples=None).run(subject).summary
    assert summary["curves"]["fgsm"][-1]["value"] == 1.0
    assert summary["guards"]["gradient/fgsm"]["fired"]
    assert summary["guards"]["unbounded"]["fired"]
    assert not summary["guards"]["deterministic"]["fired"]


def test_guards_read_the_records():
    study = studies.build("attack_curve", batch=32, steps=2, examples=None)
    records = dict(study.run(make_two_class()[0]).records)
    records["exhibit/deterministic"] = np.array([False])
    records["inside/pgd"] = records["inside/pgd"].copy()
    records["inside/pgd"][3, 1] = False
    records["success/pgd"] = np.zeros_like(records["success/pgd"])
    guards = study.summarise(records)["guards"]
    assert {name for name, guard in guards.items() if guard["fired"]} >= {"deterministic", "ball/pgd", "order"}
    assert not guards["ball/fgsm"]["fired"]


def not_differentiable(images):
    shape = jax.ShapeDtypeStruct((images.shape[0], 3), jnp.float32)
    return jax.pure_callback(lambda x: np.zeros((len(x), 3), np.float32), shape, images)


def test_when_it_does_not_apply(subject):
    study = studies.build("attack_curve")
    assert study.applicable(subject) is None
    assert "threat" in study.applicable(dataclasses.replace(subject, threat=None))
    foreign = dataclasses.replace(subject, classifier=classifier.wrap(not_differentiable))
    assert "differentiated" in study.applicable(foreign)
    with pytest.raises(errors.UserError, match="differentiated"):
        study.run(foreign)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"attacks": ("pdg",)}, "did you mean 'pgd'"),
        ({"attacks": ()}, "name some of"),
        ({"attacks": ("fgsm", "fgsm")}, "each of them once"),
        ({"attacks": "pgd"}, "as a tuple"),
        ({"attacks": ("pgd(stesp=3)",)}, "did you mean 'steps'"),
        ({"attacks": ("pgd(3)",)}, "name its options"),
        ({"attacks": ("pgd(epsilon=0.1)",)}, "epsilon is a setting of the study"),
        ({"attacks": ("pgd(steps=3",)}, "not understood"),
        ({"multiples": (1.0, 0.5)}, "rising order"),
        ({"epsilons": (0.0, 0.1)}, "positive"),
        ({"epsilons": ("8/256x",)}, "write 0.03 or '8/255'"),
        ({"threat": "cifar10/linf8"}, "threat model"),
    ],
)
def test_wrong_settings_are_told_before_anything_runs(options, words):
    with pytest.raises(errors.UserError, match=words):
        studies.build("attack_curve", **options)


@pytest.fixture
def toys(monkeypatch):
    monkeypatch.setitem(attacks.ATTACKS, "nearest", "toy_attacks:nearest")
    monkeypatch.setitem(attacks.ATTACKS, "sizeless", "toy_attacks:sizeless")


@pytest.mark.usefixtures("toys")
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_one_run_of_a_minimal_attack_gives_the_whole_curve(norm):
    subject, *distances = make_two_class()
    distance = distances[0 if norm == "linf" else 1]
    sizes = tuple(np.quantile(distance, (0.2, 0.5, 0.8)).tolist())
    study = studies.build(
        "attack_curve", attacks=("fgsm", "nearest"), epsilons=sizes, norm=norm, batch=32, examples=None, exhibits=4
    )
    subject = dataclasses.replace(subject, threat=None)
    records = study.run(subject).records
    np.testing.assert_allclose(records["distance/nearest"][:, 0], distance, rtol=2e-3, atol=2e-5)
    for column, size in enumerate(sizes):
        clear = np.abs(distance / size - 1) > 2e-3
        np.testing.assert_array_equal(records["success/nearest"][clear, column], (distance < size)[clear])
    assert records["success/nearest"][:, -1].all()
    # What is shown at the middle epsilon is what lies within it, and the clean image where the boundary is further away.
    shown = np.abs(records["exhibit/adversarial"] - records["exhibit/image"]).max(axis=(1, 2, 3))
    np.testing.assert_array_equal(shown > 0, distance[:4] <= sizes[1])
    assert (records["exhibit/prediction"] == records["label"][:4]).tolist() == (shown == 0).tolist()
    # One run of four evaluations and one judgement a chunk, against FGSM's four runs.
    assert study.passes(subject) == (96 * (4 * 2 + 5 + 1) + 32, 96 * (4 + 4))


@pytest.mark.usefixtures("toys")
def test_an_attack_without_a_size_has_no_curve():
    subject, *_ = make_two_class()
    with pytest.raises(errors.UserError, match="no epsilon and no distance"):
        studies.build("attack_curve", attacks=("sizeless",)).applicable(subject)


def test_one_attack_twice_with_other_options():
    subject, *_ = make_two_class()
    names = ("pgd(steps=2, loss='margin')", "pgd(random_start=False, step_size=2/255)")
    study = studies.build("attack_curve", attacks=names, steps=5, batch=32, examples=32, multiples=(1.0,))
    first, second = (attack for _, attack, _ in study._built(subject))
    assert (first.steps, first.loss.__name__, second.steps, second.random_start) == (2, "margin", 5, False)
    # A step in pixels is the same at every epsilon of the curve.
    assert second.epsilon * second.relative_step == pytest.approx(2 / 255)
    finding = study.run(subject)
    assert set(finding.summary["curves"]) == {*names, "worst case"}
    assert study.card(finding)["attacks"][names[0]] == {"kind": "bounded", "evaluations": 3}
    assert "order" not in finding.summary["guards"]
    other = studies.build("attack_curve", attacks=("fgsm",), batch=32, examples=32, multiples=(1.0,))
    assert other.compare(finding, other.run(subject)) == []


def test_a_curve_that_rises_slowly_is_told():
    """No two neighbours differ beyond chance, the ends do."""
    study = studies.build("attack_curve", attacks=("fgsm",), batch=32, examples=None, unbounded=False)
    records = dict(study.run(make_two_class()[0]).records)
    success = np.zeros((96, 5), bool)
    for column in range(5):
        success[: 40 - 4 * column, column] = True
    records["success/fgsm"] = success
    assert study.summarise(records)["guards"]["monotone/fgsm"]["fired"]
    records["success/fgsm"] = success[:, ::-1]
    assert not study.summarise(records)["guards"]["monotone/fgsm"]["fired"]


def test_a_fall_within_chance_is_noted_with_its_images():
    study = studies.build("attack_curve", attacks=("fgsm",), batch=32, examples=None, unbounded=False)
    records = dict(study.run(make_two_class()[0]).records)
    success = np.arange(96)[:, None] < np.asarray([[10, 30, 28, 40, 41]])
    records["success/fgsm"] = success
    summary = study.summarise(records)
    guard = summary["guards"]["monotone/fgsm"]
    assert (guard["fired"], guard["noted"]) == (False, True)
    assert "breaks 2 fewer of 96 images" in guard["detail"]
    assert guard["detail"] in summary["caveats"]
    records["success/fgsm"] = np.sort(success, axis=1)
    summary = study.summarise(records)
    assert not summary["guards"]["monotone/fgsm"]["noted"]
    assert not any("fewer" in caveat for caveat in summary["caveats"])


def test_the_raw_accuracy_stands_beside_the_envelope():
    study = studies.build("attack_curve", attacks=("fgsm",), batch=32, examples=None, unbounded=False)
    finding = study.run(make_two_class()[0])
    records = {**finding.records, "success/fgsm": np.arange(96)[:, None] < np.asarray([[12, 48, 24, 60, 96]])}
    finding = dataclasses.replace(finding, records=records, summary=study.summarise(records))
    table = study.tables({"a": finding})["attack_curve"]
    assert len(table.columns) == len(table.rows[0]) == 3 + 2 * 5
    cells = dict(zip(table.columns, table.rows[0], strict=True))
    envelope, raw = ([cell.value for name, cell in cells.items() if name.startswith(start)] for start in ("ε", "raw"))
    np.testing.assert_allclose(envelope, [0.875, 0.5, 0.5, 0.375, 0.0])
    np.testing.assert_allclose(raw, [0.875, 0.5, 0.75, 0.375, 0.0])


def test_epsilons_in_255ths_are_refused():
    for sizes in ((2, 8), (0.01, 0.02, 8)):  # One of them is enough, whatever the study turns on.
        with pytest.raises(errors.UserError, match="8/255, not 8"):
            studies.build("attack_curve", epsilons=sizes).applicable(make_two_class()[0])
    l2 = dataclasses.replace(make_subject(), threat="cifar10/l2-0.5")
    assert studies.build("attack_curve", epsilons=(2, 8)).applicable(l2) is None
    # A multiple of a threat that leaves the box is the box.
    wide = dataclasses.replace(make_subject(), threat="noise/linf-0.6")
    assert studies.build("attack_curve", multiples=(1.0, 2.0, 4.0)).conditions(wide)[2].tolist() == [0.6, 1.0]


def test_fractions_are_read():
    study = studies.build("attack_curve", epsilons=["2/255", "8/255"])
    _, center, curve = study.conditions(dataclasses.replace(make_subject(), threat="cifar10/linf-8"))
    np.testing.assert_allclose(curve, [2 / 255, 8 / 255])
    assert center == 8 / 255


@pytest.mark.needs_data
def test_a_linear_model_on_fashion_mnist(data_dir):
    def source(split):
        return data.open_source("fashion_mnist", split=split, data_dir=data_dir / "tfds")

    train = data.EvaluationStream(source("train[:2000]"), batch=2000).batch(0)
    test = data.EvaluationStream(source("test[:300]"), batch=100)
    # Ridge regression on one-hot labels, times a temperature: no training loop is needed for a linear model.
    flat = np.concatenate([train["image"].reshape(2000, -1), np.ones((2000, 1))], axis=1)
    targets = np.eye(10)[train["label"]] - 0.1
    solution = 8.0 * np.linalg.solve(flat.T @ flat + 50.0 * np.eye(785), flat.T @ targets)
    variables = {"kernel": jnp.asarray(solution[:-1], jnp.float32), "bias": jnp.asarray(solution[-1], jnp.float32)}
    subject = studies.Subject(
        classifier=classifier.wrap(linear, variables),
        test=test,
        num_classes=10,
        class_names=test.source.class_names,
        threat="fashion_mnist/linf-0.1",
    )
    accuracy = studies.build("accuracy", batch=100).run(subject).summary
    # Measured 0.813 and 0.987.
    assert 0.75 < accuracy["top1"]["value"] < 0.9
    assert accuracy["top5"]["value"] > 0.95
    finding = studies.build("attack_curve", batch=100, examples=200, steps=5).run(subject)
    worst, fgsm, pgd = (
        [point["value"] for point in finding.summary["curves"][name]] for name in ("worst case", "fgsm", "pgd")
    )
    # Measured: worst case 0.72, 0.64, 0.405, 0.09, 0; FGSM 0.44 and 0.16 at the third and fourth size.
    assert worst == sorted(worst, reverse=True)
    assert all(strong <= weak for strong, weak in zip(pgd, fgsm, strict=True))
    assert 0.3 < worst[2] < 0.5
    assert worst[3] < 0.15
    assert worst[4] == 0.0
    assert study_is_quiet(finding)


def study_is_quiet(finding):
    return not any(guard["fired"] for guard in finding.summary["guards"].values())
