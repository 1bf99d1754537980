"""softmax_attention: every implementation against the definition in float64, per position; what is
seen, exactly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import softmax_attention
from kernels_pallas.dispatch import devices
from kernels_pallas.ops.softmax_attention import api, library, step
from kernels_pallas.ops.softmax_attention.shapes import SHAPES
from tests.kernels_pallas.ops.conformance import (
    LENGTHS,
    TOLERANCE,
    assert_close,
    cotangents_of,
    documents,
)

# A kind of call: its keywords, and the heads H and G.
KINDS = {
    "causal": ({}, 2, 2),
    "everything": ({"causal": False}, 2, 2),
    "window": ({"window": 100}, 4, 2),
    "window both ways": ({"window": 40, "causal": False}, 2, 1),
    "wide window": ({"window": 5000}, 2, 2),
    "scale": ({"scale": 0.3}, 4, 1),
}


def _inputs(T, kind, packed, dtype=np.float32, S=None, B=2, K=8, V=12):
    keywords, H, G = KINDS[kind]
    rng = np.random.default_rng(T)
    sizes = {"q": (B, T, H, K), "k": (B, S or T, G, K), "v": (B, S or T, G, V)}
    qkv = {name: rng.standard_normal(size).astype(np.float32) for name, size in sizes.items()}
    qkv = {name: x.astype(dtype) for name, x in qkv.items()}
    return qkv, {**keywords, **({"segment_ids": documents(B, T)} if packed else {})}


def _everything(qkv, keywords, implementation, g=None):
    static = {n: x for n, x in keywords.items() if not isinstance(x, np.ndarray | jax.Array)}
    arrays = {n: x for n, x in keywords.items() if n not in static}
    attend = functools.partial(softmax_attention, implementation=implementation, **static)

    @jax.jit
    def run(qkv, g, arrays):
        o, vjp = jax.vjp(lambda x: attend(x["q"], x["k"], x["v"], **arrays), qkv)
        (gradients,) = vjp(g.astype(o.dtype))
        return {"output": o, **{f"gradient of {name}": z for name, z in gradients.items()}}

    g = _cotangent(qkv) if g is None else g
    return run(qkv, g.astype(qkv["q"].dtype), arrays)


def _cotangent(qkv):
    B, T, H, _ = qkv["q"].shape
    shape = jax.ShapeDtypeStruct((B, T, H, qkv["v"].shape[3]), np.float32)
    return cotangents_of(shape, shape)[0].astype(qkv["q"].dtype)


def _truth(qkv, keywords):
    """From the same (rounded) inputs and cotangent."""
    with jax.enable_x64(True):
        wide = {name: x.astype(np.float64) for name, x in qkv.items()}
        named = _everything(wide, keywords, "reference", _cotangent(qkv))
        return {name: np.asarray(x) for name, x in named.items()}


FAST = {(300, "window", True), (129, "window both ways", False)}
CALLS = [
    pytest.param(T, kind, packed, marks=() if (T, kind, packed) in FAST else pytest.mark.slow)
    for T in (*LENGTHS, 129, 300)
    for kind in KINDS
    for packed in (False, True)
]


@pytest.mark.parametrize("T, kind, packed", CALLS)
def test_float32(T, kind, packed):
    qkv, keywords = _inputs(T, kind, packed)
    expected = _truth(qkv, keywords)
    for implementation in ("chunked", "xla"):
        got = _everything(qkv, keywords, implementation)
        if (
            T == 1
        ):  # one key has weight 1 whatever q and k are: their gradient is 0, and has no size to compare with
            for name in ("gradient of q", "gradient of k"):
                assert np.abs(got.pop(name)).max() < 1e-6
        assert_close(got, {name: expected[name] for name in got}, TOLERANCE["float32"])


@pytest.mark.parametrize("implementation", ["chunked", pytest.param("xla", marks=pytest.mark.slow)])
def test_bfloat16(implementation):
    """Where every key is seen by about as many queries."""
    qkv, keywords = _inputs(300, "window both ways", False, jnp.bfloat16)
    got = _everything(qkv, keywords, implementation)
    assert got["output"].dtype == jnp.bfloat16
    assert_close(got, _truth(qkv, keywords), TOLERANCE["bfloat16"])


@pytest.mark.parametrize("implementation", ["chunked", "xla"])
def test_float16(implementation):
    """Also where there are few logits, and on a CPU, which lacks products of float16 to float32."""
    qkv, keywords = _inputs(60, "window", False, jnp.float16)
    got = _everything(qkv, keywords, implementation)
    assert got["output"].dtype == jnp.float16
    assert_close(got, _truth(qkv, keywords), TOLERANCE["bfloat16"])


@pytest.mark.parametrize("implementation", ["chunked", pytest.param("xla", marks=pytest.mark.slow)])
def test_bfloat16_of_short_documents(implementation):
    """The first tokens of documents have gradients several times the tensor's rms. There rounding
    the exact answer to bfloat16 can by itself cost 2% of that rms, so the error counts against the
    position's own size where that is larger.
    """
    qkv, keywords = _inputs(300, "window", True, jnp.bfloat16)
    got, expected = _everything(qkv, keywords, implementation), _truth(qkv, keywords)
    for name, true in expected.items():
        error = np.sqrt(np.mean((np.asarray(got[name], np.float64) - true) ** 2, axis=-1))
        size = np.sqrt(np.mean(true**2, axis=-1))
        assert (error / np.maximum(size, np.sqrt(np.mean(true**2)))).max() < TOLERANCE[
            "bfloat16"
        ], name


def test_definition_by_numpy():
    """One query and one head at a time, sharing nothing with the operator."""
    qkv, keywords = _inputs(20, "window", True)
    q, k, v = (x.astype(np.float64) for x in qkv.values())
    keywords = {**keywords, "window": 3, "segment_ids": np.array([[7] * 9 + [8] * 4 + [7] * 7] * 2)}
    run = np.array([0] * 9 + [1] * 4 + [2] * 7)
    expected = np.zeros((2, 20, 4, 12))
    for b, t, h in np.ndindex(2, 20, 4):
        seen = [s for s in range(max(0, t - 2), t + 1) if run[s] == run[t]]
        weight = np.exp([q[b, t, h] @ k[b, s, h // 2] / np.sqrt(8) for s in seen])
        expected[b, t, h] = (weight / weight.sum()) @ v[b, seen, h // 2]
    for implementation in ("reference", "chunked", "xla"):
        got = _everything(qkv, keywords, implementation)["output"]
        np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("implementation", ["chunked", "xla"])
def test_cache_with_empty_and_shuffled_slots(implementation):
    """Slots in any order, a third of them empty; rows of the batch at different places; some
    queries see nothing."""
    T, S = 5, 150
    qkv, _ = _inputs(T, "window", False, S=S)
    rng = np.random.default_rng(0)
    places = np.stack([rng.permutation(S) for _ in range(2)]).astype(np.int32)
    places = np.where(places % 3 == 0, -1, places)
    keywords = {
        "window": 30,
        "q_positions_BT": np.array([[60, 61, 62, 63, 64], [0, 1, 2, 149, 300]], np.int32),
        "kv_positions_BS": places,
    }
    expected, got = _truth(qkv, keywords), _everything(qkv, keywords, implementation)
    assert_close(got, expected, TOLERANCE["float32"])
    assert (got["output"][1, 0] == 0).all() and (got["output"][1, 4] == 0).all()
    assert (got["gradient of q"][1, 0] == 0).all()
    assert not np.asarray(got["gradient of k"])[places == -1].any()


@pytest.mark.parametrize("implementation", ["chunked", "xla"])
def test_an_empty_cache_gives_zero_and_no_nan(implementation):
    qkv, _ = _inputs(2, "causal", False, S=3)
    positions = {
        "q_positions_BT": np.zeros((2, 2), np.int32),
        "kv_positions_BS": np.full((2, 3), -1, np.int32),
    }
    for name, x in _everything(qkv, positions, implementation).items():
        assert (x == 0).all(), name


def test_step_by_step_and_pieces_equal_whole():
    T, window = 40, 7
    qkv, _ = _inputs(T, "window", False)
    q, k, v = qkv.values()
    attend = jax.jit(softmax_attention, static_argnames="window")
    whole = attend(q, k, v, window=window)
    places = np.broadcast_to(np.arange(T, dtype=np.int32), (2, T))

    @jax.jit
    def one(t):
        filled = jnp.where(places <= t, places, -1)
        q_BHK = jax.lax.dynamic_index_in_dim(q, t, 1, keepdims=False)
        position_B = jnp.full((2,), t)
        return step(q_BHK, k, v, q_position_B=position_B, kv_positions_BS=filled, window=window)

    np.testing.assert_allclose(jnp.stack([one(t) for t in range(T)], 1), whole, atol=2e-6)
    second = attend(
        q[:, 15:],
        k[:, 9:],
        v[:, 9:],
        window=window,
        q_positions_BT=places[:, 15:],
        kv_positions_BS=places[:, 9:],
    )
    np.testing.assert_allclose(second, whole[:, 15:], atol=2e-6)


def test_separate_segments_of_keys():
    """With kv_segment_ids_BS the ids are compared as they are: those of a cache and those of new
    tokens."""
    qkv, _ = _inputs(4, "causal", False, S=6)
    positions = {
        "q_positions_BT": np.array([[3, 4, 0, 1]] * 2, np.int32),
        "kv_positions_BS": np.array([[1, 2, 3, 4, 0, 1]] * 2, np.int32),
    }
    ids = {
        "segment_ids": np.array([[0, 0, 1, 1]] * 2, np.int32),
        "kv_segment_ids_BS": np.array([[0, 0, 0, 0, 1, 1]] * 2, np.int32),
    }
    attend = jax.jit(softmax_attention, static_argnames="implementation")
    together = attend(*qkv.values(), **positions, **ids, implementation="chunked")
    for tokens, slots in ((slice(0, 2), slice(0, 4)), (slice(2, 4), slice(4, 6))):
        alone = attend(
            qkv["q"][:, tokens],
            qkv["k"][:, slots],
            qkv["v"][:, slots],
            q_positions_BT=positions["q_positions_BT"][:, tokens],
            kv_positions_BS=positions["kv_positions_BS"][:, slots],
        )
        np.testing.assert_allclose(together[:, tokens], alone, atol=1e-6)


def test_what_is_seen_by_gradient():
    """Values that get a gradient from token t are exactly those of its window and its document."""
    T, window, ids = 300, 60, documents(2, 300)[1:]
    qkv, _ = _inputs(T, "window", False, B=1)

    @jax.jit
    @jax.vmap
    def touched(t):
        def output(v):
            o = softmax_attention(
                qkv["q"], qkv["k"], v, window=window, segment_ids=ids, implementation="chunked"
            )
            return o[0, t].sum()

        return jnp.abs(jax.grad(output)(qkv["v"])).max(axis=(0, 2, 3)) > 0

    run = np.cumsum(np.diff(ids[0], prepend=ids[0, 0]) != 0)
    tokens = np.array([0, 1, 59, 60, 127, 128, 129, 255, 256, 299])
    age = tokens[:, None] - np.arange(T)[None]
    expected = (age >= 0) & (age < window) & (run[tokens][:, None] == run[None])
    np.testing.assert_array_equal(touched(tokens), expected)


def test_vmap_is_a_loop_and_remat_changes_nothing():
    """Through the blocks' own backward pass."""
    qkv, keywords = _inputs(140, "window", True)
    attend = functools.partial(
        softmax_attention, window=keywords["window"], implementation="chunked"
    )

    def loss(attend, qkv, ids):
        return jnp.sum(jnp.sin(attend(*(qkv[name] for name in "qkv"), segment_ids=ids)))

    @jax.vmap
    @jax.checkpoint
    def mapped(q, k, v, segment_ids):
        return attend(q[None], k[None], v[None], segment_ids=segment_ids[None])[0]

    def by(attend):
        return jax.jit(jax.grad(functools.partial(loss, attend)))(qkv, keywords["segment_ids"])

    got = by(lambda q, k, v, segment_ids: mapped(q, k, v, segment_ids))
    assert_close(got, by(attend), 2e-6)


