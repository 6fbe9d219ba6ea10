"""Curvature beside another library's: matfree's XTrace on the same samples, and its Lanczos on the same start."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_vit import curvature
from robust_vit.curvature import krylov, operators, traces

pytestmark = pytest.mark.parity
matfree_stochtrace = pytest.importorskip("matfree.stochtrace")
matfree_decomp = pytest.importorskip("matfree.decomp")
KEY = jax.random.key(0)


def _operator(size: int = 60):
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(size, size)))[0]
    matrix = (basis * (2 * 0.8 ** np.arange(size) - 0.1)) @ basis.T
    return operators.Symmetric(jnp.asarray((matrix + matrix.T) / 2))


def test_xtrace():
    with jax.enable_x64(True):
        operator = _operator()
        found = curvature.trace(operator, KEY, samples=16, method="xtrace", block=4)
        keys = [jax.random.fold_in(KEY, begin) for begin in (0, 4)]
        samples = jnp.concatenate([traces._signs(key, operator.like, 4) for key in keys])
        estimate = matfree_stochtrace.leave_one_out_xtrace(apply_resphering=False)
        with jax.numpy_rank_promotion("allow"):  # Their code, their habits.
            theirs = np.asarray(estimate(lambda vector: operator(vector), samples))
    np.testing.assert_allclose(found.value, theirs.mean(), rtol=1e-10)
    np.testing.assert_allclose(found.standard_error, theirs.std(ddof=1) / np.sqrt(8), rtol=1e-8)


def test_lanczos():
    with jax.enable_x64(True):
        operator = _operator()
        first = krylov.start(operator, KEY, rank=8).following[0]
        found = curvature.lanczos(operator, KEY, rank=8, top=8, which="smallest")
        decompose = matfree_decomp.tridiag_sym(8, reortho="full")
        theirs = decompose(lambda vector: operator(vector), first)
    np.testing.assert_allclose(found.ritz, np.linalg.eigvalsh(np.asarray(theirs.J_small)), rtol=1e-10, atol=1e-12)
