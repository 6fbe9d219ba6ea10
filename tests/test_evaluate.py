"""Studies that are killed and go on; results that are read or computed anew; a foreign model and what is wrong with it."""

from __future__ import annotations

import dataclasses
import json
import logging
import pathlib
import types
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_vit import classifier, data, errors, evaluate, files, studies
from robust_vit.report import results


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiny(studies.Study):
    """Logits of each image, in chunks of a batch."""

    name: ClassVar[str] = "tiny"
    title: ClassVar[str] = "Tiny"
    question: ClassVar[str] = "?"
    paper: ClassVar[str] = "none"
    computed: ClassVar[list] = []

    batch: int = 4
    weights: tuple[float, ...] = (1.0, 2.0)

    def applicable(self, subject):
        return "it is named so." if subject.name == "unfit" else None

    def chunks(self, subject):
        return len(subject.test.with_batch(self.batch))

    def chunk(self, subject, index):
        self.computed.append(index)
        batch = subject.test.with_batch(self.batch).batch(index)
        logits = np.asarray(subject.classifier(batch["image"]))[batch["mask"]]
        records = {key: batch[key][batch["mask"]] for key in ("row", "label")} | {"logits": logits}
        if index == 1:
            records["exhibit/image"] = batch["image"][:2]
        return records

    def summarise(self, records):
        return {"mean": records["logits"].mean(0), "worst": float("nan"), "count": len(records["row"]), "caveats": []}


def _images(count=18, seed=0):
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (count, 4, 4, 1)).astype(np.uint8), np.arange(count) % 3


def _linear(variables, images):
    return images.reshape(len(images), -1) @ variables


def _subject(weights_seed=0, **changes):
    images, labels = _images()
    stream = data.EvaluationStream(data.from_arrays(images, labels), batch=8)
    weights = jax.random.normal(jax.random.key(weights_seed), (16, 3))
    given = dict(classifier=classifier.wrap(_linear, weights), test=stream, num_classes=3, name="model")
    return studies.Subject(**(given | changes))


def _bytes(directory):
    return {name: (directory / name).read_bytes() for name in (results.RECORDS, results.RESULT)}


@pytest.fixture(autouse=True)
def _fresh():
    Tiny.computed.clear()


def test_records_are_merged_in_order(tmp_path):
    found = evaluate.run_study(Tiny(), "tiny", _subject(), tmp_path / "step_7")
    records = found.finding.records
    np.testing.assert_array_equal(records["row"], np.arange(18))
    np.testing.assert_array_equal(records["label"], np.arange(18) % 3)
    assert records["exhibit/image"].shape == (2, 4, 4, 1)
    assert set(records) == {"row", "label", "logits", "exhibit/image"}
    assert found.finding.summary["count"] == 18
    assert found.finding.summary["worst"] is None
    assert found.step == 7
    assert found.provenance["attempts"] == 1
    assert found.provenance["versions"]["jax"] == jax.__version__
    assert found.provenance["data_fingerprint"] == _subject().test.source.fingerprint
    assert not (tmp_path / "step_7" / "chunks").exists()


class _Killed(BaseException):
    """SIGKILL at a chosen write: nothing that the code does on the way out may matter."""


@pytest.mark.parametrize("survived", range(9))
def test_killed_after_any_write_ends_with_the_same_bytes(tmp_path, monkeypatch, survived):
    whole = tmp_path / "whole" / "step_0"
    evaluate.run_study(Tiny(), "tiny", _subject(), whole)
    write, count = files.write_bytes, [0]

    def killing_write(path, content):
        if count[0] == survived:
            raise _Killed
        count[0] += 1
        write(path, content)

    killed = tmp_path / "killed" / "step_0"
    Tiny.computed.clear()
    with monkeypatch.context() as patch:
        patch.setattr(files, "write_bytes", killing_write)
        # Journal, five chunks, records, provenance, result: nine writes.
        with pytest.raises(_Killed):
            evaluate.run_study(Tiny(), "tiny", _subject(), killed)
    assert not results.is_finished(killed)
    found = evaluate.run_study(Tiny(), "tiny", _subject(), killed)
    assert _bytes(killed) == _bytes(whole)
    assert len(Tiny.computed) == 5 + (1 <= survived <= 5)  # Only the chunk whose write was cut off is computed twice.
    assert found.provenance["attempts"] == (2 if survived else 1)
    assert not (killed / "chunks").exists()


