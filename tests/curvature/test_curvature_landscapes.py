"""Directions and landscapes against closed forms: paraboloids, filter norms, scale invariance, known planes, eigenvalues."""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from robust_vit import curvature, errors, losses, models, trees
from robust_vit.curvature import directions, landscapes, surfaces

KEY = jax.random.key(0)
TRACES = []


def _precision(dtype):
    return jax.enable_x64(True) if dtype == np.float64 else contextlib.nullcontext()


def _quadratic(params, batch, matrix):
    """The mean over examples of `w'Aw / 2 + x'w`, and a constant for each example."""
    TRACES.append(None)
    bowl = 0.5 * params["w"] @ matrix @ params["w"]
    return bowl + jnp.mean(batch["x"] @ params["w"] + batch["c"])


def _each(params, batch, matrix):
    bowl = 0.5 * params["w"] @ matrix @ params["w"]
    return {"loss": bowl + batch["x"] @ params["w"] + batch["c"], "sign": batch["x"] @ params["w"] > 0}


def _bowl(dtype=np.float32, size=5, examples=7):
    generator = np.random.default_rng(0)
    matrix = generator.normal(size=(size, size))
    matrix = matrix + matrix.T
    params = {"w": jnp.asarray(generator.normal(size=size), dtype)}
    batch = {name: generator.normal(size=(examples, *shape)) for name, shape in (("x", (size,)), ("c", ()))}
    batch = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), batch)
    rows = {"w": jnp.asarray(generator.normal(size=(2, size)), dtype)}
    return params, batch, jnp.asarray(matrix, dtype), rows


def _expected(params, batch, matrix, rows, points):
    """The paraboloid itself, in float64."""
    w, x, c, a, d = (np.asarray(each, np.float64) for each in (params["w"], batch["x"], batch["c"], matrix, rows["w"]))
    places = w + points @ d
    return 0.5 * np.einsum("pi,ij,pj->p", places, a, places) + places @ x.mean(axis=0) + c.mean()


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 2e-6), (np.float64, 1e-14)])
@pytest.mark.parametrize("microbatch", [None, 3, 7, 100])
def test_a_quadratic_loss_has_its_paraboloid_whatever_the_microbatch(dtype, tolerance, microbatch):
    with _precision(dtype):
        params, batch, matrix, rows = _bowl(dtype)
        axis = curvature.offsets(-1.5, 1.0, 6)
        points = curvature.grid(axis, curvature.offsets(-1, 1, 5))
        found = curvature.landscape(_quadratic, params, rows, points, batch, matrix, microbatch=microbatch)
        expected = _expected(params, batch, matrix, rows, points)
        # Measured: 4e-7 of the largest in float32. 3 divides 7 examples into 3, 3 and 1: each counts by its size.
        np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max())
        each = curvature.landscape(_each, params, rows, points, batch, matrix, microbatch=microbatch)
    assert each["loss"].shape == each["sign"].shape == (len(points), 7)
    assert each["sign"].dtype == bool
    np.testing.assert_allclose(each["loss"].mean(axis=1), expected, atol=tolerance * np.abs(expected).max())
    places = np.asarray(params["w"], np.float64) + points @ np.asarray(rows["w"], np.float64)
    scores = places @ np.asarray(batch["x"], np.float64).T
    assert (each["sign"] == (scores > 0))[np.abs(scores) > 1e-4].all()


def test_the_weights_themselves_are_sampled_to_the_bit():
    params, batch, matrix, rows = _bowl()
    points = curvature.grid(curvature.offsets(-0.3, 0.3, 7))
    rows = {"w": rows["w"][:1]}
    found = curvature.landscape(_each, params, rows, points, batch, matrix)["loss"]
    with jax.default_matmul_precision("highest"):
        there = jax.jit(_each)(params, batch, matrix)["loss"]
    np.testing.assert_array_equal(found[(points == 0).all(axis=1)][0], there)
    assert (points == 0).all(axis=1).sum() == 1


def test_new_numbers_compile_nothing():
    params, batch, matrix, rows = _bowl()
    points = curvature.grid(curvature.offsets(-1, 1, 3))
    curvature.landscape(_quadratic, params, {"w": rows["w"][:1]}, points, batch, matrix, microbatch=2)
    count = len(TRACES)
    others = jax.tree.map(lambda leaf: leaf + 1, (params, {"w": rows["w"][1:]}, batch, matrix))
    curvature.landscape(_quadratic, others[0], others[1], 2 * points, others[2], others[3], microbatch=2)
    assert len(TRACES) == count


