"""One layer of a stack: token mixer and channel mixer, each with its norm and its residual connection."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from seqmodels import channel_mixers, mixers, norms, sharding
from seqmodels.array_typing import Array, DType, State
from seqmodels.pattern import MixerSpec

NORM_POSITIONS = ("pre", "post", "sandwich")


class Block(nn.Module):
    """x <- x + mixer(norm(x)); x <- x + channel_mixer(norm(x)).

    norm_position: "pre" as above; "post" norms the sum, x <- norm(x + f(x)); "sandwich" norms before f and after
      it, x <- x + norm(f(norm(x))).
    channel_mixer: a kind of `ChannelMixer`, or None for stacks of mixers alone (Mamba).
    """

    spec: MixerSpec
    d_model: int
    channel_mixer: str | None = "swiglu"
    d_ff: int | None = None
    norm: str = "rms_norm"
    norm_eps: float = 1e-5
    norm_position: str = "pre"
    dtype: DType = jnp.float32
    param_dtype: DType = jnp.float32

    @nn.nowrap
    def make_mixer(self, **keywords) -> mixers.Mixer:
        """The token mixer; its own options win over the stack's."""
        shared = {"d_model": self.d_model, "dtype": self.dtype, "param_dtype": self.param_dtype}
        return mixers.make(self.spec.name, **(shared | dict(self.spec.options)), **keywords)

    @nn.compact
    def __call__(
        self,
        x_BTD: Array,
        segment_ids_BT: Array | None,
        state: State,
        fresh_B: Array | None,
        layer: mixers.Layer,
    ) -> tuple[Array, State]:
        mixer = self.make_mixer(name="mixer")
        if fresh_B is not None:
            state = clear_rows(state, mixer.init_state(x_BTD.shape[0]), fresh_B)

        def mix(h_BTD):
            return mixer(h_BTD, segment_ids_BT, state, layer=layer)

        x_BTD, state = self._residual("mixer_norm", mix, x_BTD)
        if self.channel_mixer is not None:
            channels = channel_mixers.ChannelMixer(
                self.channel_mixer,
                self.d_ff,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                name="channel_mixer",
            )
            x_BTD, _ = self._residual("channel_norm", lambda h_BTD: (channels(h_BTD), None), x_BTD)
        return x_BTD, state

    def _residual(self, name: str, f, x_BTD: Array) -> tuple[Array, State]:
        def norm(suffix, h_BTD):
            return make_norm(self.norm, self.norm_eps, name + suffix)(h_BTD)

        before = self.norm_position in ("pre", "sandwich")
        y_BTD, state = f(norm("", x_BTD).astype(self.dtype) if before else x_BTD.astype(self.dtype))
        if self.norm_position == "sandwich":
            y_BTD = norm("_after", y_BTD)
        x_BTD = sharding.constrain(x_BTD + y_BTD)
        return (norm("", x_BTD) if self.norm_position == "post" else x_BTD), state


def make_norm(name: str, eps: float, module_name: str) -> nn.Module:
    """The normalisation called `name`; an unknown one lists the choices."""
    if name not in norms.NORMS:
        raise ValueError(f"unknown norm {name!r}; choose one of {', '.join(sorted(norms.NORMS))}")
    return norms.NORMS[name](eps=eps, name=module_name)


def clear_rows(state: State, empty: State, rows_B: Array) -> State:
    """Puts `empty` in the given rows of a state. Leaves without a batch axis stay."""

    def clear(leaf, empty_leaf):
        if leaf.ndim == 0:
            return leaf
        return jnp.where(rows_B.reshape((-1,) + (1,) * (leaf.ndim - 1)), empty_leaf, leaf)

    return jax.tree.map(clear, state, empty)