@pytest.mark.parametrize("done", range(5))
def test_stopped_between_chunks_goes_on(tmp_path, done, caplog):
    caplog.set_level(logging.INFO)
    evaluate.run_study(Tiny(), "tiny", _subject(), tmp_path / "whole" / "step_0")
    Tiny.computed.clear()
    directory = tmp_path / "stopped" / "step_0"
    with pytest.raises(evaluate.Stopped, match=f"before chunk {done + 1} of 5"):
        evaluate.run_study(Tiny(), "tiny", _subject(), directory, stop=lambda: len(Tiny.computed) == done)
    evaluate.run_study(Tiny(), "tiny", _subject(), directory)
    assert Tiny.computed == [0, 1, 2, 3, 4]
    assert _bytes(directory) == _bytes(tmp_path / "whole" / "step_0")
    assert (f"goes on at chunk {done + 1} of 5" in caplog.text) == (done > 0)


def test_a_damaged_chunk_is_computed_again(tmp_path):
    directory = tmp_path / "step_0"
    with pytest.raises(evaluate.Stopped):
        evaluate.run_study(Tiny(), "tiny", _subject(), directory, stop=lambda: len(Tiny.computed) == 3)
    (directory / "chunks" / "00001.npz").write_bytes(b"PK\x03\x04")
    evaluate.run_study(Tiny(), "tiny", _subject(), directory)
    assert Tiny.computed == [0, 1, 2, 1, 3, 4]


def test_a_finished_study_is_read(tmp_path):
    first = evaluate.run_study(Tiny(), "tiny", _subject(), tmp_path / "step_0")
    Tiny.computed.clear()
    again = evaluate.run_study(Tiny(), "tiny", _subject(), tmp_path / "step_0")
    assert Tiny.computed == []
    assert again.finding.summary == first.finding.summary
    np.testing.assert_array_equal(again.finding.records["logits"], first.finding.records["logits"])


