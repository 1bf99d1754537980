"""Calls at the edge of what is legal, and mistakes: every operator, in one form each."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import kernels_pallas
from kernels_pallas import context_parallel
from kernels_pallas.ops.causal_conv import reference as causal_conv
from kernels_pallas.ops.delta_rule import api as delta_rule
from kernels_pallas.ops.diagonal_scan import reference as diagonal_scan
from kernels_pallas.ops.linear_attention import api as linear_attention
from kernels_pallas.ops.softmax_attention import api as softmax_attention

SIZES = {"B": 2, "T": 5, "G": 1, "H": 2, "K": 4, "V": 3, "D": 6, "I": 3, "W": 7}
RECURRENCES = {
    "linear_attention": {"q": "BTGK", "k": "BTGK", "v": "BTHV", "log_decay": "BTHK"},
    "delta_rule": {"q": "BTGK", "k": "BTGK", "v": "BTHV", "beta": "BTH", "log_decay": "BTH"},
    "diagonal_plus_low_rank": {"q": "BTGK", "k": "BTGK", "v": "BTHV", "a": "BTHK", "b": "BTHK"},
    "document_sums": {"q": "BTGK", "k": "BTGK", "v": "BTHV"},
    "diagonal_scan": {"x": "BTD", "decay": "BTD"},
    "causal_conv": {"x": "BTD", "w": "ID"},
}
MATRIX = ("linear_attention", "delta_rule", "diagonal_plus_low_rank", "document_sums")
STATES = {"diagonal_scan": "BD", "causal_conv": "BSD"} | dict.fromkeys(MATRIX, "BHKV")
OTHERS = {
    "softmax_attention": {"q": "BTHK", "k": "BTGK", "v": "BTGV"},
    "linear_cross_entropy": {"x": "BTD", "matrix": "WD", "labels": "BT"},
    "linear_kl_divergence": {"x": "BTD", "matrix": "WD", "teacher": "BTW"},
}
EMPTY = [(name, letter) for name in RECURRENCES for letter in "BTHKVD"] + [
    (name, letter) for name in OTHERS for letter in "BTHKVD"
]


def _arrays(name, sizes):
    rng = np.random.default_rng(0)
    arrays = []
    for given, letters in (RECURRENCES | OTHERS)[name].items():
        x = rng.standard_normal([sizes[letter] for letter in letters]).astype(np.float32)
        x = -abs(x) if given == "log_decay" else x
        arrays.append(np.zeros(x.shape, np.int32) if given == "labels" else x)
    return arrays


@pytest.mark.parametrize(
    "name, letter", [e for e in EMPTY if e[1] in "".join((RECURRENCES | OTHERS)[e[0]].values())]
)
def test_empty_in_empty_out(name, letter):
    """Shapes as for any size; no token leaves the initial state as it is; no channels make zeros;
    gradients are zeros.
    """
    sizes = SIZES | {letter: 0} | ({"G": 0} if letter == "H" else {})
    sizes["S"] = sizes["I"] - 1
    arrays = _arrays(name, sizes)
    operator = getattr(kernels_pallas, name)
    state = None
    if name in RECURRENCES:
        state = np.ones([sizes[x] for x in STATES[name]], np.float32)
        operator = functools.partial(operator, initial_state=state)
    results = operator(*arrays)
    output, final = results if name in RECURRENCES else (results, None)
    uniform = name == "softmax_attention" and letter == "K"
    if name.startswith("linear_") and name in OTHERS:
        assert output.shape == (sizes["B"], sizes["T"])
    else:
        letters = "BTD" if name in ("diagonal_scan", "causal_conv") else "BTHV"
        assert output.shape == tuple(sizes[x] for x in letters)
        if uniform:  # every logit is 0: the mean of what is seen
            mean = np.cumsum(arrays[2], axis=1) / np.arange(1, 6)[:, None, None]
            np.testing.assert_allclose(output, np.repeat(mean, 2, axis=2), atol=1e-6)
        else:
            assert not np.any(output)
    if state is not None:
        assert final.shape == state.shape
        if letter == "T":
            np.testing.assert_array_equal(final, state)

    def loss(arrays, state):
        results = operator(*arrays) if state is None else operator(*arrays, initial_state=state)
        return sum(jnp.sum(x) for x in jax.tree.leaves(results))

    floats = [x for x in arrays if x.dtype != np.int32]
    gradients = jax.grad(lambda f: loss(f + arrays[len(f) :], state))(floats)
    assert [g.shape for g in gradients] == [x.shape for x in floats]
    assert uniform or not any(np.any(g) for g in gradients) or letter == "D"
    if state is not None and letter == "T":
        np.testing.assert_array_equal(jax.grad(loss, 1)(arrays, state), np.ones_like(state))


@pytest.mark.parametrize("name", [*RECURRENCES, "softmax_attention"])
def test_empty_stretches_over_ranks(name):
    """Context parallel: no tokens on any rank."""
    sizes = SIZES | {"T": 0, "S": 2, "V": 4}
    mesh = jax.make_mesh((2,), ("seq",), (AxisType.Auto,), devices=jax.devices()[:2])
    time, same = PartitionSpec(None, "seq"), PartitionSpec()
    letters = [*(RECURRENCES | OTHERS)[name].values()]
    arrays = _arrays(name, sizes)
    more, specs = [], [time if "T" in x else same for x in letters]
    if name in RECURRENCES:
        more.append(np.ones([sizes[x] for x in STATES[name]], np.float32))
        specs.append(same)

    def call(*arrays):
        keywords = {"initial_state": arrays[-1]} if more else {}
        arrays = arrays[: len(arrays) - len(more)]
        return getattr(context_parallel, name)(*arrays, axis_name="seq", **keywords)

    results = jax.shard_map(
        call, mesh=mesh, in_specs=tuple(specs), out_specs=(time, same) if more else time
    )(*arrays, *more)
    expected = getattr(kernels_pallas, name)(
        *arrays, **({"initial_state": more[0]} if more else {})
    )
    assert [x.shape for x in jax.tree.leaves(results)] == [
        x.shape for x in jax.tree.leaves(expected)
    ]
    if more:
        np.testing.assert_array_equal(results[1], more[0])


MISTAKES = [
    *((name, given, value) for name in RECURRENCES | OTHERS for given in [0] for value in (0.5, None, [1.0])),
    *((name, "initial_state", value) for name in RECURRENCES for value in (0.0, [[0.0]])),
    *((name, "segment_ids", value) for name in RECURRENCES for value in (1, [[1]])),
    *((name, "segment_ids", np.zeros((2, 5), np.float32)) for name in RECURRENCES),
    *((name, "log_decay", value) for name in ("linear_attention", "delta_rule") for value in (-0.1, [-0.1] * 2)),
    *((name, "chunk_size", value) for name in MATRIX for value in (32.0, True, "32", 48)),
    *(("linear_cross_entropy", "chunk_size", value) for value in (3.0, True, 0)),
    *((name, "scale", value) for name in MATRIX for value in ("1", True, [1.0])),
    *((name, "scale", np.ones(2, np.float32)) for name in MATRIX),
    *(("softmax_attention", "window", value) for value in (2.0, True, 0, "2", [2])),
    *(("softmax_attention", given, 0) for given in ("kv_segment_ids_BS", "segment_ids", "causal")),
    ("softmax_attention", "scale", True),
    *(("document_sums", "block_size", value) for value in (2.0, True, 0, "2", [2])),
    ("diagonal_scan", "reverse", 1),
    ("causal_conv", "bias", 0.0),
    ("causal_conv", "l2_norm_heads", 2.0),
    ("causal_conv", "eps", None),
    ("linear_cross_entropy", "bias_W", 0.0),
    ("linear_cross_entropy", "mask_BT", True),
    *(("linear_cross_entropy", "z_loss", value) for value in (None, "0", np.ones(3, np.float32))),
    *(("linear_cross_entropy", "logit_softcap", value) for value in (True, "3", np.ones(()))),
    *(("linear_kl_divergence", "temperature", value) for value in (None, 0, "1", np.ones(()))),
    ("linear_kl_divergence", "teacher_matrix", [1.0]),
]  # fmt: skip


@pytest.mark.parametrize("name, argument, value", MISTAKES)
def test_a_mistake_is_named(name, argument, value):
    """Before anything is compiled: which argument, what it was, what was expected."""
    arrays, keywords = _arrays(name, SIZES), {}
    if argument == 0:
        arrays[0], argument = value, [*(RECURRENCES | OTHERS)[name]][0]
    else:
        keywords[argument] = value
    if argument == "log_decay":
        arrays = arrays[: len(arrays) - 1]
    if argument == "kv_segment_ids_BS":
        keywords["segment_ids"] = np.zeros((2, 5), np.int32)
    with pytest.raises(ValueError, match=f"^{name}: {argument}.* (is|has) .*; (expected|it must)"):
        getattr(kernels_pallas, name)(*arrays, **keywords)


def test_a_mistake_in_one_token_is_named():
    """The steps of decoding say the same."""
    x, q = jnp.ones((2, 4)), jnp.ones((2, 1, 4))
    for step, arrays, mistake in (
        (linear_attention.step, (q, q, q, -0.1), "linear_attention.step: log_decay is -0.1 .float"),
        (linear_attention.step, (0.5, q, q), "linear_attention.step: q is 0.5 .float"),
        (
            delta_rule.step,
            (q, q, q, x[:, :1], [-0.1]),
            "delta_rule.step: log_decay is .-0.1. .list",
        ),
        (delta_rule.step, (q, q, q, 1.0), "delta_rule.step: beta is 1.0 .float"),
        (diagonal_scan.step, (x, 0.9, x), "diagonal_scan.step: decay is 0.9 .float"),
        (causal_conv.step, (x, None, q), "causal_conv.step: w is None"),
    ):
        with pytest.raises(ValueError, match=f"^{mistake}.*; expected an array"):
            step(*arrays)
    keys = {"kv_positions_BS": jnp.zeros((2, 1), int), "q_position_B": 0}
    with pytest.raises(ValueError, match="softmax_attention.step: q_position is 0 .int.; expected"):
        softmax_attention.step(q, q[:, None], q[:, None], **keys)


@pytest.mark.parametrize("name", ["delta_rule", "diagonal_plus_low_rank"])
def test_a_scale_may_be_learned(name):
    """A number and an array without axes give the same; the array has a gradient."""

    def outputs(scale):
        operator = functools.partial(getattr(kernels_pallas, name), *_arrays(name, SIZES))
        learned, number = (operator(scale=s, implementation="reference")[0] for s in (scale, 0.3))
        return jnp.sum(learned), (learned, number)

    (_, (learned, number)), d_scale = jax.jit(jax.value_and_grad(outputs, has_aux=True))(0.3)
    np.testing.assert_allclose(learned, number, atol=1e-6)
    np.testing.assert_allclose(d_scale, np.sum(number) / 0.3, rtol=1e-4)


@pytest.mark.parametrize("name", RECURRENCES | OTHERS)
def test_strict_promotion(name):
    """Nothing is promoted implicitly, forward or backward, whatever the operands' dtypes; decays
    and a state are float32.
    """
    sizes = SIZES | {"S": SIZES["I"] - 1}
    choices = {"causal_conv": ["shifted"], "softmax_attention": ["chunked", "xla"]}.get(
        name, ["chunked"]
    )
    ids = (
        {"segment_ids": np.zeros((2, 5), np.int32)}
        if name not in ("linear_cross_entropy", "linear_kl_divergence")
        else {}
    )
    if name in RECURRENCES:
        ids["initial_state"] = np.ones([sizes[x] for x in STATES[name]], np.float32)

    def loss(arrays, implementation, **keywords):
        results = getattr(kernels_pallas, name)(*arrays, **keywords, implementation=implementation)
        return sum(jnp.sum(x.astype(jnp.float32)) for x in jax.tree.leaves(results))

    arrays = _arrays(name, SIZES)
    with jax.numpy_dtype_promotion("strict"):
        for narrow, keywords in (({0, 1, 2, 3}, ids), ({0, 2}, {}), ({1}, ids)):
            mixed = [
                x.astype(jnp.bfloat16) if i in narrow and x.dtype == np.float32 else x
                for i, x in enumerate(arrays)
            ]
            for choice in (*choices, "reference"):
                call = functools.partial(loss, implementation=choice, **keywords)
                jax.eval_shape(jax.grad(call, allow_int=True), mixed)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name in MATRIX))
        for name in RECURRENCES | OTHERS
    ],
)
def test_export_with_symbolic_shapes(name):
    """One exported program, backward pass included, serves a batch and a length that it was not
    made for.
    """
    keywords = {"implementation": "chunked"} if name == "softmax_attention" else {}

    def results_and_gradients(arrays):
        def loss(arrays):
            results = getattr(kernels_pallas, name)(*arrays, **keywords)
            return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(results)), results

        floats = [x for x in arrays if x.dtype != np.int32]
        gradient = jax.grad(lambda floats: loss(floats + arrays[len(floats) :]), has_aux=True)
        return gradient(floats)

    scope = jax.export.SymbolicScope()
    letters = (RECURRENCES | OTHERS)[name].values()
    specs = [
        jax.ShapeDtypeStruct(
            jax.export.symbolic_shape(
                ",".join(x.lower() if x in "BT" else str(SIZES[x]) for x in shape), scope=scope
            ),
            array.dtype,
        )
        for shape, array in zip(letters, _arrays(name, SIZES))
    ]
    exported = jax.export.export(jax.jit(results_and_gradients))(specs)
    arrays = _arrays(name, SIZES | {"B": 3, "T": 150})
    got, expected = exported.call(arrays), jax.jit(results_and_gradients)(arrays)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
        np.testing.assert_allclose(one, other, atol=2e-4, rtol=2e-4)