def _convolving(params, batch):
    kernel = params["kernel"]
    found = jax.lax.conv_general_dilated(batch, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return jnp.mean(jnp.square(found), axis=(1, 2, 3))


def test_a_convolution_takes_the_other_loop_to_the_same_numbers():
    params = {"kernel": jax.random.normal(KEY, (3, 3, 2, 4))}
    batch = jax.random.normal(jax.random.key(1), (5, 6, 6, 2))
    rows = curvature.random_directions(KEY, params)
    points = curvature.grid(*[curvature.offsets(-1, 1, 3)] * 2)
    found = curvature.landscape(_convolving, params, rows, points, batch, microbatch=2)
    for point, row in zip(points, found, strict=True):
        moved = {"kernel": params["kernel"] + point[0] * rows["kernel"][0] + point[1] * rows["kernel"][1]}
        np.testing.assert_allclose(row, _convolving(moved, batch), rtol=2e-5)
    (program, rest) = landscapes.planned(_convolving, params, directions.shapes(params, 2), 9, batch, microbatch=2)
    assert (program.times, rest.times) == (18, 9)  # A step a point and microbatch: two of two examples, and one of one.


def test_the_l2_term_is_exact():
    generator = np.random.default_rng(0)
    params = {"a": jnp.asarray(generator.normal(size=(4, 3)), jnp.float32), "b": jnp.ones(2)}
    rows = curvature.random_directions(KEY, params, vectors="scale")
    points = generator.normal(size=(9, 2))
    found = landscapes.squared_norms(params, rows, points)
    for point, value in zip(points, found, strict=True):
        moved = jax.tree.map(lambda w, d, p=point: np.asarray(w, np.float64) + np.tensordot(p, d, 1), params, rows)
        np.testing.assert_allclose(value, sum((leaf**2).sum() for leaf in moved.values()), rtol=1e-6)


def _real_parameters():
    """Numbers for every parameter of this library's models, none of them zero."""
    vit = {"num_classes": 5, "width": 16, "depth": 1, "heads": 2, "patch": 4}
    modules = {
        "vit": models.build("vit", **vit),
        "stacked": models.build("vit", **{**vit, "depth": 2}, scan=True, layer_scale=0.1),
        "pooling": models.build("vit", **vit, head="map", position="relative"),
        "resnet": models.build("resnet", num_classes=5, depth=8, width=4),
    }
    images = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    shapes = {name: jax.eval_shape(module.init, KEY, images)["params"] for name, module in modules.items()}
    generator = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: generator.normal(size=leaf.shape).astype(np.float32), shapes)


def test_each_output_filter_of_the_direction_has_the_norm_of_the_weights():
    params = _real_parameters()
    generator = np.random.default_rng(1)
    drawn = jax.tree.map(lambda leaf: generator.normal(size=(2, *leaf.shape)).astype(np.float32), params)
    rows = curvature.normalise_directions(drawn, params)
    kinds = set()
    for path, leaf, both in zip(trees.paths(params), jax.tree.leaves(params), jax.tree.leaves(rows), strict=True):
        both = np.asarray(both, np.float64)
        stacked = "/blocks/" in path
        if path.endswith(("bias", "scale")) or leaf.ndim - stacked < 2:
            kinds.add("vector")
            assert (both == 0).all(), path
        elif path.endswith("kernel"):
            kinds.add("kernel")
            # One column an output, one block a layer; a filter is what is multiplied with all of the inputs.
            columns = leaf.reshape(len(leaf) if stacked else 1, -1, leaf.shape[-1])
            norms = np.linalg.norm(both.reshape(2, *columns.shape), axis=2)
            np.testing.assert_allclose(norms, np.stack([np.linalg.norm(columns, axis=1)] * 2), rtol=1e-5, err_msg=path)
        else:
            kinds.add(path.rpartition("/")[2])
            norms = np.linalg.norm(both.reshape(2, -1), axis=1)
            np.testing.assert_allclose(norms, np.linalg.norm(leaf), rtol=1e-5, err_msg=path)
    assert kinds == {"vector", "kernel", "position", "class_token", "probe", "relative_position"}


LAYOUTS = {
    # path, Flax's shape, and how its axes become torch's.
    "mlp/kernel": ((6, 4), (1, 0)),
    "stem/kernel": ((3, 3, 2, 4), (3, 2, 0, 1)),
    "class_token": ((1, 1, 6), (0, 1, 2)),
    "norm/scale": ((6,), (0,)),
}


