"""Channel mixers by name, and the mixture of experts against a loop over tokens."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from seqmodels import language_model, sharding
from seqmodels.modules import channel_mixers

B, T, D, F, X, A = 2, 8, 12, 10, 5, 2


def experts(**options):
    settings = {"num_experts": X, "experts_per_token": A, "d_ff": F, "shared_d_ff": 8} | options
    text = ", ".join(f"{k}={v}" for k, v in settings.items())
    return channel_mixers.make(f"moe({text})")


def by_loop(params, x_D, normalize, xp):
    """Computes one token by the definition."""

    def swiglu(gate_DF, up_DF, down_FD):
        g_F = x_D @ gate_DF
        return (g_F / (1 + xp.exp(-g_F)) * (x_D @ up_DF)) @ down_FD

    logits_X = x_D @ params["router"]["kernel"]
    p_X = xp.exp(logits_X) / xp.exp(logits_X).sum()
    chosen = xp.argsort(-p_X)[:A]
    w = p_X[chosen] / (p_X[chosen].sum() if normalize else 1)
    kernels = [params[f"{n}_kernel"] for n in ("gate", "up", "down")]
    y_D = sum(w[i] * swiglu(*(k[chosen[i]] for k in kernels)) for i in range(A))
    shared = [params["shared"][n]["kernel"] for n in ("gate", "up", "down")]
    gate = 1 / (1 + xp.exp(-(x_D @ params["shared_gate"]["kernel"])))
    return y_D + gate * swiglu(*shared)


@pytest.mark.parametrize("normalize", [pytest.param(True, marks=pytest.mark.slow), False])
def test_experts_and_gradients(normalize):
    module = experts(normalize=normalize)
    x_BTD = jax.random.normal(jax.random.key(0), (B, T, D))
    params = jax.jit(module.init)(jax.random.key(1), x_BTD)["params"]
    params = nn.meta.unbox(params)

    def theirs(params, x_BTD):
        one = lambda x_D: by_loop(params, x_D, normalize, jnp)  # noqa: E731
        return jax.vmap(jax.vmap(one))(x_BTD)

    def loss(f, params, x_BTD):
        y_BTD = f(params, x_BTD)
        return jnp.sum(jnp.sin(y_BTD) * jnp.arange(D)[None, None]), y_BTD

    def ours(params, x_BTD):
        return module.apply({"params": params}, x_BTD)

    mesh = sharding.make_mesh({"data": 2, "seq": 4})

    def on_devices(params, x_BTD):
        with sharding.scope(mesh, sharding.Options()):
            return ours(params, x_BTD)

    def gradients(f, **shardings):
        gradient = jax.grad(functools.partial(loss, f), argnums=(0, 1), has_aux=True)
        return jax.jit(gradient, **shardings)(params, x_BTD)

    everywhere = NamedSharding(mesh, PartitionSpec())
    expected = gradients(theirs)
    for actual in (
        gradients(ours),
        gradients(on_devices, in_shardings=everywhere, out_shardings=everywhere),
    ):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4), actual, expected
        )


def test_layers_may_differ():
    model = language_model.from_config(
        {
            "vocab_size": 11,
            "d_model": D,
            "num_layers": 4,
            "pattern": "gla(num_heads=2)"
            " + gla(num_heads=2, channel_mixer='moe(num_experts=3, experts_per_token=1)')"
            " + gla(num_heads=2, channel_mixer=None)"
            " + gla(num_heads=2, channel_mixer='gelu', d_ff=6)",
            "d_ff": F,
        }
    )
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 3), jnp.int32))["params"]
    kinds = [shapes[f"block_{i}"].get("channel_mixer", {}).keys() for i in range(4)]
    assert kinds[0] == {"gate", "up", "down"}
    assert kinds[1] == {"router", "gate_kernel", "up_kernel", "down_kernel"}
    assert shapes["block_1"]["channel_mixer"]["up_kernel"].value.shape == (3, D, F)
    assert not kinds[2]
    assert shapes["block_3"]["channel_mixer"]["up"]["kernel"].value.shape == (D, 6)


@pytest.mark.parametrize(
    "text, message",
    [
        ("mixture", "channel_mixer is 'mixture'; choose one of .*moe.*swiglu"),
        ("moe(experts=3)", "'moe' has no option 'experts'; it has d_ff, .*num_experts"),
        ("moe(", "cannot be read"),
    ],
)
def test_bad_input(text, message):
    config = {
        "vocab_size": 11,
        "d_model": D,
        "num_layers": 1,
        "pattern": "gla",
        "channel_mixer": text,
    }
    with pytest.raises(ValueError, match=message):
        language_model.from_config(config)


def test_more_experts_a_token_than_there_are():
    with pytest.raises(ValueError, match="experts_per_token 6 must be between 1 and num_experts 5"):
        jax.eval_shape(experts(experts_per_token=6).init, jax.random.key(0), jnp.zeros((1, 2, D)))


@pytest.mark.parametrize("kind", ["conv_gelu", "conv_swiglu"])
def test_convolutions_see_a_tokens_neighbours_in_its_own_document(kind):
    module = channel_mixers.make(f"{kind}(kernel_size=3)", d_ff=F, use_bias=True, grid=(2, 3))
    x_BTD = np.random.default_rng(0).standard_normal((1, 12, D))
    segment_ids_BT = np.repeat([[1, 2]], 6, axis=1)
    params = nn.unbox(module.init(jax.random.key(0), jnp.zeros((1, 6, D))))["params"]
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda p: p + 0.3 * rng.standard_normal(p.shape), params)
    actual = jax.jit(module.apply)({"params": params}, jnp.float32(x_BTD), segment_ids_BT)

    def dense(name, x):
        return x @ np.float64(params[name]["kernel"]) + np.float64(params[name]["bias"])

    def silu(x):
        return x / (1 + np.exp(-x))

    def convolved(x):
        image = np.pad(x.reshape(2, 3, -1), [(1, 1), (1, 1), (0, 0)])
        taps = np.float64(params["conv"]["kernel"])
        y = sum(taps[3 * i + j] * image[i : i + 2, j : j + 3] for i in range(3) for j in range(3))
        return y.reshape(6, -1) + np.float64(params["conv"]["bias"])

    for tokens in (slice(0, 6), slice(6, 12)):
        up = dense("up", x_BTD[0, tokens])
        if kind == "conv_gelu":
            tanh = np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3))
            hidden = 0.5 * up * (1 + tanh)
            hidden = hidden + convolved(hidden)
        else:
            hidden, gate = np.split(convolved(silu(up)), 2, axis=-1)
            hidden = hidden * silu(gate)
        np.testing.assert_allclose(actual[0, tokens], dense("down", hidden), rtol=1e-4, atol=1e-4)


def test_language_models_refuse_convolutions():
    config = {"vocab_size": 11, "d_model": D, "num_layers": 1, "pattern": "hgrn"}
    with pytest.raises(ValueError, match="channel mixer conv_gelu sees a token's neighbours"):
        language_model.from_config(config | {"channel_mixer": "conv_gelu"})