@pytest.mark.parametrize(
    ("study", "changes", "said"),
    [
        (Tiny(weights=(1.0,)), {}, "settings"),
        (Tiny(), {"seed": 3}, "seed"),
        (Tiny(), {"threat": "fashion_mnist/linf-0.1"}, "threat"),
        (Tiny(), {"weight_decay": 0.1}, "weight decay"),
        (Tiny(), {"classifier": classifier.wrap(_linear, jnp.ones((16, 3)))}, "model"),
        (Tiny(), {"test": data.EvaluationStream(data.from_arrays(*_images(seed=1)), batch=8)}, "data"),
        (Tiny(), {"train": data.TrainingStream(data.from_arrays(*_images(seed=1)), batch=8)}, "training data"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_other_questions_are_not_answered_by_old_results(tmp_path, caplog, study, changes, said, finished):
    directory = tmp_path / "step_0"
    if finished:
        evaluate.run_study(Tiny(), "tiny", _subject(), directory)
    else:
        with pytest.raises(evaluate.Stopped):
            evaluate.run_study(Tiny(), "tiny", _subject(), directory, stop=lambda: len(Tiny.computed) == 2)
    Tiny.computed.clear()
    evaluate.run_study(study, "tiny", _subject(**changes), directory)
    assert Tiny.computed == [0, 1, 2, 3, 4]
    assert f"of other {said};" in caplog.text


def test_an_outdated_result_is_gone_before_the_new_one_is_there(tmp_path):
    evaluate.run_study(Tiny(), "tiny", _subject(), tmp_path / "step_0")
    with pytest.raises(evaluate.Stopped):
        evaluate.run_study(Tiny(), "tiny", _subject(seed=3), tmp_path / "step_0", stop=lambda: True)
    assert not results.is_finished(tmp_path / "step_0")


def test_a_model_without_variables_is_known_by_its_logits(tmp_path):
    def first(images):
        return images.reshape(len(images), -1)[:, :3]

    def second(images):
        return images.reshape(len(images), -1)[:, 3:6]

    for model, computed in ((first, 5), (first, 5), (second, 10)):
        evaluate.run_study(Tiny(), "tiny", _subject(classifier=classifier.wrap(model)), tmp_path / "step_0")
        assert len(Tiny.computed) == computed


def test_a_study_that_does_not_apply_says_so(tmp_path):
    found = evaluate.run_study(Tiny(), "tiny", _subject(name="unfit"), tmp_path / "step_0")
    assert (found.skipped, found.finding, Tiny.computed) == ("it is named so.", None, [])
    assert json.loads((tmp_path / "step_0" / results.RESULT).read_text())["skipped"] == "it is named so."
    assert not (tmp_path / "step_0" / results.RECORDS).exists()


def test_ragged_records_are_refused(tmp_path):
    class Ragged(Tiny):
        def chunk(self, subject, index):
            return {"row": np.arange(3), "label": np.arange(2)}

    with pytest.raises(ValueError, match="one leading length"):
        evaluate.run_study(Ragged(), "tiny", _subject(), tmp_path / "step_0")


def test_evaluate_runs_lays_results_out(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    subjects = {"vit": _subject(name="vit"), "resnet": _subject(1, name="resnet")}
    found = evaluate.evaluate_runs(tmp_path, subjects, {"a": Tiny(), "b": Tiny(batch=6)}, {"vit": 3, "resnet": 4})
    assert {run: list(by_label) for run, by_label in found.items()} == {"vit": ["a", "b"], "resnet": ["a", "b"]}
    assert (tmp_path / "resnet" / "studies" / "b" / "step_4" / results.RESULT).is_file()
    assert "[3/4] b on vit" in caplog.text
    logits = [found["vit"][label].finding.records["logits"] for label in "ab"]
    np.testing.assert_allclose(*logits, atol=1e-6)


def test_progress_tells_what_is_left(tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    clock = iter(range(0, 1000, 6))
    monkeypatch.setattr(evaluate, "time", types.SimpleNamespace(monotonic=lambda: float(next(clock))))
    evaluate.run_study(Tiny(), "tiny", _subject(), tmp_path / "step_0")
    assert "tiny on model: 3 of 5 chunks, about 12 s left" in caplog.text


def test_build_studies():
    built = evaluate.build_studies({"accuracy": {"batch": 7}, "again": {"name": "accuracy"}, "mine": Tiny()})
    assert built["accuracy"].batch == 7
    assert built["again"].name == "accuracy"
    assert built["mine"] == Tiny()
    assert list(evaluate.build_studies(["accuracy"])) == list(evaluate.build_studies("accuracy")) == ["accuracy"]
    assert list(evaluate.build_studies()) == list(studies.STANDARD)
    assert evaluate.build_studies()["attack_curve"].examples == 256
    with pytest.raises(errors.UserError, match="did you mean 'accuracy'"):
        evaluate.build_studies(["acuracy"])


def _logits(images):
    return 5.0 * images.reshape(len(images), -1)[:, :3]


def _card(tmp_path, model=_logits, images=None, labels=None, **options):
    if images is None:
        images, labels = _images()
    options = {"studies": ["accuracy"], "workdir": tmp_path / "work"} | options
    return evaluate.report_card(model, images, labels, **options)


def test_report_card_of_a_function(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    images, labels = _images(40)
    card = _card(tmp_path, images=images, labels=labels, name="foreign", class_names=("hat", "coat", "bag"))
    expected = np.mean(np.argmax(images.reshape(40, -1)[:, :3], 1) == labels)
    assert card.summary["accuracy"]["top1"]["value"] == pytest.approx(expected)
    content = card.path.read_text(encoding="utf-8")
    assert "foreign" in content
    assert "coat" in content
    assert card.path == tmp_path / "work" / "report" / "index.html"
    assert caplog.records[-1].getMessage() == f"the report: {card.path}"
    second = _card(tmp_path, model=lambda x: -_logits(x), images=images, labels=labels, name="rival")
    assert "foreign and rival" in second.path.read_text(encoding="utf-8")


@pytest.mark.parametrize("shape", ["floats", "grey", "classifier", "source"])
def test_report_card_takes_images_and_models_in_other_forms(tmp_path, shape):
    images, labels = _images()
    expected = _card(tmp_path / "reference").summary
    given = {
        "floats": dict(images=images / 255, labels=labels),
        "grey": dict(images=images[..., 0], labels=labels),
        "classifier": dict(model=classifier.wrap(_logits)),
        "source": dict(images=data.from_arrays(images, labels), labels=None),
    }
    assert _card(tmp_path, **given[shape]).summary == expected


def test_report_card_of_an_image_folder(tmp_path):
    pil = pytest.importorskip("PIL.Image")
    images, labels = _images(12)
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = tmp_path / "images" / "abc"[label] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pil.fromarray(np.repeat(image, 3, -1)).save(path)
    card = _card(tmp_path, images=str(tmp_path / "images"))
    assert card.summary["accuracy"]["examples"] == 12
    assert list(card.summary["accuracy"]["by_class"]) == ["a", "b", "c"]
    with pytest.raises(errors.UserError, match="3 class folders and the model gives 4 logits: give class_names="):
        _card(tmp_path, model=lambda x: x.reshape(len(x), -1)[:, :4], images=tmp_path / "images")


def _probabilities(images):
    return jax.nn.softmax(_logits(images))


def _shift(images):
    return images.astype(np.float64) * 3 - 1


_MISTAKES = {
    "probabilities": (dict(model=_probabilities), "gives probabilities"),
    "one number an image": (dict(model=lambda x: x.mean((1, 2, 3))), r"gives shape \(18,\)"),
    "images mixed up": (dict(model=lambda x: _logits(x)[:3]), r"gives shape \(3, 3\)"),
    "training mode": (dict(model=lambda x: _logits(x) - _logits(x).mean(axis=0, keepdims=True)), "training mode"),
    "not finite": (dict(model=lambda x: jnp.log(-_logits(x) - 1.0)), "NaN or infinite logits"),
    "NumPy inside": (dict(model=lambda x: np.asarray(x).reshape(len(x), -1)), "no JAX function"),
    "wrong size": (dict(model=lambda x: x.reshape(len(x), 5, 5)), "fails on images of shape"),
    "no function": (dict(model=3), "the model is a int"),
    "Linen module": (dict(model=types.SimpleNamespace(apply=1, init=2)), "is a Linen module"),
    "two sets of variables": (dict(model=classifier.wrap(_logits), variables={}), "holds its own"),
    "labels out of range": (dict(labels=np.full(18, 3)), "of 4 classes and the model gives 3 logits"),
    "negative labels": (dict(labels=np.full(18, -1)), "label -1"),
    "one-hot labels": (dict(labels=np.eye(3, dtype=int)[np.arange(18) % 3]), "give their argmax"),
    "no labels": (dict(labels=None), "came without labels"),
    "too few labels": (dict(labels=np.zeros(3, int)), "labels are"),
    "float labels": (dict(labels=np.zeros(18)), "labels are"),
    "pixels to 255": (dict(images=_images()[0].astype(np.float32)), "divide by 255"),
    "normalised": (dict(images=_shift(_images()[0] / 255)), "undo the normalisation"),
    "NaN pixels": (dict(images=np.full((18, 4, 4, 1), np.nan)), "expected pixels in"),
    "channels first": (dict(images=np.zeros((18, 3, 8, 8), np.uint8)), "images have shape"),
    "class names": (dict(class_names=("a", "b", "c", "d")), "4 class names for 3 logits"),
    "study": (dict(studies=["acuracy"]), "did you mean 'accuracy'"),
    "name": (dict(name="a/b"), "run name 'a/b'"),
}


@pytest.mark.parametrize("mistake", _MISTAKES)
def test_report_card_names_the_mistake(tmp_path, mistake):
    changes, message = _MISTAKES[mistake]
    images, labels = _images()
    with pytest.raises(errors.UserError, match=message) as caught:
        _card(tmp_path, **({"images": images, "labels": labels} | changes))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "work").exists()


def test_report_card_refuses_a_random_model(tmp_path):
    calls = []

    def dropout(images):
        def noise(shape):
            calls.append(1)
            return np.random.default_rng(len(calls)).random(shape).astype(np.float32)

        return _logits(images) + jax.pure_callback(
            lambda x: noise((len(x), 3)), jax.ShapeDtypeStruct((len(images), 3), jnp.float32), images
        )

    with pytest.raises(errors.UserError, match="other logits in a second pass"):
        _card(tmp_path, model=dropout)


def test_paths_may_be_strings(tmp_path):
    evaluate.run_study(Tiny(), "tiny", _subject(), str(tmp_path / "step_0"))
    assert pathlib.Path(tmp_path / "step_0" / results.RESULT).is_file()
