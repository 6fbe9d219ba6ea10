"""Collectives are read off module texts as XLA writes them for CPU, GPU and TPU; the live check is with the sharding tests."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from robust_vit import collectives
from robust_vit.collectives import Collective

HEADER = "HloModule jit_step, is_scheduled=true, num_partitions=8\n"
ADD = "%add (x: f32[], y: f32[]) -> f32[] {\n  %x = f32[] parameter(0)\n  ROOT %y = f32[] parameter(1)\n}\n"


def entry(*lines):
    return "ENTRY %main (p: f32[64,128]) -> f32[64,128] {\n" + "".join(f"  {line}\n" for line in lines) + "}\n"


P = "%p = f32[64,128]{1,0:T(8,128)} parameter(0), metadata={op_name=\"w['a']\"}"
GROUPS = "replica_groups={{0,1,2,3},{4,5,6,7}}"


@pytest.mark.parametrize(
    ("line", "expected", "sent"),
    [
        (f"%r = f32[64,128]{{1,0}} all-reduce(%p), {GROUPS}, to_apply=%add", ("all-reduce", 32768, 1, 4), 49152),
        (f"%g = f32[256,128]{{1,0}} all-gather(%p), {GROUPS}, dimensions={{0}}", ("all-gather", 32768, 1, 4), 98304),
        (
            "%s = f32[8,128]{1,0} reduce-scatter(%p), replica_groups=[1,8]<=[8], to_apply=%add",
            ("reduce-scatter", 32768, 1, 8),
            28672,
        ),
        (
            "%a = f32[64,128]{1,0} all-to-all(%p), replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}",
            ("all-to-all", 32768, 1, 4),
            24576,
        ),
        (
            "%g = f32[256,128]{1,0} all-gather(%p), replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) "
            "{'axis_0'}, dimensions={0}, use_global_device_ids=true",
            ("all-gather", 32768, 1, 4),
            98304,
        ),
        (
            "%c = f32[64,128]{1,0} collective-permute(%p), source_target_pairs={{0,1},{1,0}}",
            ("collective-permute", 32768, 1, 2),
            32768,
        ),
        ("%r = f32[64,128]{1,0} all-reduce(%p), replica_groups={}, to_apply=%add", ("all-reduce", 32768, 1, 8), 57344),
        ("%r = f32[64,128]{1,0} all-reduce(%p), replica_groups={{0},{1}}", ("all-reduce", 32768, 1, 1), 0),
    ],
)
def test_kind_bytes_and_group_of_each_form(line, expected, sent):
    (found,) = collectives.read(HEADER + ADD + entry(P, line))
    assert found == Collective(*expected)
    assert found.sent == sent


def test_a_tuple_counts_all_of_its_operands_in_their_own_types():
    text = HEADER + entry(
        P,
        "%b = bf16[10]{0} parameter(1)",
        "%r = (f32[64,128]{1,0}, /*index=1*/bf16[10]{0}) all-reduce(%p, /*index=1*/%b), replica_groups={{0,1}}",
    )
    assert collectives.read(text) == (Collective("all-reduce", 32768 + 20, 1, 2),)


def test_an_asynchronous_exchange_counts_once():
    text = HEADER + entry(
        P,
        "%s = (f32[64,128]{1,0}, f32[256,128]{1,0}) all-gather-start(%p), replica_groups={{0,1,2,3}}",
        "%d = f32[256,128]{1,0} all-gather-done(%s)",
    )
    assert collectives.read(text) == (Collective("all-gather", 32768, 1, 4),)
    wrapped = (
        "%wrapped (q: f32[64,128]) -> f32[8,128] {\n  %q = f32[64,128]{1,0} parameter(0)\n"
        "  ROOT %s = f32[8,128]{1,0} reduce-scatter(%q), replica_groups={{0,1,2,3,4,5,6,7}}\n}\n"
    )
    calls = entry(
        P,
        "%start = ((f32[64,128]{1,0}), f32[8,128]{1,0}) async-start(%p), calls=%wrapped",
        "%update = ((f32[64,128]{1,0}), f32[8,128]{1,0}) async-update(%start), calls=%wrapped",
        "%done = f32[8,128]{1,0} async-done(%update), calls=%wrapped",
    )
    assert collectives.read(HEADER + wrapped + calls) == (Collective("reduce-scatter", 32768, 1, 8),)


def test_the_pieces_of_one_exchange_in_several_fusions_of_a_tpu_count_once():
    def piece(name, channel):
        return (
            f"%{name} (q: bf16[64,4096]) -> bf16[4096,4096] {{\n  %q = bf16[64,4096]{{1,0}} parameter(0)\n"
            f"  ROOT %g = bf16[4096,4096]{{1,0}} all-gather(%q), channel_id={channel}, replica_groups=mesh['axis_0'=64] "
            "{'axis_0'}, dimensions={0}, frontend_attributes={chain_id=\"0\"}\n}\n"
        )

    text = HEADER + piece("one", 5) + piece("two", 5) + piece("three", 6)
    text += entry(
        P, *(f"%f{name} = f32[1]{{0}} fusion(%p), kind=kCustom, calls=%{name}" for name in ("one", "two", "three"))
    )
    assert collectives.read(text) == (Collective("all-gather", 524288, 2, 64),)


def test_the_reduce_scatter_of_a_tpu_is_no_all_reduce():
    inner = (
        "%all-reduce-scatter.1 (q: f32[64,128]) -> f32[8,128] {\n  %q = f32[64,128]{1,0} parameter(0)\n"
        "  %r = f32[64,128]{1,0} all-reduce(%q), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add\n"
        "  ROOT %d = f32[8,128]{1,0} dynamic-slice(%r)\n}\n"
    )
    text = HEADER + ADD + inner + entry(P, "%f = f32[8,128]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1")
    assert collectives.read(text) == (Collective("reduce-scatter", 32768, 1, 8),)


def _loop(attributes, limit="constant(7)"):
    body = (
        "%body (q: (s32[], f32[64,128])) -> (s32[], f32[64,128]) {\n"
        "  %q = (s32[], f32[64,128]{1,0}) parameter(0)\n  %v = f32[64,128]{1,0} get-tuple-element(%q), index=1\n"
        "  %r = f32[64,128]{1,0} all-reduce(%v), replica_groups={{0,1}}, to_apply=%add\n}\n"
    )
    condition = (
        "%condition (q: (s32[], f32[64,128])) -> pred[] {\n  %q = (s32[], f32[64,128]{1,0}) parameter(0)\n"
        f"  %n = s32[]{{:T(128)}} {limit}\n  %i = s32[] get-tuple-element(%q), index=0\n"
        "  ROOT %lt = pred[] compare(%i, %n), direction=LT\n}\n"
    )
    line = f"%w = (s32[], f32[64,128]{{1,0}}) while(%t), condition=%condition, body=%body{attributes}"
    return HEADER + ADD + body + condition + entry(P, line)


def test_a_loop_counts_as_often_as_it_goes_round():
    known = ', backend_config={"known_trip_count":{"n":"5"}}'
    assert collectives.read(_loop(known)) == (Collective("all-reduce", 32768, 5, 2),)
    assert collectives.read(_loop("")) == (Collective("all-reduce", 32768, 7, 2),)
    assert collectives.read(_loop("", limit="parameter(1)")) == (Collective("all-reduce", 32768, 1, 2),)


def test_of_a_conditional_the_branch_that_moves_most_counts():
    def branch(name, rows):
        return (
            f"%{name} (q: f32[{rows}]) -> f32[{rows}] {{\n  %q = f32[{rows}]{{0}} parameter(0)\n"
            f"  ROOT %r = f32[{rows}]{{0}} all-reduce(%q), replica_groups={{{{0,1}}}}, to_apply=%add\n}}\n"
        )

    text = HEADER + ADD + branch("few", 2) + branch("many", 100)
    text += entry(P, "%c = f32[] conditional(%i, %p, %p), branch_computations={%few, %many}")
    assert collectives.read(text) == (Collective("all-reduce", 400, 1, 2),)


def test_equal_exchanges_are_counted_together_and_totals_add_up():
    line = "%{} = f32[64,128]{{1,0}} all-reduce(%p), replica_groups={{{{0,1}}}}, to_apply=%add"
    gather = "%g = f32[128,128]{1,0} all-gather(%p), replica_groups={{0,1}}, dimensions={0}"
    found = collectives.read(HEADER + ADD + entry(P, line.format("a"), line.format("b"), gather))
    assert found == (Collective("all-reduce", 32768, 2, 2), Collective("all-gather", 32768, 1, 2))
    assert collectives.total_bytes(found) == 3 * 32768
    assert collectives.total_bytes(found, "all-gather") == 32768


def test_a_program_of_one_device_sends_nothing():
    compiled = jax.jit(lambda x: jnp.tanh(x @ x)).lower(jnp.zeros((8, 8))).compile()
    assert collectives.read(compiled) == ()
