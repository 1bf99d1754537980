"""The stack of blocks by a pattern, which language models, encoders and denoisers share."""

import dataclasses
import typing
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels_pallas.common import remat
from seqmodels import mixers, pipeline, sharding
from seqmodels.array_typing import Array, DType, State
from seqmodels.mixers import Mixer
from seqmodels.modules import blocks, layers, norms, pattern

_ENTERING_STATES = jax.checkpoint_policies.save_only_these_names(remat.ENTERING_STATES)
REMAT_POLICIES = {
    "none": None,
    "full": _ENTERING_STATES,
    "operators": jax.checkpoint_policies.save_only_these_names(
        remat.OPERATOR_RESIDUALS, remat.ENTERING_STATES
    ),
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _ENTERING_STATES
    ),
}
DTYPES = ("float32", "bfloat16", "float16", "float64")
LOSSES = "losses"  # the Flax collection of auxiliary losses, scalars that modules sow

# States of a stack's layers, grouped as in `pattern.ScanPlan`; those of scanned layers are stacked.
States = tuple[tuple[State, ...], tuple[State, ...], tuple[State, ...]]


class Stack(nn.Module):
    """Base class of models: fields that all of them have, and the stack of blocks.

    Attributes:
      d_model: width D of the hidden states.
      mixers: one MixerSpec per layer; `from_config` makes them of a pattern such as
        "3*gated_delta_net + attention(window=256)".
      channel_mixer, d_ff, channel_bias, norm, norm_eps, norm_position, mixer_residual,
        channel_residual: fields of each layer's `blocks.Block`; options that a layer has in the
        pattern (`blocks.LAYER_OPTIONS`) override them.
      remat: what the backward pass recomputes: "none", "full" (every block from its input),
        "operators" (all but operators' results and the states between their chunks), "dots" (all
        but projections). States that other shards of time sent are always saved.
      scan_layers: whether a repeated group of blocks is compiled once and scanned over.
      dtype: dtype of activations and matmuls. Logits are float32.
      param_dtype: dtype of the parameters, except those that are always float32.
      float32_residual: whether the residual stream, to which blocks add, is float32 whatever dtype
        is (Mamba).
    """

    if typing.TYPE_CHECKING:  # each model declares these, which come first in its constructor
        d_model: int
        mixers: tuple[pattern.MixerSpec, ...]

    _: dataclasses.KW_ONLY
    channel_mixer: str | None = "swiglu"
    d_ff: int | None = None
    channel_bias: bool = False
    norm: str = "rms_norm"
    norm_eps: float = 1e-5
    norm_position: str = "pre"
    mixer_residual: tuple[float, float] = (1.0, 1.0)
    channel_residual: tuple[float, float] = (1.0, 1.0)
    remat: str = "none"
    scan_layers: bool = True
    dtype: DType = jnp.float32
    param_dtype: DType = jnp.float32
    float32_residual: bool = False

    block = blocks.Block  # the class of every layer
    # Values of the fields that have a few names, and the fields that must be positive, for configs.
    choices = {
        "dtype": DTYPES,
        "param_dtype": DTYPES,
        "remat": REMAT_POLICIES,
        "norm": norms.NORMS,
        "norm_position": blocks.NORM_POSITIONS,
    }
    positive = ("d_model", "d_ff", "norm_eps")

    @property
    def plan(self) -> pattern.ScanPlan:
        """Returns the ScanPlan that says which layers are scanned over and which stand alone."""
        if self.scan_layers:
            return pattern.scan_plan(self.mixers)
        return pattern.ScanPlan(self.mixers, (), 0, ())

    @nn.nowrap
    def make_mixer(self, spec: pattern.MixerSpec) -> Mixer:
        """Returns the mixer of a layer, outside of the model."""
        return self._unbound(spec).make_mixer(parent=None)

    @nn.nowrap
    def check_layers(self) -> None:
        """Makes each kind of layer's modules, which check their own options, and discards them.

        Raises ValueError for an unknown norm, channel mixer or option of one.
        """
        norms.make(self.norm, self.norm_eps, parent=None)
        for spec in dict.fromkeys(self.mixers):
            block = self._unbound(spec)
            block.make_mixer(parent=None)
            block.make_channel_mixer(parent=None)

    @nn.nowrap
    def _unbound(self, spec: pattern.MixerSpec) -> blocks.Block:
        return blocks.Block(spec, **blocks.options_of(self), parent=None)

    def run_layers(
        self,
        x_BTD: Array,
        segment_ids_BT: Array | None = None,
        states: States | None = None,
        fresh_B: Array | None = None,
        coordinates_BTA: Array | None = None,
        condition_BTD: Array | None = None,
    ) -> tuple[Array, States | None]:
        """Returns the hidden states after all layers, and the layers' states, None if none came.

        A model calls it once, in its `__call__`.

        fresh_B: rows whose first token belongs to another document than their state.
        coordinates_BTA, condition_BTD: fields of each layer's `mixers.Layer`.
        """
        plan, lower_bound_LD = self.plan, self._lower_bounds()
        run = _BlockRun(
            len(self.mixers), segment_ids_BT, fresh_B, lower_bound_LD, coordinates_BTA,
            condition_BTD,
        )  # fmt: skip

        def single(x_BTD, specs, states, first_index):
            made = [
                self._block_class()(spec, **blocks.options_of(self), name=f"block_{index}")
                for index, spec in enumerate(specs, start=first_index)
            ]
            return run.in_turn(made, x_BTD, states, first_index)

        first_scanned = len(plan.prefix)
        first_suffix = first_scanned + plan.repeats * len(plan.period)
        x_BTD, prefix = single(x_BTD, plan.prefix, states and states[0], 0)
        x_BTD, scanned = self._scan(x_BTD, plan, run, states and states[1], first_scanned)
        x_BTD, suffix = single(x_BTD, plan.suffix, states and states[2], first_suffix)
        return x_BTD, None if states is None else (prefix, scanned, suffix)

    def _scan(self, x_BTD, plan, run, states, first_index):
        if plan.repeats == 0:
            if sharding.stages() > 1:
                raise ValueError(
                    f"mesh axis {sharding.STAGE_AXIS!r} splits the repeats of a pattern, and this "
                    "model scans over none: set scan_layers=True and more layers than the pattern "
                    "has, or the axis to 1"
                )
            return x_BTD, ()
        group = _Group(
            plan.period, self._block_class(in_scan=True), blocks.options_of(self), name="blocks"
        )

        def one_repeat(group, x_BTD, inputs):
            index, states = inputs
            x_BTD, states = group(x_BTD, run, states, index)
            return x_BTD, states

        scan = nn.scan(
            one_repeat,
            variable_axes={"params": 0, "intermediates": 0, norms.STATISTICS: 0, LOSSES: 0},
            split_rngs={"params": True},
            length=plan.repeats,
            metadata_params={nn.PARTITION_NAME: "layers"},
            check_constancy_invariants=False,  # which traces the layers a second time
        )
        index_N = first_index + len(plan.period) * jnp.arange(plan.repeats, dtype=jnp.int32)
        if sharding.stages() > 1 and states is None and not self.is_initializing():
            return self._pipeline(group, index_N, x_BTD, run), (None,) * len(plan.period)
        return scan(group, x_BTD, (index_N, states))

    def _pipeline(self, group, index_N, x_BTD, run):
        for name in (norms.STATISTICS, LOSSES):
            if name in self.variables or self.is_mutable_collection(name):
                raise ValueError(
                    f"this model has the collection {name!r} beside its parameters, which a "
                    f"pipeline does not carry: set the mesh axis {sharding.STAGE_AXIS!r} to 1"
                )
        if run.condition_BTD is not None:
            raise ValueError(
                "layers with a condition (adaLN) do not run in a pipeline: set the mesh axis "
                f"{sharding.STAGE_AXIS!r} to 1"
            )

        def call(apply, index, x_BTD, rows, lower_bound_LD):
            segment_ids_BT, coordinates_BTA = rows
            part = dataclasses.replace(
                run,
                segment_ids_BT=segment_ids_BT,
                coordinates_BTA=coordinates_BTA,
                lower_bound_LD=lower_bound_LD,
            )
            return apply(x_BTD, part, None, index)[0]

        layer = pipeline.Layer(group.clone(parent=None), call)
        params_N = self.variables["params"][group.name]
        rows = run.segment_ids_BT, run.coordinates_BTA
        return pipeline.run(layer, params_N, index_N, x_BTD, rows, run.lower_bound_LD)

    def _block_class(self, in_scan: bool = False):
        if self.remat == "none":
            return self.block
        # Under scan XLA cannot merge the recomputation with the forward pass: no barrier is needed.
        return nn.remat(self.block, policy=REMAT_POLICIES[self.remat], prevent_cse=not in_scan)

    def _lower_bounds(self) -> Array | None:
        """Returns a learned lower bound of the forget gates of each of L layers, (L, D), or None.

        It is cumsum(softmax(p_LD, over layers)) minus its first row (HGRN, arXiv 2311.04823,
        section 3.3), None where no mixer uses it. p starts at 0: then layer l, from 0, has l/L.
        """
        L = len(self.mixers)
        specs = dict.fromkeys(self.mixers)
        widths = {self.make_mixer(spec).lower_bound_width() for spec in specs} - {0}
        if not widths:
            return None
        if len(widths) > 1:
            raise ValueError(
                f"layers with a lower bound must share its width; got {sorted(widths)}"
            )
        init = layers.undecayed(nn.initializers.zeros, (None, "heads"))
        p_LD = self.param("lower_bounds", init, (L, widths.pop()), jnp.float32)
        bound_LD = jnp.cumsum(jax.nn.softmax(p_LD, axis=0), axis=0)
        return bound_LD - bound_LD[:1]

    @nn.nowrap
    def init_states(self, batch: int) -> States:
        """Returns the layers' states before the first token; works on an unbound module."""
        plan = self.plan

        def states(specs):
            return tuple(self.make_mixer(spec).init_state(batch) for spec in specs)

        def stack(leaf):
            return jnp.broadcast_to(leaf[None], (plan.repeats, *leaf.shape))

        scanned = jax.tree.map(stack, states(plan.period))
        return states(plan.prefix), scanned, states(plan.suffix)


