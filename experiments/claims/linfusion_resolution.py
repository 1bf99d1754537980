"""LinFusion: trained at one resolution it runs at twice; sums that are not divided break."""

import jax
import numpy as np

from experiments.claims import claim, pictures, small_digits

HEADS = f"num_heads={small_digits.HEADS}"
# 1/1500 is about the mean of 1 / sum_j q_i . k_j over 64 tokens before training.
NAMES = {
    "LinFusion, normalised": f"linfusion({HEADS})",
    "a constant instead": f"linfusion({HEADS}, correction='none', scale={1 / 1500:.2g})",
}
# Pixels along each side, and how images are enlarged.
IMAGES = {"8 x 8": (8, "nearest"), "repeated": (16, "nearest"), "interpolated": (16, "bilinear")}
LABELS = {"repeated": "16 x 16, pixels repeated", "interpolated": "16 x 16, bilinear"}


def run(context):
    accuracy = {name: {kind: [] for kind in IMAGES} for name in NAMES}
    for seed in context.seeds:
        for name, pattern in NAMES.items():
            sinusoidal = {"model.position_embedding": "sinusoidal"}
            trained = small_digits.train(context, pattern, seed, **sinusoidal)
            for kind, (size, resize) in IMAGES.items():
                accuracy[name][kind].append(_accuracy(trained, size, resize))
    return accuracy


def _accuracy(trained, size: int, resize: str) -> float:
    """Returns the accuracy on test images of size x size pixels, which lie where the 8 x 8 do."""
    correct = total = 0.0
    apply = jax.jit(trained.model.apply)
    place = np.arange(size) * 8 // size
    grid_TA = np.stack(np.meshgrid(place, place, indexing="ij"), axis=-1).reshape(-1, 2)
    for batch in trained.batches(100, changes={"data.size": size, "data.resize": resize}):
        rows = batch["inputs"].shape[0]
        coordinates_BTA = np.broadcast_to(grid_TA, (rows, *grid_TA.shape)).astype(np.int32)
        variables = {"params": trained.params}
        logits_BTW = apply(variables, batch["inputs"], batch["segment_ids"], coordinates_BTA)
        right_BT = np.argmax(logits_BTW, axis=-1) == batch["labels"]
        correct += np.sum(right_BT * batch["loss_mask"])
        total += np.sum(batch["loss_mask"])
    return float(correct / total)


def judge(measured):
    kept, broken = (
        {kind: np.array(values[kind]) / values["8 x 8"] for kind in values}
        for values in measured.values()
    )
    both = np.minimum(*(values["8 x 8"] for values in measured.values()))
    return [
        claim.at_least("both learn at 8 x 8, where chance is 0.1", both, 0.3),
        claim.at_least("normalised, repeated pixels keep the accuracy", kept["repeated"], 0.99),
        claim.at_most("divided by a constant, a tenth or more is lost", broken["repeated"], 0.9),
        claim.less(
            "interpolated pixels cost the normalised model a smaller part",
            broken["interpolated"],
            kept["interpolated"],
        ),
    ]


def draw(measured, figure):
    for axes, (name, values) in zip(figure.subplots(1, 2, sharex=True), measured.items()):
        shown = {LABELS.get(kind, kind): 100 * np.array(values[kind]) for kind in values}
        pictures.bars(axes, shown, "test accuracy, %; trained at 8 x 8")
        axes.axvline(10, color="grey", linestyle=":", label="chance")
        axes.set_xlim(0, 100)
        axes.set_title(name, fontsize=10)


CLAIM = claim.Claim(
    title="LinFusion trained at one resolution runs at twice; without normalisation it breaks",
    paper="arXiv 2409.02097",
    section="normalisation, and generation across resolutions",
    published="Attention that is normalised keeps its scale with the number of tokens, and zero-shot "
    "generation at higher resolutions works; linear mixers without normalisation fail at them.",
    ours="Encoders of 8 x 8 digits, one pixel per token, two layers of width 32, 600 steps of 32 "
    "images, sinusoidal positions, with sums divided by their weights or by a constant that is "
    "right for 64 tokens at the start; accuracy on the test images, and on the same images enlarged to "
    "16 x 16, by repeated and by bilinear pixels: four times the tokens, coordinates in pixels of "
    "8 x 8. Bilinear edges are smoother than those of training, which costs every model something. "
    "Sums with no divisor at all learn less, and drown the residual stream, whose next norm then "
    "hides their size.",
    seeds=3,
    minutes=5,
    run=run,
    judge=judge,
    draw=draw,
    figure_size=(10.0, 3.5),
)
