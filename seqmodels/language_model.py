"""The language model: embedding, a stack of blocks by pattern, a norm, and logits."""

import dataclasses
import typing
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax import core

from kernels_pallas.common import remat
from kernels_pallas.ops.linear_cross_entropy.reference import all_logits, capped
from seqmodels import fields, mixers, operators, pipeline, sharding
from seqmodels.array_typing import Array, DType, State
from seqmodels.mixers import Mixer
from seqmodels.modules import blocks, channel_mixers, layers, norms, pattern, positions

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


@flax.struct.dataclass
class ModelState:
    """Fields of a language model's state, from which prefill and decoding go on.

    Attributes:
      prefix, scanned, suffix: states of the layers, grouped as in `pattern.ScanPlan`; those of
        scanned layers are stacked along a first axis.
      segment_id_B: id of the document that each row's last token belongs to.
      next_position_B: with learned positions, the next token's position in its document; else None.
    """

    prefix: tuple[State, ...]
    scanned: tuple[State, ...]
    suffix: tuple[State, ...]
    segment_id_B: Array
    next_position_B: Array | None = None

    def take_rows(self, rows_N: Array) -> "ModelState":
        """Returns the state of the sequences with the batch indices rows_N, in this order.

        It serves to reorder the beams of a search, to continue a sequence several times, or to drop
        finished ones. (x[rows_N] of each leaf would index layers where these are stacked.)
        """
        taken = blocks.take_rows(dataclasses.replace(self, scanned=()), rows_N)
        scanned = blocks.take_rows(self.scanned, rows_N, axis=1)
        return dataclasses.replace(taken, scanned=scanned)


