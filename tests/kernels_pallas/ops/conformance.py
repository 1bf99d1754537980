"""The conformance suite of the recurrences: every implementation of every operator runs through it.

What an operator's case (`ops/<operator>/case.py`) says of its calls and inputs is completed by a
`SuiteCase`; the operator's test file is a subclass of `Suite` with that. A new implementation
inherits all of it by adding its name to `implementations`.

Truth is the recurrent form in float64, on the same (for bfloat16: the same rounded) inputs and
cotangents. Compared are the output, the final state, and the gradient of every input, the initial
state and the gates included, under random cotangents of both the output and the final state, by
the error that `comparison` describes.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import dispatch
from kernels_pallas.dispatch import case, devices
from tests.kernels_pallas.ops.comparison import (
    TOLERANCE,
    assert_close,
    cotangents_of,
    documents,
    over_time,
)

KERNELS_LENGTH = 100
KERNELS = ("pallas_tpu", "triton")  # interpreted here: seconds of compiling for each program
LENGTHS = (1, 63, 64, 100, 128, 1000)


@dataclasses.dataclass(frozen=True)
class Shape(case.Shape):
    """Sizes of one test problem; D is the width of operators without heads, K where D is None."""

    B: int = 2
    T: int = 100
    H: int = 2
    G: int | None = 2
    K: int = 8
    V: int = 12

    @property
    def width(self) -> int:
        return self.D or self.K


@dataclasses.dataclass(frozen=True)
class SuiteCase:
    """What the conformance suite knows of an operator beside its own case; see `suite_case`.

    step: (inputs of one token, without time axis and "initial_state"; state) -> (output, state);
      None for operators without a one-token form.
    implementations: names of those that run through the suite.
    typical: regimes in which every token reaches every later one (weak decay), for the structural
      tests; the fast suite has the first.
    fast: (T, regime) pairs of the fast suite, the last of them in bfloat16, too; all others are
      slow.
    call: (inputs, implementation=..., segment_ids=None) -> (output, final state).
    grouped: whether fewer key than value heads, G < H, is a legal shape.
    fast_kernels: the (T, regime) pairs of kernels in the fast suite, with documents. Of kernels'
      structural tests one is fast, and those of other typical regimes are marked exhaustive.
    kernels_skip: whether kernels' tests of this (T, regime) are marked exhaustive, which CI has no
      time for. So are, at all lengths but KERNELS_LENGTH, their tests without documents and in
      bfloat16: one program per length and kind of call is left.
    """

    operator: dispatch.Operator
    implementations: tuple[str, ...]
    typical: tuple[str, ...]
    fast: tuple[tuple[int, str], ...]
    call: Callable[..., Any]
    step: Callable[..., Any] | None = None
    grouped: bool = True
    fast_kernels: tuple[tuple[int, str], ...] = ()
    kernels_skip: Callable[[int, str], bool] = lambda T, regime: False

    @property
    def name(self) -> str:
        return self.operator.name

    @property
    def regimes(self) -> tuple[str, ...]:
        return self.operator.case.regimes

    @property
    def rounded(self) -> tuple[str, ...]:
        return self.operator.case.rounded


def suite_case(operator: dispatch.Operator, **fields) -> SuiteCase:
    """Returns an operator's SuiteCase with these fields; its `call` is the public function."""

    def call(inputs, **keywords):
        return tuple(operator.case.call(operator.function, inputs, **keywords).values())

    return SuiteCase(operator, call=call, **fields)


def by_position(step, *names: str):
    """Returns an operator's `step`, which takes `names` by position, as a function of a dict."""

    def call(token, state):
        others = {name: x for name, x in token.items() if name not in names}
        return step(*(token[name] for name in names), **others, state=state)

    return call


@functools.cache
def at(case: SuiteCase, regime: str) -> SuiteCase:
    """Returns the case with the options that a regime stands for in its `call` and `step`."""
    options = case.operator.case.options(regime, Shape())
    if not options:
        return case
    step = None if case.step is None else functools.partial(case.step, **options)
    return dataclasses.replace(case, call=functools.partial(case.call, **options), step=step)


def inputs_of(case: SuiteCase, shape: Shape, regime: str) -> dict[str, np.ndarray]:
    """Returns the operator's inputs of a shape and regime, equal for equal arguments."""
    # Seeded by the names that decays had at first: renaming them has drawn no other numbers.
    words = {"per_token": "head", "per_channel": "channel", "per_head": "fixed"}
    first_name = " ".join(words.get(word, word) for word in regime.split())
    seed = zlib.crc32(repr((case.name, shape, first_name)).encode())
    return case.operator.case.inputs(np.random.default_rng(seed), shape, regime)