@pytest.mark.parametrize("kind", ["li2018", "park2022"])
@pytest.mark.parametrize("path", LAYOUTS)
def test_the_published_formulas_in_torchs_layout(path, kind):
    shape, order = LAYOUTS[path]
    generator = np.random.default_rng(1)
    weight, drawn = generator.normal(size=shape), generator.normal(size=(1, *shape))
    params, rows = {path: jnp.asarray(weight, jnp.float32)}, {path: jnp.asarray(drawn, jnp.float32)}
    found = curvature.normalise_directions(rows, params, normalisation=kind)[path][0]
    w, d = weight.transpose(order), drawn[0].transpose(order)
    if w.ndim < 2:
        expected = np.zeros_like(d)
    elif kind == "li2018":  # for d, w in zip(direction, weights): d *= w.norm() / d.norm(), over axis 0
        expected = np.stack([b * np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(w, d, strict=True)])
    else:  # torch.norm(w, dim=0, keepdim=True) / torch.norm(d, dim=0, keepdim=True) * d
        expected = np.linalg.norm(w, axis=0, keepdims=True) / np.linalg.norm(d, axis=0, keepdims=True) * d
    np.testing.assert_allclose(np.asarray(found).transpose(order), expected, rtol=1e-5, atol=1e-6)


def test_the_two_published_normalisations_differ():
    params = {"kernel": jax.random.normal(KEY, (6, 4))}
    drawn = {"kernel": jax.random.normal(jax.random.key(1), (1, 6, 4))}
    first, second = (
        curvature.normalise_directions(drawn, params, normalisation=kind)["kernel"] for kind in ("li2018", "park2022")
    )
    assert float(jnp.abs(first - second).max()) > 0.1
    np.testing.assert_allclose(jnp.linalg.norm(second[0], axis=1), jnp.linalg.norm(params["kernel"], axis=1), rtol=1e-5)


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        ("attention/query/kernel", (8, 2, 4), ((0,), (1, 2))),
        ("attention/out/kernel", (2, 4, 8), ((0, 1), (2,))),
        ("attention/query/bias", (2, 4), None),
        ("tokens/embedding", (100, 8), ((1,), (0,))),
        ("encoder/pos_embedding", (1, 9, 8), ((0, 1, 2), ())),
        ("blocks/mlp/expand/kernel", (3, 8, 16), ((1,), (2,))),
        ("blocks/mlp/expand/bias", (3, 16), None),
        ("w", (8, 3), ((0,), (1,))),
        ("", (), None),
    ],
)
def test_axes_by_name_and_rank(path, shape, expected):
    assert directions.axes(path, np.zeros(shape)) == expected


def test_what_vectors_and_the_still_do():
    params = {"kernel": jnp.ones((4, 3)), "bias": jnp.asarray([1.0, -2.0, 2.0]), "position": jnp.ones((5, 3))}
    kept = curvature.random_directions(KEY, params, vectors="scale", still="position")
    np.testing.assert_allclose(np.linalg.norm(kept["bias"], axis=1), 3.0, rtol=1e-6)
    assert (kept["position"] == 0).all()
    copied = curvature.random_directions(KEY, params, vectors="copy")
    np.testing.assert_array_equal(copied["bias"], np.stack([params["bias"]] * 2))
    raw = curvature.random_directions(KEY, params, normalisation="none")
    assert (raw["bias"] != 0).all()
    only = curvature.normalise_directions(raw, params, axes=_rows_are_filters)
    np.testing.assert_allclose(np.linalg.norm(only["kernel"], axis=2), np.sqrt(3.0), rtol=1e-6)


def _rows_are_filters(path, leaf):
    return directions.Axes((1,), (0,)) if leaf.ndim == 2 else None


def test_draws_are_normal_and_do_not_depend_on_company():
    params = {"a": jnp.ones((300, 200)), "b": jnp.ones((50, 40))}
    rows = curvature.random_directions(KEY, params, count=3, normalisation="none")
    alone = curvature.random_directions(KEY, {"b": params["b"]}, count=2, normalisation="none")
    np.testing.assert_array_equal(rows["b"][:2], alone["b"])
    numbers = np.asarray(rows["a"], np.float64).reshape(3, -1)
    assert scipy.stats.kstest(numbers[0], "norm").pvalue > 0.01
    assert np.abs(np.corrcoef(numbers) - np.eye(3)).max() < 0.02
    other = curvature.random_directions(jax.random.key(1), params, normalisation="none")
    assert (np.asarray(other["a"]) != np.asarray(rows["a"][:2])).mean() > 0.99