def test_blocks_keep_memory_linear():
    """Compiled forward and backward at 4096 tokens: all logits would be 64 MiB a head."""
    x = jax.ShapeDtypeStruct((1, 4096, 1, 8), jnp.float32)

    def loss(q, k, v):
        return jnp.sum(softmax_attention(q, k, v))

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 2**20


@pytest.mark.parametrize(
    "kind, packed, T",
    [
        ("window", True, 256),
        pytest.param("causal", False, 200, marks=pytest.mark.slow),
        pytest.param("everything", False, 200, marks=pytest.mark.slow),
        pytest.param("window both ways", True, 130, marks=pytest.mark.slow),
    ],
)
def test_splash_interpreted(kind, packed, T):
    """TPU's kernel, by Pallas' interpreter: grouped heads, K != V, lengths that are padded."""
    qkv, keywords = _inputs(T, kind, packed, K=16, V=24)
    with devices.interpreted():
        got = _everything(qkv, keywords, "splash")
    assert_close(got, _truth(qkv, keywords), TOLERANCE["float32"])


def test_choice_follows_the_size_of_the_logits():
    def names(T):
        x = jnp.zeros((1, T, 1, 8))
        jaxpr = str(jax.make_jaxpr(softmax_attention)(x, x, x))
        return "while" in jaxpr or "scan" in jaxpr

    assert not names(64) and names(512)