@functools.cache
def _everything(case: SuiteCase, implementation: str):
    """Returns a jitted function that computes output, final state and gradients of one call."""

    @jax.jit
    def run(inputs, cotangents, segment_ids):
        def forward(inputs):
            return case.call(inputs, implementation=implementation, segment_ids=segment_ids)

        (output, final), vjp = jax.vjp(forward, inputs)
        (gradients,) = vjp((cotangents[0].astype(output.dtype), cotangents[1].astype(final.dtype)))
        named = {f"gradient of {name}": gradient for name, gradient in gradients.items()}
        return {"output": output, "final state": final, **named}

    return run


def everything(case, implementation, inputs, segment_ids=None, cotangents=None) -> dict:
    """Returns output, final state and all gradients by name; cotangents are random if None."""
    if cotangents is None:
        shapes = jax.eval_shape(
            lambda x: case.call(x, implementation="reference", segment_ids=segment_ids), inputs
        )
        cotangents = cotangents_of(*shapes)
    return _everything(case, implementation)(inputs, cotangents, segment_ids)


def truth(case, inputs, segment_ids=None, cotangents=None) -> dict:
    """Returns the recurrent form's output, final state and all gradients in float64, by name."""
    with jax.enable_x64(True):
        wide = {
            name: np.asarray(x).astype(np.complex128 if np.iscomplexobj(x) else np.float64)
            for name, x in inputs.items()
        }
        named = everything(case, "reference", wide, segment_ids, cotangents)
        return {name: np.asarray(x) for name, x in named.items()}