def test_orthogonal_directions_keep_their_lengths():
    params = {"kernel": jnp.ones((3, 2))}
    plain = curvature.random_directions(KEY, params, count=3)["kernel"].reshape(3, -1)
    found = curvature.random_directions(KEY, params, count=3, orthogonal=True)["kernel"].reshape(3, -1)
    np.testing.assert_allclose(found[0], plain[0], rtol=1e-6)
    gram = np.asarray(found @ found.T, np.float64)
    np.testing.assert_allclose(gram, np.diag(np.sum(np.asarray(plain) ** 2, axis=1)), atol=1e-5)


def _relu(params, batch):
    hidden = jax.nn.relu(batch["x"] @ params["first"]["kernel"])
    return losses.cross_entropy(hidden @ params["second"]["kernel"], batch["y"])


@pytest.mark.parametrize("kind", directions.NORMALISATIONS)
def test_a_rescaled_relu_network_is_the_same_function_with_the_same_normalised_landscape(kind):
    generator = np.random.default_rng(0)
    params = {
        "first": {"kernel": jnp.asarray(generator.normal(size=(5, 8)), jnp.float32)},
        "second": {"kernel": jnp.asarray(generator.normal(size=(8, 3)), jnp.float32)},
    }
    batch = {"x": jnp.asarray(generator.normal(size=(10, 5)), jnp.float32), "y": jnp.arange(10) % 3}
    points = curvature.grid(*[curvature.offsets(-1, 1, 5)] * 2)
    found = []
    for factor in (1.0, 8.0):
        scaled = {
            "first": trees.scale(factor, params["first"]),
            "second": trees.scale(1.0 / factor, params["second"]),
        }
        rows = curvature.random_directions(KEY, scaled, normalisation=kind)
        found.append(curvature.landscape(_relu, scaled, rows, points, batch))
    centre = (points == 0).all(axis=1)
    np.testing.assert_allclose(found[0][centre], found[1][centre], rtol=1e-5)
    if kind == "none":
        assert np.abs(found[0] - found[1]).max() > 1.0
    else:
        np.testing.assert_allclose(found[0], found[1], rtol=1e-5, atol=1e-6)


def _points(coordinates, plane, final):
    return [
        {"a": final["a"] + row @ plane[:, :6].reshape(2, 6), "b": final["b"] + (row @ plane[:, 6:]).reshape(2, 2)}
        for row in coordinates
    ]


@pytest.mark.parametrize("centred", [True, False])
def test_a_trajectory_in_a_known_plane_is_found_with_all_of_its_variance(centred):
    generator = np.random.default_rng(0)
    plane = np.linalg.qr(generator.normal(size=(10, 2)))[0].T
    final = {"a": generator.normal(size=6), "b": generator.normal(size=(2, 2))}
    way = np.array([[5.0, 1.0], [3.0, 2.5], [1.0, 1.5], [0.4, 0.2]])
    as_arrays = [
        jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree) for tree in (final, *_points(way, plane, final))
    ]
    found = curvature.trajectory(as_arrays[1:], as_arrays[0], centred=centred)
    assert found.explained[:2].sum() > 1 - 1e-6
    np.testing.assert_allclose(found.explained.sum(), 1.0)
    np.testing.assert_allclose(found.distances, np.linalg.norm(way, axis=1), rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found.coordinates, axis=1), found.distances, rtol=1e-5)
    assert (found.coordinates[0] >= 0).all()
    rows = np.concatenate([np.asarray(leaf).reshape(2, -1) for leaf in jax.tree.leaves(found.directions)], axis=1)
    np.testing.assert_allclose(rows @ rows.T, np.eye(2), atol=1e-6)
    # In the plane, and there the principal components: what NumPy finds of the very rows.
    np.testing.assert_allclose(rows @ plane.T @ plane, rows, atol=1e-5)
    matrix = np.concatenate([way @ plane, np.zeros((1, 10))])
    matrix = matrix - matrix.mean(axis=0) if centred else matrix
    expected = np.linalg.svd(matrix)[2][:2]
    np.testing.assert_allclose(np.abs(np.diag(rows @ expected.T)), 1.0, atol=1e-5)
    # The points are where the directions say.
    for point, row in zip(as_arrays[1:], found.coordinates, strict=True):
        for name in final:
            there = as_arrays[0][name] + np.tensordot(row, np.asarray(found.directions[name]), 1)
            np.testing.assert_allclose(there, point[name], atol=1e-5)