class LanguageModel(nn.Module):
    """A language model: logits_BTW, state = model(tokens_BT, segment_ids_BT=None, state=None).

    For training pass no state; then the returned state is None. To prefill or decode pass
    `init_state(batch)` and then the state that the call before returned; a sequence that is fed in
    pieces has the same logits as in one call. A row whose first token has another segment id than
    the state's last token starts from an empty state.

    Args:
      head: a function (x_BTD, matrix, layout) whose result is returned in place of the logits, for
        losses that never hold all logits (`kernels_pallas.linear_cross_entropy`). x_BTD are the
        last hidden states; layout says whether the output matrix is "WD" or "DW".

    Attributes:
      mixers: one MixerSpec per layer; `from_config` makes them of a pattern such as
        "3*gated_delta_net + attention(window=256)".
      channel_mixer, d_ff, channel_bias, norm, norm_eps, norm_position, mixer_residual,
        channel_residual: fields of each layer's `blocks.Block`; options that a layer has in the
        pattern (`blocks.LAYER_OPTIONS`) override them.
      tied_embeddings: whether the output matrix is the embedding.
      embedding_scale: factor of the embedded tokens.
      learned_positions: number of positions in a document that have a learned vector, which is
        added to the token's (GPT-2); None leaves them out.
      logit_softcap: c of c tanh(logits / c) (Gemma 2, arXiv 2408.00118, section 2); None is no cap.
      remat: what the backward pass recomputes: "none", "full" (every block from its input),
        "operators" (all but operators' results and the states between their chunks), "dots" (all
        but projections). States that other shards of time sent are always saved.
      scan_layers: whether a repeated group of blocks is compiled once and scanned over.
      dtype: dtype of activations and matmuls. Logits are float32.
      param_dtype: dtype of the parameters, except those that are always float32.
      float32_residual: whether the residual stream, to which blocks add, is float32 whatever dtype
        is (Mamba).
    """

    vocab_size: int
    d_model: int
    mixers: tuple[pattern.MixerSpec, ...]
    channel_mixer: str | None = "swiglu"
    d_ff: int | None = None
    channel_bias: bool = False
    norm: str = "rms_norm"
    norm_eps: float = 1e-5
    norm_position: str = "pre"
    mixer_residual: tuple[float, float] = (1.0, 1.0)
    channel_residual: tuple[float, float] = (1.0, 1.0)
    tied_embeddings: bool = True
    embedding_scale: float = 1.0
    learned_positions: int | None = None
    logit_softcap: float | None = None
    remat: str = "none"
    scan_layers: bool = True
    dtype: DType = jnp.float32
    param_dtype: DType = jnp.float32
    float32_residual: bool = False

    block = blocks.Block  # the class of every layer

    @property
    def plan(self) -> pattern.ScanPlan:
        """Returns the ScanPlan that says which layers are scanned over and which stand alone."""
        if self.scan_layers:
            return pattern.scan_plan(self.mixers)
        return pattern.ScanPlan(self.mixers, (), 0, ())

    @nn.compact
    def __call__(
        self,
        tokens_BT: Array,
        segment_ids_BT: Array | None = None,
        state: ModelState | None = None,
        *,
        head: Callable[[Array, Array, str], Any] | None = None,
    ) -> tuple[Any, ModelState | None]:
        embed = nn.Embed(
            self.vocab_size,
            self.d_model,
            embedding_init=layers.partitioned(
                nn.initializers.normal(self.d_model**-0.5), ("vocab", "embed")
            ),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="embed",
        )
        # Tokens, and learned positions, as vectors.
        x_BTD = operators.embedding(embed.embedding.astype(self.dtype), tokens_BT)
        x_BTD = x_BTD * self.embedding_scale
        next_position_B = None
        if self.learned_positions is not None:
            position_BT = self._positions(tokens_BT, self.learned_positions, segment_ids_BT, state)
            x_BTD = x_BTD + self._position_embedding(position_BT, self.learned_positions)
            next_position_B = position_BT[:, -1] + 1
        if self.float32_residual:
            x_BTD = x_BTD.astype(jnp.float32)
        # The stack, its norm, and the logits or what `head` makes of them.
        x_BTD, state = self._stack(sharding.constrain(x_BTD), segment_ids_BT, state)
        if state is not None:
            state = dataclasses.replace(state, next_position_B=next_position_B)
        x_BTD = blocks.make_norm(self.norm, self.norm_eps, "final_norm")(x_BTD).astype(self.dtype)
        if self.tied_embeddings:
            matrix, layout = embed.embedding, "WD"
        else:
            output = layers.Matrix(
                self.vocab_size, ("embed", "vocab"), self.param_dtype, name="output"
            )
            matrix, layout = output(self.d_model), "DW"
        return (head or self.logits)(x_BTD, matrix.astype(self.dtype), layout), state

    @nn.nowrap
    def logits(self, x_BTD: Array, matrix: Array, layout: str) -> Array:
        """Returns the float32 logits (B, T, W) of hidden states, by the output matrix."""
        return capped(all_logits(x_BTD, matrix, None, layout), self.logit_softcap)

    @nn.nowrap
    def check_length(self, length: int) -> None:
        """Raises ValueError if rows of `length` tokens are longer than the learned positions."""
        if self.learned_positions is not None and length > self.learned_positions:
            raise ValueError(
                f"rows of {length} tokens, and the model has learned {self.learned_positions} "
                "positions: shorten the rows (config.data.seq_len)"
            )

    def _positions(self, tokens_BT, limit, segment_ids_BT, state):
        B, T = tokens_BT.shape
        self.check_length(T)
        offset_B = None
        if state is not None:
            offset_B = state.next_position_B
            if segment_ids_BT is not None:
                offset_B = jnp.where(segment_ids_BT[:, 0] == state.segment_id_B, offset_B, 0)
        position_BT = positions.token_positions(B, T, segment_ids_BT, offset_B)
        if state is not None and not isinstance(position_BT, core.Tracer):
            tokens = int(position_BT.max()) + 1
            if tokens > limit:
                raise ValueError(
                    f"with what the state has read a document comes to {tokens} tokens, and the "
                    f"model has learned {limit} positions"
                )
        return position_BT

    def _position_embedding(self, position_BT, limit):
        init = layers.partitioned(nn.initializers.normal(0.02), ("vocab", "embed"))
        shape = (limit, self.d_model)
        table_PD = self.param("position_embedding", init, shape, self.param_dtype)
        return operators.embedding(table_PD.astype(self.dtype), position_BT)

    def _stack(self, x_BTD, segment_ids_BT, state):
        plan = self.plan
        # Rows whose first token starts another document than the state's.
        fresh_B = None
        if state is not None and segment_ids_BT is not None:
            fresh_B = segment_ids_BT[:, 0] != state.segment_id_B
        lower_bound_LD = self._lower_bounds()
        run = _BlockRun(segment_ids_BT, fresh_B, len(self.mixers), lower_bound_LD)

        def single(x_BTD, specs, states, first_index):
            made = [
                self._block_class()(spec, **blocks.options_of(self), name=f"block_{index}")
                for index, spec in enumerate(specs, start=first_index)
            ]
            return run.in_turn(made, x_BTD, states, first_index)

        first_scanned = len(plan.prefix)
        first_suffix = first_scanned + plan.repeats * len(plan.period)
        x_BTD, prefix = single(x_BTD, plan.prefix, state and state.prefix, 0)
        x_BTD, scanned = self._scan(x_BTD, plan, run, state and state.scanned, first_scanned)
        x_BTD, suffix = single(x_BTD, plan.suffix, state and state.suffix, first_suffix)
        if state is None:
            return x_BTD, None
        segment_id_B = state.segment_id_B if segment_ids_BT is None else segment_ids_BT[:, -1]
        return x_BTD, ModelState(prefix, scanned, suffix, segment_id_B)

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
            variable_axes={"params": 0, "intermediates": 0},
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
        def call(apply, index, x_BTD, segment_ids_BT, lower_bound_LD):
            part = dataclasses.replace(
                run, segment_ids_BT=segment_ids_BT, lower_bound_LD=lower_bound_LD
            )
            return apply(x_BTD, part, None, index)[0]

        layer = pipeline.Layer(group.clone(parent=None), call)
        params_N = self.variables["params"][group.name]
        return pipeline.run(layer, params_N, index_N, x_BTD, run.segment_ids_BT, run.lower_bound_LD)

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
        widths = {self._mixer(spec).lower_bound_width() for spec in self.mixers} - {0}
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
    def _mixer(self, spec: pattern.MixerSpec) -> Mixer:
        return blocks.Block(spec, **blocks.options_of(self), parent=None).make_mixer(parent=None)

    @nn.nowrap
    def init_state(self, batch: int) -> ModelState:
        """Returns the state before the first token of each sequence; works on an unbound module."""
        plan = self.plan

        def states(specs):
            return tuple(self._mixer(spec).init_state(batch) for spec in specs)

        def stack(leaf):
            return jnp.broadcast_to(leaf[None], (plan.repeats, *leaf.shape))

        scanned = jax.tree.map(stack, states(plan.period))
        unknown_B = jnp.full((batch,), -1, jnp.int32)
        start_B = None if self.learned_positions is None else jnp.zeros((batch,), jnp.int32)
        return ModelState(states(plan.prefix), scanned, states(plan.suffix), unknown_B, start_B)