@pytest.mark.parametrize(
    "name, message",
    [("cudnn", "a kernel for gpu; this is cpu"), ("splash", "a kernel for tpu; this is cpu")],
)
def test_accelerator_kernels_say_why_they_cannot_run(name, message):
    x = jnp.zeros((1, 8, 1, 8))
    with pytest.raises(NotImplementedError, match=message):
        softmax_attention(x, x, x, implementation=name)


@pytest.mark.parametrize(
    "change, K, message",
    [
        ({}, 64, None),
        ({"causal": False}, 64, None),
        ({"window": 5}, 64, None),
        ({"window": 5, "causal": False}, 64, "a window with causal=True only"),
        ({"segment_ids": jnp.zeros((1, 4), int)}, 64, "no segment ids"),
        ({}, 20, "multiples of 8; this call needs 20"),
        ({"positions": jnp.zeros((1, 4), int), "causal": False}, 64, "gives positions"),
    ],
)
def test_what_cudnn_takes(monkeypatch, change, K, message):
    class Hopper:
        platform, device_kind, compute_capability = "gpu", "NVIDIA H200", "9.0"

    monkeypatch.setattr(library.jax, "devices", lambda: [Hopper()])
    x = jnp.zeros((1, 4, 1, K), jnp.bfloat16)
    ids = change.get("segment_ids"), None
    visibility = api._visibility(
        *((1, 4), 4, ids, (change.get("positions"),) * 2),
        *(change.get("causal", True), change.get("window")),
    )
    reason = library.cudnn_unsupported_reason(q=x, v=x, visibility=visibility)
    assert reason is None if message is None else message in reason
    float32 = library.cudnn_unsupported_reason(q=x.astype(jnp.float32), v=x, visibility=visibility)
    assert "q is float32" in float32


