"""Lookup by name in a package's one explicit dict: `name -> "module:attribute"`, imported when it is asked for."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from robust_vit import errors


def find(kind: str, name: str, table: Mapping[str, str]) -> Any:
    """What a name stands for.

    Args:
      kind: what the table holds, for the error: "model".
      name: as the user wrote it.
      table: `name -> "module:attribute"`.

    Raises:
      errors.UserError: an unknown name, with the nearest known.
    """
    if name not in table:
        raise errors.unknown(kind, name, table)
    module, _, attribute = table[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def check_options(kind: str, name: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Refuses the first option that is not known, naming the nearest."""
    known = list(known)
    for option in given:
        if option not in known:
            raise errors.unknown(f"option of {kind} {name!r}", option, known)


def build(
    kind: str,
    name: str,
    table: Mapping[str, str],
    options: Mapping[str, Any],
    *,
    fixed: Mapping[str, Any] | None = None,
) -> Any:
    """Calls what a name stands for with checked options.

    Args:
      kind: what the table holds.
      name: as the user wrote it.
      table: `name -> "module:attribute"`.
      options: the user's keyword arguments; an unknown one is an error that names the nearest.
      fixed: further arguments, which are not the user's to choose.
    """
    factory = find(kind, name, table)
    fixed = fixed or {}
    check_options(kind, name, options, [key for key in inspect.signature(factory).parameters if key not in fixed])
    return factory(**fixed, **options)


def parse(kind: str, text: str, *, example: str) -> tuple[str, list[Any], dict[str, Any]]:
    """Name, positional and named arguments of a call that is written as text: "pgd(steps=40, step_size=2/255)".

    Args:
      kind: what the call makes, for the error.
      text: a name, or a call of one; arguments are Python literals or fractions of numbers.
      example: how such a call is written, for the error.

    Raises:
      errors.UserError: the text is neither.
    """
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if isinstance(call, ast.Name):
            call = ast.Call(func=call, args=[], keywords=[])
        named = {keyword.arg: _literal(keyword.value) for keyword in call.keywords}
        return call.func.id, [_literal(argument) for argument in call.args], named
    except (SyntaxError, ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise errors.UserError(f"{kind} {text!r} is not understood: write for example {example}.") from error


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
        return _literal(node.left) / _literal(node.right)
    return ast.literal_eval(node)