@dataclasses.dataclass(frozen=True, eq=False)
class _BlockRun:
    """Callable that runs a block on x_BTD and its state, with arguments that all layers share."""

    segment_ids_BT: Array | None
    fresh_B: Array | None
    count: int
    lower_bound_LD: Array | None

    def __call__(self, block, x_BTD, state, index):
        bound_D = None if self.lower_bound_LD is None else self.lower_bound_LD[index]
        layer = mixers.Layer(index, self.count, bound_D)
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


_DTYPE_FIELDS = ("dtype", "param_dtype")
DTYPES = ("float32", "bfloat16", "float16", "float64")
CHOICES = {
    **dict.fromkeys(_DTYPE_FIELDS, DTYPES),
    "remat": REMAT_POLICIES,
    "norm": norms.NORMS,
    "norm_position": blocks.NORM_POSITIONS,
}
_POSITIVE = ("vocab_size", "d_model", "d_ff", "learned_positions", "norm_eps", "logit_softcap")


def config_fields() -> dict[str, tuple[Any, Any]]:
    """Returns {field: (type, default)} of a config's section `model`.

    Its fields are LanguageModel's, with `pattern` and `num_layers` in place of `mixers`, and dtypes
    by name. A field whose default is None and whose type is not optional must be given.
    """
    kinds = typing.get_type_hints(LanguageModel)
    found = {"pattern": (str, None), "num_layers": (int, None)}
    for field in dataclasses.fields(LanguageModel):
        if field.name in ("mixers", "parent", "name"):
            continue
        default = None if field.default is dataclasses.MISSING else field.default
        found[field.name] = (kinds[field.name], default)
        if default is not None and kinds[field.name] is DType:
            found[field.name] = (str, jnp.dtype(default).name)
    return found