def test_splash_takes_no_ids_of_the_keys_own():
    q, ids = jnp.zeros((1, 4, 1, 8)), jnp.zeros((1, 4), int)
    for own, message in ((None, None), (ids + 1, "one array of segment ids")):
        visibility = api._visibility((1, 4), 4, (ids, own), (None, None), False, None)
        reason = library.splash_unsupported_reason(q=q, v=q, visibility=visibility)
        assert reason is None if message is None else message in reason


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": jnp.zeros((2, 5, 8))}, r"must be \(B, time, heads, dim\); got q \(2, 5, 8\)"),
        ({"q": jnp.zeros((3, 5, 4, 8))}, "must share the batch B; got q"),
        ({"v": jnp.zeros((2, 4, 2, 8))}, "k and v must share time and heads"),
        ({"q": jnp.zeros((2, 5, 4, 6))}, "must share their last dimension K"),
        ({"q": jnp.zeros((2, 5, 3, 8))}, "k's heads must divide q's"),
        ({"q": jnp.zeros((2, 5, 4, 8), int)}, "q has dtype int.*; expected a floating dtype"),
        ({"window": 0}, "window is 0; expected an integer of at least 1"),
        ({"q": jnp.zeros((2, 3, 4, 8))}, "3 queries and 5 keys: with causal or a window"),
        ({"segment_ids": jnp.zeros((2, 4))}, r"segment_ids has shape \(2, 4\); expected \(2, 5\)"),
        ({"kv_segment_ids_BS": jnp.zeros((2, 5))}, "needs segment_ids beside it"),
        ({"q_positions_BT": jnp.zeros((2, 5))}, "give both q_positions_BT and kv_positions_BS"),
        ({"segment_ids": jnp.zeros((2, 5))}, "segment_ids has dtype float32; expected integers"),
        (
            {name: jnp.zeros((2, 5)) for name in ("q_positions_BT", "kv_positions_BS")},
            "q_positions_BT has dtype float32; expected integers",
        ),
        ({"scale": jnp.ones(())}, "expected a number or None .multiply q by one that is learned"),
        (
            {"implementation": "flash"},
            "unknown implementation 'flash'; choose one of 'splash', 'cudnn', ",
        ),
    ],
)
def test_errors_name_what_was_given(change, message):
    arguments = {"q": jnp.zeros((2, 5, 4, 8)), "k": jnp.zeros((2, 5, 2, 8)), **change}
    arguments.setdefault("v", arguments["k"])
    with pytest.raises(ValueError, match=message):
        softmax_attention(*[arguments.pop(name) for name in "qkv"], **arguments)