def test_a_trajectory_on_a_line_spans_no_plane():
    final = {"w": jnp.zeros(4)}
    line = [{"w": jnp.asarray([1.0, 2.0, 0.0, 1.0]) * t} for t in (3.0, 2.0, 1.0)]
    assert curvature.trajectory(line, final, count=1).explained[0] > 1 - 1e-6
    with pytest.raises(
        errors.UserError, match="3 points beside the final weights span 1 dimensions, and 2 were asked for"
    ):
        curvature.trajectory(line, final)
    with pytest.raises(errors.UserError, match="not like the parameters"):
        curvature.trajectory([{"v": jnp.zeros(4)}], final)


def _network(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["first"]["kernel"] + params["first"]["bias"][None])
    return jnp.mean(losses.cross_entropy(hidden @ params["second"]["kernel"], batch["y"]))


def test_along_an_eigenvector_the_second_difference_is_the_eigenvalue():
    with jax.enable_x64(True):
        generator = np.random.default_rng(0)
        params = {
            "first": {"kernel": generator.normal(size=(5, 6)), "bias": generator.normal(size=6)},
            "second": {"kernel": generator.normal(size=(6, 3))},
        }
        params = jax.tree.map(jnp.asarray, params)
        batch = {"x": jnp.asarray(generator.normal(size=(20, 5))), "y": jnp.arange(20) % 3}
        operator = curvature.hessian(_network, params, batch)
        eigen = curvature.lanczos(operator, KEY, rank=54, top=2, vectors=True)
        axis = curvature.offsets(-1e-3, 1e-3, 5)
        points = curvature.grid(axis, axis)
        found = curvature.landscape(_network, params, eigen.vectors, points, batch)
        bent = surfaces.curvature(found.reshape(5, 5), (axis, axis))
    # The fourth derivative leaves a share of the order of the step squared. Measured: 2e-6.
    np.testing.assert_allclose(bent, eigen.values, rtol=2e-5)


@pytest.mark.parametrize(("low", "high", "points"), [(-1, 1, 21), (-0.3, 0.3, 11), (-0.2, 3.0, 18), (-4, 0.01, 7)])
def test_offsets_hold_zero_and_both_ends(low, high, points):
    found = curvature.offsets(low, high, points)
    assert len(found) == points
    assert (found == 0.0).sum() == 1
    assert found[0] <= low * (1 - 1e-9)
    assert found[-1] >= high * (1 - 1e-9)
    np.testing.assert_allclose(np.diff(found), found[1] - found[0])
    if low == -high:
        np.testing.assert_array_equal(found, -found[::-1])
        np.testing.assert_allclose(found[-1], high)


def _no_mean(params, batch, matrix):
    return jnp.zeros((3, 2))


def test_what_does_not_fit_is_refused():
    params, batch, matrix, rows = _bowl()
    points = np.zeros((1, 2))
    for wrong, words in (
        ({"rows": {"w": rows["w"][:, :3]}}, "expected \\[count, \\*parameter's\\]"),
        ({"rows": {"v": rows["w"]}}, "not like the parameters"),
        ({"points": np.zeros((4, 3))}, "expected \\[points, 2\\]"),
        ({"points": np.full((1, 2), np.nan)}, "coordinate is not finite"),
        ({"batch": {**batch, "c": batch["c"][:3]}}, "leading sizes"),
        ({"microbatch": 0}, "microbatch is 0"),
        ({"loss": _no_mean}, "expected a scalar, their mean, or \\[7, ...\\]"),
    ):
        given = {"loss": _quadratic, "rows": rows, "points": points, "batch": batch, "microbatch": None, **wrong}
        with pytest.raises(errors.UserError, match=words):
            curvature.landscape(
                given["loss"],
                params,
                given["rows"],
                given["points"],
                given["batch"],
                matrix,
                microbatch=given["microbatch"],
            )
    for options, words in (
        ({"normalisation": "li2019"}, "did you mean 'li2018'"),
        ({"vectors": "none"}, "unknown way with vectors"),
        ({"still": "nothing"}, "matches no parameter"),
        ({"count": 0}, "count is 0"),
    ):
        with pytest.raises(errors.UserError, match=words):
            curvature.random_directions(KEY, params, **options)
    with pytest.raises(errors.UserError, match="int32"):
        curvature.random_directions(KEY, {"w": jnp.arange(3)})
    for low, high, count in ((0.1, 1, 5), (-1, 1, 2), (-1, np.inf, 5)):
        with pytest.raises(errors.UserError, match="expected at least 3"):
            curvature.offsets(low, high, count)
