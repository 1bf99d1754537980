"""document_sums: the conformance suite, and what only this operator promises."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas
from kernels_pallas import document_sums, linear_attention
from kernels_pallas.common import chunk_blocks
from kernels_pallas.ops.document_sums import api
from kernels_pallas.ops.document_sums.shapes import SHAPES
from tests.kernels_pallas.ops.conformance import (
    TOLERANCE,
    Shape,
    Suite,
    assert_close,
    at,
    cotangents_of,
    documents,
    everything,
    inputs_of,
    over_time,
    suite_case,
    truth,
)

CASE = suite_case(
    api.OPERATOR,
    implementations=("chunked", "naive_chunk", "pallas_tpu"),
    typical=("whole", "blocks of 32", "blocks of 7"),
    fast=((1, "whole"), (100, "blocks of 7"), (100, "blocks of 32"), (100, "whole")),
)


def _block_size(regime):
    return CASE.operator.case.options(regime, None).get("block_size")


class TestDocumentSums(Suite):
    """The suite without what supposes an order in time, which has its counterpart here."""

    case = CASE
    test_step_by_step_equals_whole = None
    test_causality_by_gradient = None

    def first_reached(self, regime, t, start):
        block_size = _block_size(regime)
        return start if block_size is None else t - (t - start) % block_size

    def test_pieces_equal_whole(self, implementation, typical):
        """Checks that pieces of whole blocks, the state carried, give the whole's results.

        Of whole documents only the second piece does: the first has not seen the second.
        """
        block_size = _block_size(typical)
        case, cut = (
            at(self.case, typical),
            37 if block_size is None else 64 // block_size * block_size,
        )
        inputs = inputs_of(case, Shape(T=100), typical)

        def pieces(inputs, *, implementation, segment_ids):
            del segment_ids
            first = over_time(inputs, lambda x: x[:, :cut])
            second = over_time(inputs, lambda x: x[:, cut:])
            o_first, state = case.call(first, implementation=implementation)
            second["initial_state"] = state
            o_second, final = case.call(second, implementation=implementation)
            return o_second if block_size is None else jnp.concatenate(
                [o_first, o_second], 1
            ), final

        def whole(inputs, **keywords):
            output, final = case.call(inputs, **keywords)
            return output[:, cut if block_size is None else 0 :], final

        got, expected = (
            everything(dataclasses.replace(case, call=call), implementation, inputs)
            for call in (pieces, whole)
        )
        assert_close(got, expected, TOLERANCE["float32"])

    @pytest.mark.parametrize("packed", [False, True])
    def test_what_is_seen_by_gradient(self, implementation, typical, packed):
        """Checks that an output has gradients at the tokens it sees, and at no others."""
        T = 100
        inputs = inputs_of(self.case, Shape(B=1, T=T), typical)
        ids = documents(2, T)[1:] if packed else None
        start = np.zeros(T, int)
        if packed:
            changed = np.flatnonzero(np.diff(ids[0])) + 1
            start[changed] = changed
            start = np.maximum.accumulate(start)
        block = (np.arange(T) - start) // (_block_size(typical) or T)
        output, final = jax.eval_shape(
            lambda x: at(self.case, typical).call(x, implementation="reference"), inputs
        )
        for t in (0, 15, 16, 40, 63, 64, 99):
            at_t = np.zeros(output.shape, np.float32)
            at_t[:, t] = 1.0
            cotangents = at_t, np.zeros(final.shape, np.float32)
            got = everything(at(self.case, typical), implementation, inputs, ids, cotangents)
            seen = (start == start[t]) & (block <= block[t])
            for name in ("gradient of k", "gradient of v"):
                touched = np.abs(np.asarray(got[name])).reshape(T, -1).max(axis=1) > 0
                np.testing.assert_array_equal(touched, seen, err_msg=f"{name}, output {t}")
            touched = np.abs(np.asarray(got["gradient of q"])).reshape(T, -1).max(axis=1) > 0
            np.testing.assert_array_equal(touched, np.arange(T) == t)


def _by_definition(q, k, v, state, ids, block_size):
    """The sums token by token, in float64, as the docstring has them (scale 1, G = H)."""
    o = np.zeros(v.shape)
    for b, t in np.ndindex(v.shape[:2]):
        start = t
        while start > 0 and (ids is None or ids[b, start - 1] == ids[b, t]):
            start -= 1
        S = np.array(state[b]) if start == 0 else np.zeros(state[b].shape)
        for s in range(start, v.shape[1]):
            if ids is not None and ids[b, s] != ids[b, t]:
                break
            if block_size is None or (s - start) // block_size <= (t - start) // block_size:
                S += k[b, s][..., :, None] * v[b, s][..., None, :]
        o[b, t] = np.einsum("HKV,HK->HV", S, q[b, t])
    return o, S  # S of the last token: of the last row's last document


@pytest.mark.parametrize("block_size", [None, 1, 3, 50])
@pytest.mark.parametrize("packed", [False, True])
def test_the_reference_is_the_definition(block_size, packed):
    inputs = inputs_of(CASE, Shape(T=21, K=3, V=2), "whole")
    q, k, v, state = (inputs[name].astype(np.float64) for name in ("q", "k", "v", "initial_state"))
    ids = None
    if packed:
        ids = np.repeat([[5, 2, 5, 0], [1, 1, 1, 7]], [4, 1, 9, 7], axis=1)
    o, final = _by_definition(q, k, v, state, ids, block_size)
    with jax.enable_x64(True):
        got = document_sums(
            *(q, k, v),
            scale=1,
            initial_state=state,
            segment_ids=ids,
            block_size=block_size,
            implementation="reference",
        )
    np.testing.assert_allclose(got[0], o, atol=1e-12)
    np.testing.assert_allclose(got[1][-1], final, atol=1e-12)


@pytest.mark.parametrize("block_size", [None, 3])
def test_the_gradients_are_the_operator(block_size):
    """The backward pass of docs/math/document_sums.md, in float64, against jax.vjp of the dense
    form: dq, dk and dv are sums for other arguments, two of them with left and right exchanged.
    """
    rng, T, scale = np.random.default_rng(0), 23, 0.7
    q, k, v, d_o = (rng.standard_normal((T, n)) for n in (4, 4, 3, 3))
    initial, d_final = rng.standard_normal((2, 4, 3))
    ids = np.repeat([2, 1, 2], [6, 9, 8])
    start = np.array([0, 6, 15])[np.searchsorted([6, 15], np.arange(T), side="right")]
    document, block = start, start + (np.arange(T) - start) // (block_size or T) * 100
    last = (document == 15)[:, None]

    def read(q, k, v, left, right):
        """scale sum_s M_ts (q_t^T k_s) v_s, by the runs to the left and to the right."""
        same_left, same_right = (x[:, None] == x[None] for x in (left, right))
        M = np.where(np.tri(T, dtype=bool), same_left, same_right)
        return scale * (M * (q @ k.T)) @ v

    first = (document == 0)[:, None]
    expected_o = read(q, k, v, document, block) + first * (q @ (scale * initial))
    d_q = read(d_o, v, k, document, block) + first * (d_o @ (scale * initial).T)
    d_k = read(v, d_o, q, block, document) + last * (v @ d_final.T)
    d_v = read(k, q, d_o, block, document) + last * (k @ d_final)
    d_initial = scale * (first * q).T @ d_o
    with jax.enable_x64(True):

        def call(q, k, v, state):
            q, k, v = (x[None, :, None] for x in (q, k, v))
            keywords = {"segment_ids": ids[None], "block_size": block_size, "scale": scale}
            o, final = document_sums(
                *(q, k, v), initial_state=state[None, None], implementation="reference", **keywords
            )
            return o[0, :, 0], final[0, 0]

        (o, _), vjp = jax.vjp(call, q, k, v, initial)
        got = vjp((d_o, d_final))
    np.testing.assert_allclose(o, expected_o, atol=1e-12)
    for one, other in zip(got, (d_q, d_k, d_v, d_initial)):
        np.testing.assert_allclose(one, other, atol=1e-12)


def test_blocks_of_one_token_are_linear_attention():
    inputs = inputs_of(CASE, Shape(T=40), "whole")
    q, k, v, state = (inputs[name] for name in ("q", "k", "v", "initial_state"))
    keywords = {"initial_state": state, "segment_ids": documents(2, 40)}
    both = jax.jit(
        lambda: (
            document_sums(q, k, v, block_size=1, **keywords),
            linear_attention(q, k, v, **keywords),
        )
    )
    for one, other in zip(*both()):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_the_order_of_tokens_does_not_matter():
    """A permutation of the tokens permutes the outputs, gradients too."""
    inputs = inputs_of(CASE, Shape(T=50), "whole")
    order = np.random.default_rng(0).permutation(50)
    shapes = jax.eval_shape(lambda x: CASE.call(x, implementation="reference"), inputs)
    d_o, d_final = cotangents_of(*shapes)
    got = everything(
        *(CASE, "chunked", over_time(inputs, lambda x: x[:, order]), None),
        (d_o[:, order], d_final),
    )
    expected = everything(CASE, "chunked", inputs, None, (d_o, d_final))
    permuted = {
        name: x[:, order] if x.ndim == 4 and x.shape[1] == 50 else x
        for name, x in jax.device_get(expected).items()
    }
    assert_close(got, permuted, TOLERANCE["float32"])


def test_rows_in_pieces(monkeypatch):
    """Whole rows whose products are cut for a CPU's cache, the last piece not whole; and a gradient
    of their gradient."""
    monkeypatch.setattr(chunk_blocks, "CPU_STATE_ROWS", 8)
    inputs = inputs_of(CASE, Shape(B=1, T=150, H=2, G=1), "whole")
    text = str(jax.make_jaxpr(lambda x: CASE.call(x, implementation="chunked"))(inputs))
    assert text.count("scan[") == 2  # sums, and reads
    assert_close(everything(CASE, "chunked", inputs), truth(CASE, inputs), TOLERANCE["float32"])

    def twice(inputs, implementation):
        def loss(inputs):
            return sum(
                jnp.sum(jnp.sin(x)) for x in CASE.call(inputs, implementation=implementation)
            )

        gradients = jax.grad(lambda x: sum(jnp.sum(jnp.sin(g)) for g in jax.grad(loss)(x).values()))
        return jax.jit(gradients)(inputs)

    small = {name: 0.1 * x for name, x in inputs.items()}
    assert_close(twice(small, "chunked"), twice(small, "reference"), 1e-4)


@pytest.mark.slow
def test_chunk_size_changes_rounding_only():
    inputs, ids = inputs_of(CASE, Shape(T=130), "whole"), documents(2, 130)
    expected = truth(CASE, inputs, ids)
    for chunk_size in (16, 64, 128):

        def call(inputs, chunk_size=chunk_size, **keywords):
            return CASE.call(inputs, chunk_size=chunk_size, **keywords)

        got = everything(dataclasses.replace(CASE, call=call), "chunked", inputs, ids)
        assert_close(got, expected, TOLERANCE["float32"])


def _arrays(B=2, T=5, G=2, H=2, K=8, V=4, dtype=np.float32):
    rng = np.random.default_rng(0)
    sizes = {"q": (B, T, G, K), "k": (B, T, G, K), "v": (B, T, H, V)}
    return {name: rng.standard_normal(size).astype(dtype) for name, size in sizes.items()}


def test_dtypes_of_results():
    """bfloat16 keeps its output and float32 states; float64 stays, and widens states."""
    x = {name: array.astype(jnp.bfloat16) for name, array in _arrays(T=20).items()}
    for ids in (None, documents(2, 20)):
        o, state = jax.eval_shape(lambda x, ids=ids: CASE.call(x, segment_ids=ids), x)
        assert o.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    with jax.enable_x64(True):
        x = _arrays(T=20)
        x["k"] = x["k"].astype(np.float64)
        o, state = jax.eval_shape(CASE.call, x)
        assert o.dtype == np.float32 and state.dtype == np.float64


def test_memory_of_the_backward_pass_is_not_T_squared():
    """What the compiled gradient of packed documents allocates is a few times the inputs; weights
    of all pairs of tokens would be 64 times, a state for each token as much."""
    T, K = 4096, 64
    x = {name: jax.ShapeDtypeStruct((1, T, 1, K), jnp.float32) for name in "qkv"}
    ids = jax.ShapeDtypeStruct((1, T), jnp.int32)

    def loss(x, ids):
        o, state = CASE.call(x, segment_ids=ids)
        return jnp.sum(o**2) + jnp.sum(state**2)

    compiled = jax.jit(jax.grad(loss)).lower(x, ids).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 16 * T * K * 4


@pytest.mark.parametrize(
    "change, message",
    [
        ({"block_size": 0}, "document_sums: block_size is 0; expected an integer of at least 1"),
        ({"block_size": 2.5}, "block_size is 2.5; expected an integer of at least 1, or None"),
        ({"block_size": True}, "block_size is True; expected an integer"),
        ({"q": np.zeros((2, 5, 16))}, r"must be \(B, T, heads, dim\); got q \(2, 5, 16\)"),
        ({"v": np.zeros((2, 5, 3, 4))}, "G must divide v's heads H"),
        ({"initial_state": np.zeros((2, 2, 4, 8))}, r"\(2, 2, 4, 8\); expected \(2, 2, 8, 4\)"),
        ({"segment_ids": np.zeros((5,), int)}, r"segment_ids has shape \(5,\); expected \(2, 5\)"),
        ({"chunk_size": 48}, "chunk_size is 48; expected a power of two, 16 or more"),
        (
            {"implementation": "fast"},
            "choose one of 'pallas_tpu', 'triton', 'chunked', 'naive_chunk', 'reference', or None",
        ),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    named = {"q": "q_BTHK", "k": "k_BTHK", "v": "v_BTHV"}
    arrays = {named.get(name, name): x for name, x in {**_arrays(), **change}.items()}
    with pytest.raises(ValueError, match=message):
        document_sums(**arrays)


def test_published_shapes_fit():
    for name, shape in SHAPES.items():
        B, T, G, H, K, V = (shape[n] for n in "BTGHKV")
        sizes = {"q": (B, T, G, K), "k": (B, T, G, K), "v": (B, T, H, V)}
        x = {n: jax.ShapeDtypeStruct(size, jnp.bfloat16) for n, size in sizes.items()}
        call = functools.partial(CASE.call, block_size=shape["block_size"])
        o, state = jax.eval_shape(call, x)
        assert o.shape == (B, T, H, V) and state.shape == (B, H, K, V), name


def test_explain_says_which_kind_of_call():
    q = jax.ShapeDtypeStruct((1, 40, 2, 8), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, 40), jnp.int32)
    for keywords, kind in (
        ({}, "row"),
        ({"block_size": 20}, "blocks"),
        ({"segment_ids": ids}, "packed"),
    ):
        choice = kernels_pallas.explain(document_sums, q, q, q, **keywords)
        assert (choice.kind, choice.implementation) == (f"{kind} float32", "chunked")
