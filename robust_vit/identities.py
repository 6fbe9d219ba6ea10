"""What a value is, told alike in every process: names, numbers and what arrays hold, never an address.

What is saved for a run to go on with is told apart by it from what another run left.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import zlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import numpy as np

from robust_vit import mesh

_PLAIN = (bool, int, float, complex, str, type(None))


def checksum(content: np.ndarray | bytes) -> int:
    """CRC-32 of the bytes, of an array in row-major order."""
    return zlib.crc32(np.ascontiguousarray(content).tobytes() if isinstance(content, np.ndarray) else content)


def contents(array: Any) -> Any:
    """Dtype, shape and checksum of an array or of typed keys; the number of a scalar. Fetches it to the host."""
    is_key = jax.numpy.issubdtype(array.dtype, jax.dtypes.prng_key)
    array = mesh.fetch(jax.random.key_data(array) if is_key else array)
    return [str(array.dtype), list(array.shape), checksum(array)] if array.ndim else array.item()


def shape(array: Any) -> Any:
    """Dtype and shape of an array alone, which may be a `jax.ShapeDtypeStruct`."""
    return f"{array.dtype}{list(array.shape)}"


def describe(value: Any, *, array: Callable[[Any], Any] = contents, without: Collection[str] = ()) -> Any:
    """What a value is, for `json`: equal for values that were made alike, in this process or another.

    Functions and classes are told by their qualified names; a function that another one made, also by the arrays and numbers that
    it was made with; dataclasses (attacks, operators, models) by their fields.

    Args:
      value: anything: pytrees, dataclasses, functions, partials.
      array: what is said of an array: `contents` or `shape`.
      without: names of fields and keys that are left out.
    """

    def tell(inner: Any) -> Any:
        return describe(inner, array=array, without=without)

    if isinstance(value, _PLAIN):
        return repr(value) if isinstance(value, complex) else value
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return array(value)
    if isinstance(value, Mapping):
        return {str(key): tell(item) for key, item in value.items() if key not in without}
    if isinstance(value, list | tuple):
        return [tell(item) for item in value]
    if isinstance(value, functools.partial):
        return [tell(value.func), tell(value.args), tell(value.keywords)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        # A module of Linen leaves its parent out of its text, and so does this.
        shown = [field.name for field in dataclasses.fields(value) if field.repr and field.name not in without]
        return {"class": _name(type(value)), **{name: tell(getattr(value, name)) for name in shown}}
    if hasattr(value, "__qualname__"):
        value = inspect.unwrap(value)
        made_with = [getattr(value, "__self__", None)]
        made_with += [cell.cell_contents for cell in getattr(value, "__closure__", None) or ()]
        made_with = [leaf for leaf in jax.tree.leaves(made_with) if hasattr(leaf, "dtype") or isinstance(leaf, _PLAIN)]
        return [_name(value), *map(tell, made_with)]
    if not jax.tree_util.all_leaves([value]):
        return [_name(type(value)), *map(tell, jax.tree.leaves(value))]
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _name(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"