@dataclasses.dataclass(frozen=True, eq=False)
class _BlockRun:
    """Callable that runs a block on x_BTD and its state, with arguments that all layers share."""

    count: int
    segment_ids_BT: Array | None
    fresh_B: Array | None
    lower_bound_LD: Array | None
    coordinates_BTA: Array | None
    condition_BTD: Array | None

    def __call__(self, block, x_BTD, state, index):
        bound_D = None if self.lower_bound_LD is None else self.lower_bound_LD[index]
        layer = mixers.Layer(index, self.count, bound_D, self.coordinates_BTA, self.condition_BTD)
        new_x_BTD, new_state = block(x_BTD, self.segment_ids_BT, state, self.fresh_B, layer)
        return new_x_BTD, (None if state is None else new_state)

    def in_turn(self, made, x_BTD, states, first_index):
        """Calls one block after the other; returns what the last makes, and all states."""
        new_states = []
        for i, block in enumerate(made):
            x_BTD, state = self(block, x_BTD, states and states[i], first_index + i)
            new_states.append(state)
        return x_BTD, tuple(new_states)


class _Group(nn.Module):
    """The blocks of one period of a `pattern.ScanPlan`, over whose repetitions a model scans."""

    specs: tuple[pattern.MixerSpec, ...]
    block_class: Any
    block_options: dict[str, Any]

    @nn.compact
    def __call__(self, x_BTD, run, states, first_index):
        made = [
            self.block_class(spec, **self.block_options, name=f"block_{i}")
            for i, spec in enumerate(self.specs)
        ]
        return run.in_turn(made, x_BTD, states, first_index)
