"""Weights to disk and back, and between the forms of a model."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_vit import errors, files, models

SHAPE = (1, 8, 8, 1)
TINY = {"width": 8, "depth": 2, "heads": 2, "patch": 4}


def _build(num_classes=3, **given):
    return models.build("vit", num_classes=num_classes, **{**TINY, **given})


def test_round_trip_is_exact_and_equal_weights_are_equal_bytes(tmp_path, random_variables):
    module = models.build("resnet", num_classes=3, depth=8, width=4)
    variables = random_variables(module, SHAPE)
    for name in ("first.npz", "second.npz"):
        models.save_weights(tmp_path / name, variables)
    assert (tmp_path / "first.npz").read_bytes() == (tmp_path / "second.npz").read_bytes()
    loaded = models.load_weights(tmp_path / "first.npz", random_variables(module, SHAPE, seed=1))
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)


def test_loop_and_scan_read_each_others_files(tmp_path, random_variables):
    loop, scan = (random_variables(_build(scan=scanned), SHAPE) for scanned in (False, True))
    models.save_weights(tmp_path / "loop.npz", loop)
    models.save_weights(tmp_path / "scan.npz", scan)
    jax.tree.map(np.testing.assert_array_equal, models.load_weights(tmp_path / "scan.npz", scan), scan)
    jax.tree.map(
        np.testing.assert_array_equal, models.load_weights(tmp_path / "loop.npz", scan), models.stack_blocks(loop)
    )
    jax.tree.map(
        np.testing.assert_array_equal, models.load_weights(tmp_path / "scan.npz", loop), models.unstack_blocks(scan)
    )


def test_reset_keeps_a_new_head(tmp_path, random_variables):
    old, new = random_variables(_build(), SHAPE), random_variables(_build(num_classes=7), SHAPE, seed=1)
    models.save_weights(tmp_path / "w.npz", old)
    loaded = models.load_weights(tmp_path / "w.npz", new, reset="^params/head/")
    np.testing.assert_array_equal(loaded["params"]["head"]["kernel"], new["params"]["head"]["kernel"])
    np.testing.assert_array_equal(loaded["params"]["position"], old["params"]["position"])
    with pytest.raises(errors.UserError, match=r"other shape params/head/bias \(3,\) instead of \(7,\)"):
        models.load_weights(tmp_path / "w.npz", new)


@pytest.mark.parametrize(
    "given", [{}, {"position": "relative"}, {"head": "gap"}, {"position": "relative", "scan": True}]
)
def test_positions_of_another_grid_are_resized(given, tmp_path, random_variables):
    module = _build(**given)
    small, large = random_variables(module, SHAPE), random_variables(module, (1, 16, 16, 1))
    models.save_weights(tmp_path / "w.npz", small)
    loaded = models.load_weights(tmp_path / "w.npz", large)
    jax.tree.map(np.testing.assert_array_equal, loaded, models.resize_positions(small, (2, 2), (4, 4)))


def test_what_does_not_fit_is_listed(tmp_path, random_variables):
    variables = random_variables(_build(), SHAPE)
    deeper = random_variables(_build(depth=3), SHAPE)
    models.save_weights(tmp_path / "w.npz", variables)
    with pytest.raises(errors.UserError, match=r"missing params/block02/attention_norm/bias.* and \d+ more") as caught:
        models.load_weights(tmp_path / "w.npz", deeper)
    assert "\n" not in str(caught.value)
    models.save_weights(tmp_path / "deeper.npz", deeper)
    with pytest.raises(errors.UserError, match="extra params/block02/attention_norm/bias"):
        models.load_weights(tmp_path / "deeper.npz", variables)


def test_files_that_are_absent_damaged_or_of_another_model(tmp_path, random_variables):
    variables = random_variables(_build(), SHAPE)
    with pytest.raises(errors.UserError, match="no weights at"):
        models.load_weights(tmp_path / "none.npz", variables)
    models.save_weights(tmp_path / "w.npz", variables)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "w.npz").read_bytes()[:-100])
    with pytest.raises(errors.UserError, match=r"cut.npz is damaged"):
        models.load_weights(tmp_path / "cut.npz", variables)
    files.write_npz(tmp_path / "other.npz", {"params/stem/kernel": np.ones(3)})
    with pytest.raises(errors.UserError, match="missing params/.*extra params/stem/kernel"):
        models.load_weights(tmp_path / "other.npz", variables)


def test_stacking_what_has_no_blocks_is_told(random_variables):
    with pytest.raises(errors.UserError, match="no blocks to stack"):
        models.stack_blocks({"params": {"head": {"kernel": jnp.zeros(1)}}})
    with pytest.raises(errors.UserError, match="no stacked blocks"):
        models.unstack_blocks(random_variables(_build(), SHAPE))