def from_config(config) -> LanguageModel:
    """Makes the LanguageModel that `config`, a config's section `model`, describes.

    Missing fields have the defaults of `config_fields`.

    Raises:
      ValueError: an unknown field, mixer or option, a value of a wrong type or range or that is not
        among the choices, or a missing required field; the message says what is expected.
    """
    known = config_fields()
    if unknown := sorted(set(config) - set(known)):
        raise ValueError(f"config.model has no field {unknown[0]!r}; it has {', '.join(known)}")
    values = {name: default for name, (_, default) in known.items()} | dict(config)
    # Types, choices and ranges of the model's own fields.
    for name in _DTYPE_FIELDS:
        if not isinstance(values[name], str | None):
            values[name] = jnp.dtype(values[name]).name
    for name, (kind, _) in known.items():
        values[name] = fields.checked(f"config.model.{name}", values[name], kind)
    for name, choices in CHOICES.items():
        if values[name] not in choices:
            raise ValueError(
                f"config.model.{name} is {values[name]!r}; choose one of {', '.join(choices)}"
            )
    for name in _POSITIVE:
        if (value := values[name]) is not None and value <= 0:
            least = "at least 1" if isinstance(value, int) else "more than 0"
            raise ValueError(f"config.model.{name} is {value}; it must be {least}")
    # No mixer sees later tokens; its options have the types of its fields, or of the model's.
    specs = pattern.layers(values.pop("pattern"), values.pop("num_layers"))
    for spec in specs:
        if not mixers.mixer_class(spec.name).causal:
            raise ValueError(
                f"config.model.pattern: {spec.name} sees whole documents, and a language model must "
                f"not see later tokens; causal mixers are {', '.join(mixers.causal_names())}"
            )
    for spec in specs:
        kinds = typing.get_type_hints(mixers.mixer_class(spec.name))
        kinds |= {name: known[name][0] for name in blocks.LAYER_OPTIONS}
        for name, value in spec.options:
            what = f"config.model.pattern: {name} of {spec.name}"
            fields.checked(what, value, kinds.get(name, Any))
    for name in _DTYPE_FIELDS:
        if values[name] == "float64" and jnp.result_type(float) != jnp.float64:
            raise ValueError(f"config.model.{name} is 'float64', which needs JAX_ENABLE_X64=1")
        values[name] = jnp.dtype(values[name])
    model = LanguageModel(mixers=specs, **values)
    channels = {dict(s.options).get("channel_mixer", model.channel_mixer) for s in specs}
    for text in channels - {None}:
        try:
            channel_mixers.make(text, parent=None)
        except ValueError as error:
            raise ValueError(f"config.model: {error}") from error
    jax.eval_shape(lambda: model.init_state(1))  # every mixer checks its own options here
    return model
