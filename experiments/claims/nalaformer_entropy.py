"""NaLaFormer: its features' entropies are nearer to softmax attention's than a relu map's."""

import numpy as np

from experiments.claims import claim, pictures, small_digits
from seqmodels import mixers

FACTORS = (1 / 64, 1 / 16, 1 / 4, 1.0, 4.0)
MAPS = {
    "linear attention (relu)": {"q_map": "relu"},
    "NaLaFormer": {"q_map": "norm_power", "k_map": "signed_cube"},
}


def run(context):
    entropies = {name: [[] for _ in FACTORS] for name in ("softmax attention", *MAPS)}
    gaps, norms = {name: [] for name in MAPS}, []
    for seed in context.seeds:
        trained = small_digits.train(context, small_digits.SOFTMAX, seed)
        (batch,) = trained.batches(1)
        layers = small_digits.captured(trained, ("q", "k"), batch)
        of_map = {
            name: mixers.make("whole_document", d_model=trained.config.model.d_model, **maps)
            for name, maps in MAPS.items()
        }
        of_map = {"softmax attention": small_digits.mixer_of(trained)} | of_map
        queries = np.stack([small_digits.split(layer["q"]) for layer in layers])
        norms.append(float(np.linalg.norm(queries, axis=-1).mean()))
        for place, factor in enumerate(FACTORS):
            found = {name: _entropies(mixer, layers, factor) for name, mixer in of_map.items()}
            for name, values in found.items():
                entropies[name][place].append(float(values.mean()))
            if factor == 1.0:
                for name in MAPS:
                    gap = np.abs(found[name] - found["softmax attention"])
                    gaps[name].append(float(gap.mean()))
    return {"factors": list(FACTORS), "entropies": entropies, "gaps": gaps, "norms": norms}


def _entropies(mixer, layers, factor: float) -> np.ndarray:
    """Returns the entropy in nats of each token's weights, (layers, B, H, T)."""
    found = []
    for layer in layers:
        q, k = (small_digits.split(layer[name][:32]) for name in "qk")
        w = small_digits.weights(mixer, factor * q, k)
        found.append(-np.sum(w * np.log(np.maximum(w, 1e-30)), axis=-1))
    return np.stack(found)


def judge(measured):
    gaps = measured["gaps"]
    relu, nala = (measured["entropies"][name] for name in MAPS)
    return [
        claim.less(
            "NaLaFormer's entropies are nearer to softmax attention's than a relu map's",
            gaps["NaLaFormer"],
            gaps["linear attention (relu)"],
        ),
        claim.less(
            "NaLaFormer's entropy falls as queries grow from small ones",
            nala[-1],
            nala[0],
            margin=0.1,
        ),
        claim.at_most("a relu map's does not", np.ptp(np.array(relu), axis=0), 1e-3),
    ]


def draw(measured, figure):
    left, right = figure.subplots(1, 2)
    pictures.bars(left, measured["gaps"], "mean |entropy - softmax attention's|, nats")
    lengths = np.mean(measured["norms"]) * np.array(measured["factors"])
    lines = {name: list(zip(lengths, values)) for name, values in measured["entropies"].items()}
    pictures.curves(right, lines, "mean norm of the scaled queries", "entropy of 64 weights, nats")
    right.axvline(np.mean(measured["norms"]), color="grey", linestyle=":", label="as trained")
    right.set_xscale("log", base=2)


CLAIM = claim.Claim(
    title="NaLaFormer's entropy is nearer to softmax attention's than a relu map's",
    paper="arXiv 2506.21137",
    section="query norm and entropy",
    published="Softmax attention's entropy falls with the query's norm, which linear attention's "
    "normalisation takes out; norm-aware features bring that back.",
    ours="Queries and keys of trained softmax encoders of 8 x 8 digits (one pixel per token, two "
    "layers of width 32, 600 steps of 32 images), whose weights are made by softmax, by a relu map "
    "and by NaLaFormer's features; entropies per token. The power 3 (1/2 + tanh |q|) stops growing "
    "at a norm of about 2, which trained queries exceed: there the entropy hardly falls further.",
    seeds=3,
    minutes=3,
    run=run,
    judge=judge,
    draw=draw,
    figure_size=(11.0, 3.5),
)