class Suite:
    """Conformance tests of an operator; subclass as `class TestX(Suite): case = CASE`."""

    case: SuiteCase

    @pytest.fixture(autouse=True)
    def _interpreted(self):
        """Fixture: runs Pallas and Triton kernels interpreted, since tests are on a CPU."""
        with devices.interpreted():
            yield

    def pytest_generate_tests(self, metafunc):
        case, names, test = metafunc.cls.case, metafunc.fixturenames, metafunc.function.__name__
        product = []
        for implementation in case.implementations:
            kernel = implementation in KERNELS
            if kernel and test == "test_what_is_not_finite_stays_apart":
                continue  # kernels multiply by a mask
            if "length_and_regime" in names:
                one_length = test != "test_float32_packed_documents"
                if kernel:
                    fast = () if one_length else case.fast_kernels
                else:
                    fast = case.fast[-1:] if test == "test_bfloat16" else case.fast
                pairs = [(T, regime) for T in LENGTHS for regime in case.regimes]
                cases = [(f"T{pair[0]}-{pair[1]}", pair, pair in fast) for pair in pairs]
                skipped = {
                    (T, regime)
                    for T, regime in pairs
                    if kernel
                    and (case.kernels_skip(T, regime) or one_length and T != KERNELS_LENGTH)
                }
            else:
                named = not kernel or test == "test_packed_equals_separate"
                cases = [(x, x, named and x == case.typical[0]) for x in case.typical]
                skipped = set(case.typical[1:]) if kernel else set()
            for name, value, fast in cases:
                marks = [] if fast else [pytest.mark.slow]
                marks += [pytest.mark.exhaustive] if value in skipped else []
                label = f"{implementation}-{name}"
                product.append(pytest.param(implementation, value, marks=marks, id=label))
        what = "length_and_regime" if "length_and_regime" in names else "typical"
        metafunc.parametrize(f"implementation, {what}", product)

    def test_float32(self, implementation, length_and_regime):
        T, regime = length_and_regime
        inputs = inputs_of(self.case, Shape(T=T), regime)
        got = everything(at(self.case, regime), implementation, inputs)
        assert_close(got, truth(at(self.case, regime), inputs), TOLERANCE["float32"])

    def test_float32_packed_documents(self, implementation, length_and_regime):
        T, regime = length_and_regime
        inputs, ids = inputs_of(self.case, Shape(T=T), regime), documents(2, T)
        got = everything(at(self.case, regime), implementation, inputs, ids)
        assert_close(got, truth(at(self.case, regime), inputs, ids), TOLERANCE["float32"])

    def test_bfloat16(self, implementation, length_and_regime):
        (T, regime), case = length_and_regime, at(self.case, length_and_regime[1])
        inputs = inputs_of(case, Shape(T=T), regime)
        inputs = {
            name: x.real.astype(jnp.bfloat16) if name in case.rounded else x
            for name, x in inputs.items()
        }
        shapes = jax.eval_shape(lambda x: case.call(x, implementation="reference"), inputs)
        cotangents = tuple(
            c.astype(shape.dtype).astype(c.dtype)
            for c, shape in zip(cotangents_of(*shapes), shapes)
        )
        got = everything(case, implementation, inputs, None, cotangents)
        assert_close(got, truth(case, inputs, None, cotangents), TOLERANCE["bfloat16"])

    def test_grouped_heads(self, implementation, typical):
        G = 2 if self.case.grouped else 4
        inputs = inputs_of(self.case, Shape(B=2, T=100, H=4, G=G), typical)
        ids = documents(2, 100)
        got = everything(at(self.case, typical), implementation, inputs, ids)
        assert_close(got, truth(at(self.case, typical), inputs, ids), TOLERANCE["float32"])

    def test_packed_equals_separate(self, implementation, typical):
        """Checks that four documents in a row give what a batch of four gives, gradients too."""
        T, N = 136, 4
        inputs = inputs_of(self.case, Shape(B=1, T=T), typical)
        ids = np.repeat(np.arange(N, dtype=np.int32), T // N)[None]
        cotangents = cotangents_of(
            *jax.eval_shape(
                lambda x: at(self.case, typical).call(x, implementation="reference"), inputs
            )
        )
        got = everything(at(self.case, typical), implementation, inputs, ids, cotangents)

        def separate(x):
            return x.reshape(N, T // N, *x.shape[2:])

        def last(x):
            return np.concatenate([np.zeros((N - 1, *x.shape[1:]), x.dtype), x])

        apart = over_time(inputs, separate)
        initial = inputs["initial_state"]
        apart["initial_state"] = np.concatenate(
            [initial, np.zeros((N - 1, *initial.shape[1:]), initial.dtype)]
        )
        apart_cotangents = separate(cotangents[0]), last(cotangents[1])
        one_by_one = everything(
            at(self.case, typical), implementation, apart, None, apart_cotangents
        )
        together = {}
        for name, x in one_by_one.items():
            if name == "final state":
                together[name] = x[-1:]
            elif name == "gradient of initial_state":
                together[name] = x[:1]
            else:
                together[name] = x.reshape(got[name].shape) if x.ndim > 1 and x.shape[0] == N else x
        assert_close(got, together, TOLERANCE["float32"])

    def test_documents_do_not_touch(self, implementation, typical):
        """Checks that a document's results keep every bit when other documents change."""
        T, start, stop = 100, 37, 80
        inputs = inputs_of(self.case, Shape(B=1, T=T), typical)
        inside = (np.arange(T) >= start) & (np.arange(T) < stop)
        ids = (1 + inside + 2 * (np.arange(T) >= stop)).astype(np.int32)[None]

        def changed(x):
            mask = inside.reshape(1, T, *[1] * (x.ndim - 2))
            return np.where(mask, x, 0.5 * np.roll(x, 3, axis=1))

        other = over_time(inputs, changed)
        other["initial_state"] = inputs["initial_state"] + 1
        first = everything(at(self.case, typical), implementation, inputs, ids)
        second = everything(at(self.case, typical), implementation, other, ids)
        for name, x in first.items():
            if name in ("final state", "gradient of initial_state") or x.ndim < 3:
                continue
            here = np.asarray(x)[:, start:stop]
            np.testing.assert_array_equal(
                here, np.asarray(second[name])[:, start:stop], err_msg=name
            )
            assert np.abs(here).max() > 0, name

    def first_reached(self, regime, t, start):
        """Returns the first token whose output may depend on token t of a document from `start`."""
        del regime, start
        return t

    def test_what_is_not_finite_stays_apart(self, implementation, typical):
        """Checks that NaN or inf in one document leaves every bit of the other documents.

        The initial state belongs to the first document; the last one is padding.
        """
        T, edges = 100, (0, 37, 80, 100)
        clean = inputs_of(self.case, Shape(B=1, T=T), typical)
        ids = np.repeat([2, 1, 0], np.diff(edges)).astype(np.int32)[None]
        shapes = jax.eval_shape(
            lambda x: at(self.case, typical).call(x, implementation="reference"), clean
        )
        cotangents = cotangents_of(*shapes)
        places = [("initial_state", 0, np.nan)]
        for name, x in clean.items():
            if name != "initial_state" and x.ndim >= 3:
                # -inf is a legal log decay
                places += [
                    (name, 50, np.nan),
                    (name, 90, np.nan if name == "log_decay" else np.inf),
                ]
        for call in (implementation, "reference"):
            expected = everything(at(self.case, typical), call, clean, ids, cotangents)
            for name, t, value in places:
                bad = {**clean, name: clean[name].copy()}
                bad[name][(0, ...) if name == "initial_state" else (0, t)] = value
                document = np.searchsorted(edges, t, side="right") - 1
                first = self.first_reached(typical, t, edges[document])
                inside = (np.arange(T) >= first) & (np.arange(T) < edges[document + 1])
                behind = np.where(inside.reshape(1, T, *[1] * (cotangents[0].ndim - 2)), np.nan, 1)
                got = everything(
                    at(self.case, typical),
                    call,
                    bad,
                    ids,
                    (cotangents[0] * behind.astype("f"), cotangents[1]),
                )
                others = (np.arange(T) < edges[document]) | (np.arange(T) >= edges[document + 1])
                for of, x in got.items():
                    if of in ("final state", "gradient of initial_state") or x.ndim < 3:
                        continue
                    np.testing.assert_array_equal(
                        np.asarray(x)[:, others], np.asarray(expected[of])[:, others], err_msg=of
                    )
                assert not np.isfinite(got["output"][0, t]).all(), (call, name)
                if document < 2:
                    np.testing.assert_array_equal(got["final state"], expected["final state"])

    def test_pieces_equal_whole(self, implementation, typical):
        """Checks that a sequence cut in two, with the state carried, gives the whole's results."""
        case, cut = at(self.case, typical), 37
        inputs = inputs_of(case, Shape(T=100), typical)

        def pieces(inputs, *, implementation, segment_ids):
            del segment_ids
            first = over_time(inputs, lambda x: x[:, :cut])
            second = over_time(inputs, lambda x: x[:, cut:])
            o_first, state = case.call(first, implementation=implementation)
            o_second, final = case.call(
                {**second, "initial_state": state}, implementation=implementation
            )
            return jnp.concatenate([o_first, o_second], axis=1), final

        got = everything(dataclasses.replace(case, call=pieces), implementation, inputs)
        whole = everything(case, implementation, inputs)
        assert_close(got, whole, TOLERANCE["float32"])

    def test_step_by_step_equals_whole(self, implementation, typical):
        inputs = inputs_of(self.case, Shape(T=100), typical)
        timed = {name: x for name, x in inputs.items() if name != "initial_state" and x.ndim >= 3}
        fixed = {name: x for name, x in inputs.items() if name not in (*timed, "initial_state")}

        @jax.jit
        def decode(timed, fixed, state):
            def body(state, token):
                output, state = at(self.case, typical).step({**token, **fixed}, state)
                return state, output

            time_first = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), timed)
            state, outputs = jax.lax.scan(body, state, time_first)
            return jnp.moveaxis(outputs, 0, 1), state

        output, final = decode(timed, fixed, inputs["initial_state"])
        whole = everything(at(self.case, typical), implementation, inputs)
        assert_close(
            {"output": output, "final state": final},
            {name: whole[name] for name in ("output", "final state")},
            TOLERANCE["float32"],
        )

    def test_transformations(self, implementation, typical):
        """Checks that results are the same under vmap, under remat, and without jit."""
        case = at(self.case, typical)
        inputs = inputs_of(case, Shape(T=100), typical)
        whole = everything(case, implementation, inputs)

        def run(call):
            return everything(dataclasses.replace(case, call=call), implementation, inputs)

        def rematerialised(inputs, **keywords):
            return jax.checkpoint(lambda x: case.call(x, **keywords))(inputs)

        def mapped(inputs, **keywords):
            def one_row(row, fixed):
                row = {name: x[None] for name, x in row.items()}
                output, final = case.call({**row, **fixed}, **keywords)
                return output[0], final[0]

            shared = case.operator.case.unbatched
            fixed = {name: x for name, x in inputs.items() if x.ndim < 2 or name in shared}
            rows = {name: x for name, x in inputs.items() if name not in fixed}
            return jax.vmap(one_row, in_axes=(0, None))(rows, fixed)

        # A rematerialised program is fused otherwise, so it is not equal to the bit.
        assert_close(run(rematerialised), whole, TOLERANCE["float32"])
        assert_close(run(mapped), whole, TOLERANCE["float32"])
        output, final = case.call(inputs, implementation=implementation)
        eager = {"output": output, "final state": final}
        assert_close(eager, {name: whole[name] for name in eager}, TOLERANCE["float32"])

    def test_causality_by_gradient(self, implementation, typical):
        """Checks that an output has no gradient at later tokens, and some at every earlier one."""
        T = 100
        inputs = inputs_of(self.case, Shape(B=1, T=T), typical)
        output, final = jax.eval_shape(
            lambda x: at(self.case, typical).call(x, implementation="reference"), inputs
        )
        for t in (0, 15, 16, 63, 64, 98):
            at_t = np.zeros(output.shape, np.float32)
            at_t[:, t] = 1.0
            cotangents = at_t, np.zeros(final.shape, np.float32)
            got = everything(at(self.case, typical), implementation, inputs, None, cotangents)
            reached = np.zeros(T, bool)
            for name, gradient in got.items():
                if not name.startswith("gradient") or name.endswith("initial_state"):
                    continue
                if gradient.ndim >= 3:
                    touched = np.abs(np.asarray(gradient)).reshape(T, -1).max(axis=1) > 0
                    assert not touched[t + 1 :].any(), f"{name}: output {t} sees the future"
                    reached |= touched
            assert reached[: t + 1].all(), f"output {t} does not see its whole past"
