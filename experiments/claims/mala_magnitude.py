"""MALA: attention sharpens as the query grows, as softmax attention does; linear does not."""

import numpy as np

from experiments.claims import claim, pictures, small_digits

MALA = f"mala(num_heads={small_digits.HEADS}, rope_base=None, local=None)"
NAMES = {
    "softmax attention": small_digits.SOFTMAX,
    "MALA": MALA,
    "linear attention (relu)": small_digits.LINEAR,
}
FACTORS = (0.5, 1.0, 2.0, 4.0, 8.0)


def run(context):
    peaks = {name: [[] for _ in FACTORS] for name in NAMES}
    for seed in context.seeds:
        for name, pattern in NAMES.items():
            trained = small_digits.train(context, pattern, seed)
            (batch,) = trained.batches(1)
            layers = small_digits.captured(trained, ("q", "k"), batch)
            for found, factor in zip(peaks[name], FACTORS):
                found.append(_peak(small_digits.mixer_of(trained), layers, factor))
    return {"factors": list(FACTORS), "peaks": peaks}


def _peak(mixer, layers, factor: float) -> float:
    """Returns the largest weight of a token, averaged over tokens, heads, layers and images."""
    found = []
    for layer in layers:
        q, k = (small_digits.split(layer[name][:32]) for name in "qk")
        found.append(small_digits.weights(mixer, factor * q, k).max(axis=-1).mean())
    return float(np.mean(found))


def judge(measured):
    peaks = measured["peaks"]
    small, large = 1, len(measured["factors"]) - 1
    linear = np.array(peaks["linear attention (relu)"])
    return [
        claim.less(
            f"{name}: the largest weight grows when queries are eight times as long",
            1.2 * np.array(peaks[name][small]),
            peaks[name][large],
        )
        for name in ("softmax attention", "MALA")
    ] + [
        claim.at_most(
            "linear attention: the largest weight does not change",
            np.ptp(linear, axis=0) / linear.mean(axis=0),
            1e-3,
        ),
    ]


def draw(measured, figure):
    axes = figure.subplots()
    lines = {
        name: list(zip(measured["factors"], values)) for name, values in measured["peaks"].items()
    }
    pictures.curves(axes, lines, "factor of the queries", "largest of 64 weights, mean over tokens")
    axes.set_xscale("log", base=2)
    axes.set_ylim(0, None)
    axes.axhline(1 / 64, color="grey", linestyle=":", label="equal weights, 1/64")


CLAIM = claim.Claim(
    title="MALA's attention sharpens as the query grows, linear attention's does not",
    paper="arXiv 2507.00698",
    section="the neglect of the query's magnitude",
    published="In linear attention the query's norm cancels, so that its weights do not adapt to "
    "it; MALA's grow apart with the norm, in a more balanced way than softmax attention's.",
    ours="Encoders of 8 x 8 digits, one pixel per token, two layers of width 32, 600 steps of 32 "
    "images; the trained models' queries times 0.5 to 8, and the largest weight of each token. No "
    "rotary positions and no local term.",
    seeds=3,
    minutes=6,
    run=run,
    judge=judge,
    draw=draw,
)
