"""The ground: errors, files, trees, losses, tables, the classifier, the command line's helpers."""

from __future__ import annotations

import errno
import json
import os
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_vit import classifier, command_line, errors, files, losses, mesh, progress, tables, trees


class TestErrors:
    def test_an_unknown_name_gets_the_nearest_first(self):
        message = str(errors.unknown("model", "vitt", ["vit", "resnet", "swin"]))
        assert message.startswith("unknown model 'vitt': did you mean 'vit'?")
        assert message.endswith("Known: resnet, swin, vit.")

    def test_nothing_near_lists_the_known_only(self):
        assert "did you mean" not in str(errors.unknown("model", "zzz", ["vit"]))


class TestFiles:
    def test_round_trips(self, tmp_path):
        files.write_json(
            tmp_path / "a" / "b.json", {"x": np.float32(0.5), "y": (1, 2), "z": np.arange(2), "n": float("nan")}
        )
        assert files.read_json(tmp_path / "a" / "b.json") == {"x": 0.5, "y": [1, 2], "z": [0, 1], "n": None}
        files.write_npz(tmp_path / "c.npz", {"x": np.arange(3)})
        assert files.read_npz(tmp_path / "c.npz")["x"].tolist() == [0, 1, 2]

    def test_equal_arrays_are_equal_bytes(self, tmp_path):
        arrays = {"b": np.arange(3), "a": np.ones((2, 2))}
        files.write_npz(tmp_path / "1.npz", arrays)
        files.write_npz(tmp_path / "2.npz", dict(reversed(arrays.items())))
        assert (tmp_path / "1.npz").read_bytes() == (tmp_path / "2.npz").read_bytes()

    def test_a_failed_write_leaves_the_old_file_and_no_other(self, tmp_path, monkeypatch):
        files.write_text(tmp_path / "x", "old")

        def fail(_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(errors.UserError, match="no space left while writing"):
            files.write_text(tmp_path / "x", "new")
        assert [path.name for path in tmp_path.iterdir()] == ["x"]
        assert (tmp_path / "x").read_text() == "old"

    def test_a_really_full_device_is_one_line(self):
        with pytest.raises(errors.UserError, match="no space left"), files.disk_errors("/dev/full"):
            with open("/dev/full", "w") as file:
                file.write("x")

    @pytest.mark.parametrize("path", ["file/x", "file/folder/x", "folder"])
    def test_what_stands_in_the_way_is_one_line(self, tmp_path, path):
        (tmp_path / "file").touch()
        (tmp_path / "folder").mkdir()
        with pytest.raises(errors.UserError, match=f"cannot write {tmp_path}/{path}: .*Choose a folder"):
            files.write_text(tmp_path / path, "x")

    def test_damage_names_the_file(self, tmp_path):
        (tmp_path / "x.json").write_text("{")
        (tmp_path / "x.npz").write_bytes(b"PK\x03\x04junk")
        for read in (files.read_json, files.read_npz):
            path = tmp_path / f"x.{read.__name__.removeprefix('read_')}"
            with pytest.raises(errors.UserError, match=f"{path} is damaged"):
                read(path)


class TestTrees:
    tree = {"a": {"kernel": jnp.array([1.0, 2.0]), "bias": jnp.array([3.0])}, "b": jnp.array([[4.0]])}

    def test_algebra(self):
        assert float(trees.dot(self.tree, self.tree)) == 30.0
        assert float(trees.norm(self.tree)) == pytest.approx(30.0**0.5)
        assert float(trees.add(self.tree, self.tree, -3.0)["b"][0, 0]) == -8.0
        assert trees.count(self.tree) == 4

    def test_paths_and_masks(self):
        assert trees.paths(self.tree) == ["a/bias", "a/kernel", "b"]
        assert trees.mask(self.tree, "kernel$") == {"a": {"kernel": True, "bias": False}, "b": False}

    def test_a_draw_depends_on_its_path_alone(self):
        key = jax.random.key(0)
        alone = trees.normal_like(key, {"b": self.tree["b"]})
        assert np.array_equal(alone["b"], trees.normal_like(key, self.tree)["b"])
        other = trees.normal_like(key, {"c": self.tree["b"]})
        assert not np.array_equal(alone["b"], other["c"])

    def test_all_finite(self):
        assert bool(trees.all_finite(self.tree))
        assert not bool(trees.all_finite({**self.tree, "b": jnp.array([jnp.nan])}))


class TestLosses:
    logits = np.array([[2.0, -1.0, 0.5], [0.0, 0.0, 0.0]])
    labels = np.array([2, 1])

    def test_cross_entropy_against_its_definition(self):
        probabilities = np.exp(self.logits) / np.exp(self.logits).sum(-1, keepdims=True)
        expected = -np.log(probabilities[[0, 1], self.labels])
        np.testing.assert_allclose(
            losses.cross_entropy(jnp.asarray(self.logits), jnp.asarray(self.labels)), expected, rtol=1e-6
        )
        smooth = np.full((2, 3), 0.3 / 3)
        smooth[[0, 1], self.labels] += 0.7
        np.testing.assert_allclose(
            losses.cross_entropy(jnp.asarray(self.logits), jnp.asarray(self.labels), smoothing=0.3),
            -(smooth * np.log(probabilities)).sum(-1),
            rtol=1e-6,
        )

    def test_margin_is_positive_where_wrong(self):
        np.testing.assert_allclose(losses.margin(jnp.asarray(self.logits), jnp.asarray(self.labels)), [1.5, 0.0])


class TestTables:
    table = tables.Table(
        "t",
        ("run", "accuracy", "n"),
        [("a_b", tables.Number(0.5, 0.4, 0.6, format=".1%"), 3), ("c", tables.Number(None), 4)],
    )

    def test_csv_has_the_interval_in_columns(self):
        assert self.table.csv().splitlines() == [
            "run,accuracy,accuracy (low),accuracy (high),n",
            "a_b,0.5,0.4,0.6,3",
            "c,,,,4",
        ]

    def test_latex_escapes(self):
        text = self.table.latex()
        assert r"a\_b & 50.0\% [40.0\%, 60.0\%] & 3 \\" in text
        assert text.count("{") == text.count("}")

    def test_a_missing_number_says_so(self):
        assert tables.text(self.table.rows[1][1]) == "n/a"


class _Linear(nn.Module):
    traces = 0

    @nn.compact
    def __call__(self, images, *, train=False, gates=None, norm_set="main"):
        type(self).traces += 1
        return nn.Dense(4)(images.reshape(images.shape[0], -1)), {"stem": images}


class TestClassifier:
    spec = classifier.ImageSpec(size=(2, 2), channels=3, mean=(0.5, 0.25, 0.0), std=(0.5, 1.0, 2.0))

    def test_grey_is_repeated_then_normalised(self):
        out = self.spec.normalize(jnp.full((1, 2, 2, 1), 0.75))
        np.testing.assert_allclose(out[0, 0, 0], [0.5, 0.5, 0.375])

    def test_size_is_reached_in_the_graph(self):
        assert self.spec.normalize(jnp.zeros((1, 5, 7, 3))).shape == (1, 2, 2, 3)

    @pytest.mark.parametrize("shape", [(2, 2, 3), (1, 2, 2, 4)])
    def test_wrong_shapes_are_named(self, shape):
        with pytest.raises(errors.UserError, match="expected \\[batch, height, width, 1 or 3\\]"):
            self.spec.normalize(jnp.zeros(shape))

    def test_mean_of_the_wrong_length(self):
        with pytest.raises(errors.UserError, match="mean and std have 2 and 3 values for 3 channels"):
            classifier.ImageSpec(size=(2, 2), mean=(0.5, 0.5))

    def test_two_equal_classifiers_cost_one_trace(self):
        function = jax.jit(lambda model, images: model(images))
        images = jnp.zeros((1, 2, 2, 3))
        variables = _Linear().init(jax.random.key(0), images)
        _Linear.traces = 0
        for seed in range(3):
            weights = jax.tree.map(lambda leaf, seed=seed: leaf + seed, variables)
            spec = classifier.ImageSpec(size=(2, 2), channels=3, mean=(0.5, 0.25, 0.0), std=(0.5, 1.0, 2.0))
            function(classifier.Classifier(variables=weights, module=_Linear(), spec=spec), images)
        assert _Linear.traces == 1

    def test_a_foreign_function_with_and_without_variables(self):
        images = jnp.ones((2, 1, 1, 1))
        plain = classifier.wrap(_double)
        np.testing.assert_allclose(plain(images), 2.0 * np.ones((2, 1)))
        with_variables = classifier.wrap(_scaled, {"factor": jnp.float32(3.0)})
        np.testing.assert_allclose(with_variables(images), 3.0 * np.ones((2, 1)))
        np.testing.assert_allclose(
            with_variables.with_params({"factor": jnp.float32(4.0)})(images), 4.0 * np.ones((2, 1))
        )
        assert classifier.count_classes(plain, images) == 1
        with pytest.raises(errors.UserError, match="names no branches"):
            plain.features(images, gates=jnp.ones((1, 1)))

    def test_wrapping_twice_costs_one_trace(self):
        function, count = jax.jit(lambda model, images: (_TRACES.append(1), model(images))[1]), len(_TRACES)
        for _ in range(2):
            function(classifier.wrap(_double), jnp.ones((2, 1, 1, 1)))
        assert len(_TRACES) == count + 1


_TRACES: list[int] = []


def _double(images):
    return 2.0 * images[:, 0, 0, :]


def _scaled(variables, images):
    return variables["factor"] * images[:, 0, 0, :]


class TestMesh:
    """What needs one device only; the rest is in tests/sharding."""

    def test_one_device_is_a_mesh(self):
        devices = mesh.make()
        assert devices.axis_names == ("data", "model")
        batch = mesh.put_batch(devices, {"image": np.zeros((4, 2), np.float32)})
        assert batch["image"].sharding.is_equivalent_to(mesh.batched(devices), 2)

    @pytest.mark.parametrize(
        ("sharding", "message"),
        [
            ("tensor", r"sharding='tensor': expected \"data\", \"fsdp\" or \"fsdp=N\""),
            ("fsdp=7", r"groups of 7 do not fit 1 devices; choose one of 1, or add devices"),
            ("fsdp=0", r"groups of 0 do not fit"),
        ],
    )
    def test_a_mesh_that_cannot_be(self, sharding, message):
        with pytest.raises(errors.UserError, match=message):
            mesh.make(sharding=sharding)

    @pytest.mark.parametrize(
        ("rule", "message"),
        [
            (("nothing/here", 0), "'nothing/here' matches no parameter .* paths look like dense/bias"),
            (("kernel", 5), "dense/kernel has shape .* and no axis 5"),
            (("kernel", "widest"), "axis 'widest'; expected a number"),
            (("(", 0), "no regular expression"),
            ("kernel", "expected a pair"),
        ],
    )
    def test_a_rule_that_fits_nothing(self, rule, message):
        tree = {"dense": {"bias": jnp.zeros(3), "kernel": jnp.zeros((4, 3))}}
        with pytest.raises(errors.UserError, match=message):
            mesh.Rules((rule,)).place(mesh.make(), tree)


class TestProgress:
    def test_resuming_cuts_what_came_after_and_torn_lines(self, tmp_path):
        path = tmp_path / progress.METRICS_FILE
        path.write_text('{"step": 1, "x": 1.0}\n{"step": 2, "x": 2.0}\n{"step": 3, "x"')
        log = progress.TrainingLog(tmp_path, total=4, batch=1, start=1)
        log.train(2, {"loss": 0.5}, learning_rate=0.1)
        log.close()
        assert [line["step"] for line in progress.read(path)] == [1, 2]
        assert progress.read(path)[1] == {"step": 2, "train/loss": 0.5, "train/learning_rate": 0.1}

    @pytest.mark.parametrize(("seconds", "text"), [(5, "5 s"), (120, "2 min"), (7200, "2.0 h")])
    def test_durations(self, seconds, text):
        assert progress.duration(seconds) == text


class TestCommandLine:
    @pytest.mark.parametrize(
        ("argument", "expected"),
        [
            ("--config.x=8/255", f"--config.x={8 / 255!r}"),
            ("--config.x=(2/255,4/255)", f"--config.x=({2 / 255!r},{4 / 255!r})"),
            ("--config.data.name=fashion_mnist/3.0.1", "--config.data.name=fashion_mnist/3.0.1"),
            ("--config.data.data_dir=/a/8/255", "--config.data.data_dir=/a/8/255"),
            ("--workdir=8/255", "--workdir=8/255"),
        ],
    )
    def test_fractions(self, argument, expected):
        assert command_line.evaluate_fractions([argument]) == [expected]

    @pytest.mark.parametrize(
        ("error", "expected"),
        [
            (errors.UserError("two\nlines"), "error: two lines"),
            (
                RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes"),
                "error: out of memory (RESOURCE_EXHAUSTED",
            ),
            (MemoryError(), "error: out of memory (MemoryError)"),
            (OSError(28, "No space left on device"), "error: no space left"),
        ],
    )
    def test_one_line_and_exit_code_two(self, error, expected, capsys):
        with pytest.raises(SystemExit) as left, command_line.one_line_errors(debug=False):
            raise error
        assert left.value.code == 2
        assert capsys.readouterr().err.startswith(expected)

    def test_a_bug_keeps_its_traceback(self):
        with pytest.raises(ZeroDivisionError), command_line.one_line_errors(debug=False):
            _ = 1 / 0

    def test_debug_lets_a_mistake_through(self):
        with pytest.raises(errors.UserError), command_line.one_line_errors(debug=True):
            raise errors.UserError("x")

    def test_the_cache_is_the_users(self, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert command_line.cache_folder() == tmp_path / "robust_vit"


def test_json_is_plain():
    assert json.dumps(files.jsonable({"a": np.int64(1), "b": jnp.float32(2.0)})) == '{"a": 1, "b": 2.0}'
    assert sys.version_info >= (3, 11)