@pytest.mark.parametrize("implementation", ["chunked", "xla"])
def test_unsigned_positions_and_ids(implementation):
    """A later key is hidden, though its age is no unsigned number."""
    qkv, _ = _inputs(6, "causal", packed=False, B=1)
    position, ids = np.arange(6)[None], np.array([[3, 3, 3, 1, 1, 1]])

    def attend(dtype):
        at, own = position.astype(dtype), ids.astype(dtype)
        keywords = {"q_positions_BT": at, "kv_positions_BS": at, "kv_segment_ids_BS": own}
        keywords |= {"segment_ids": own, "implementation": implementation}
        return softmax_attention(*qkv.values(), **keywords)

    expected = attend(np.int32)
    np.testing.assert_allclose(expected[:, 3], qkv["v"][:, 3], rtol=1e-6)  # a document's first
    np.testing.assert_array_equal(attend(np.uint32), expected)


def test_published_workloads_trace():
    for shape in SHAPES.values():
        B, T, H, G, K = (shape[name] for name in "BTHGK")
        q = jax.ShapeDtypeStruct((B, T, H, K), jnp.bfloat16)
        k = jax.ShapeDtypeStruct((B, T, G, K), jnp.bfloat16)
        attend = functools.partial(softmax_attention, window=shape["window"])
        assert jax.eval_shape(attend, q, k, k).shape == q.shape


@pytest.mark.parametrize("implementation", ["chunked", "xla", "reference"])
def test_what_is_not_finite_reaches_those_that_see_it_alone(implementation):
    """Not earlier tokens, other documents, or what lies outside the window; gradients too."""
    rng, (T, window, t) = np.random.default_rng(0), (150, 20, 70)
    clean = [rng.standard_normal((1, T, heads, 4)).astype(np.float32) for heads in (4, 2, 2)]
    ids = (np.arange(T) >= 85).astype(np.int32)[None]
    cotangent = rng.standard_normal((1, T, 4, 4)).astype(np.float32)

    @jax.jit
    def run(qkv, cotangent):
        o, vjp = jax.vjp(
            lambda *qkv: softmax_attention(
                *qkv, window=window, segment_ids=ids, implementation=implementation
            ),
            *qkv,
        )
        return o, vjp(cotangent)

    for n, value in enumerate((np.nan, np.inf, np.nan)):
        bad = [x.copy() for x in clean]
        bad[n][0, t, -1, 0] = value
        hit = np.zeros((T, 4), bool)  # of key head 1: query heads 2 and 3
        hit[t : t + 1 if n == 0 else 85, 3 if n == 0 else slice(2, 4)] = True
        o, gradients = run(bad, np.where(hit[None, ..., None], np.nan, cotangent))
        assert np.isnan(o[0][hit]).all()
        expected, expected_gradients = run(
            [np.where(np.isfinite(x), x, 0) for x in bad],
            np.where(hit[None, ..., None], 0, cotangent),
        )
        np.testing.assert_array_equal(o[0][~hit], expected[0][~hit])
        for got, right in zip(gradients, expected_gradients):
            assert np.isfinite(right).all()
            np.testing.assert_allclose(got, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("window", [2**31 - 2, 2**31 - 1, 2**31, 2**40])
def test_a_window_as_large_as_integers_hides_nothing(window, given):
    rng, T = np.random.default_rng(0), 150
    q, k, v = (rng.standard_normal((1, T, 1, 4)).astype(np.float32) for _ in range(3))
    positions = np.arange(T, dtype=np.int32)[None]
    where = {"q_positions_BT": positions, "kv_positions_BS": positions} if given else {}
    expected = softmax_attention(q, k, v, implementation="reference")
    for name in ("chunked", "reference"):
        got = softmax_attention(q, k, v, window=window, implementation=name, **where)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
