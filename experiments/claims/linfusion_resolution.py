"""LinFusion: trained at one resolution it runs at twice; sums that are not divided break."""

import jax.numpy as jnp
import numpy as np

from experiments.claims import claim, pictures, small_digits

HEADS = f"num_heads={small_digits.HEADS}"
NAMES = {
    "LinFusion, normalised": f"linfusion({HEADS})",
    "not normalised": f"linfusion({HEADS}, correction='none')",
}
SIZES = (8, 16)


def run(context):
    accuracy = {name: [[] for _ in SIZES] for name in NAMES}
    for seed in context.seeds:
        for name, pattern in NAMES.items():
            sinusoidal = {"model.position_embedding": "sinusoidal"}
            trained = small_digits.train(context, pattern, seed, **sinusoidal)
            for found, size in zip(accuracy[name], SIZES):
                found.append(_accuracy(trained, size))
    return {"sizes": list(SIZES), "accuracy": accuracy}


def _accuracy(trained, size: int) -> float:
    """Returns the accuracy on test images of size x size pixels, which lie where the 8 x 8 do."""
    correct = total = 0.0
    place = np.arange(size) * SIZES[0] // size
    grid_TA = np.stack(np.meshgrid(place, place, indexing="ij"), axis=-1).reshape(-1, 2)
    for batch in trained.batches(100, changes={"data.size": size}):
        rows = batch["inputs"].shape[0]
        coordinates_BTA = np.broadcast_to(grid_TA, (rows, *grid_TA.shape)).astype(np.int32)
        variables = {"params": trained.params}
        logits_BTW = trained.model.apply(
            variables, batch["inputs"], batch["segment_ids"], jnp.asarray(coordinates_BTA)
        )
        right_BT = np.argmax(logits_BTW, axis=-1) == batch["labels"]
        correct += np.sum(right_BT * batch["loss_mask"])
        total += np.sum(batch["loss_mask"])
    return float(correct / total)


def judge(measured):
    (once, twice), (plain, plain_twice) = (np.array(a) for a in measured["accuracy"].values())
    return [
        claim.at_least("both learn the digits at 8 x 8", np.minimum(once, plain), 0.5),
        claim.at_least("normalised, 16 x 16 keeps the accuracy", twice / once, 0.9),
        claim.at_most("not normalised, it breaks", plain_twice / plain, 0.75),
    ]


def draw(measured, figure):
    axes = figure.subplots()
    lines = {
        name: [(size, 100 * np.array(seeds)) for size, seeds in zip(measured["sizes"], values)]
        for name, values in measured["accuracy"].items()
    }
    pictures.curves(axes, lines, "pixels along each side (trained at 8)", "test accuracy, %")
    axes.axhline(10, color="grey", linestyle=":", label="chance")
    axes.set_xticks(SIZES)
    axes.set_ylim(0, 100)
    pictures.legend(figure)


CLAIM = claim.Claim(
    title="LinFusion trained at one resolution runs at twice; without normalisation it breaks",
    paper="arXiv 2409.02097",
    section="section 3.2",
    published="Attention that is normalised keeps its scale with the number of tokens, and zero-shot "
    "generation at higher resolutions works; linear mixers without normalisation fail at them.",
    ours="Encoders of 8 x 8 digits, one pixel per token, two layers of width 32, 600 steps of 32 "
    "images, sinusoidal positions; accuracy on the test images, and on the same images enlarged to "
    "16 x 16 (bilinear, four times the tokens, coordinates in pixels of 8 x 8).",
    seeds=3,
    minutes=5,
    run=run,
    judge=judge,
    draw=draw,
)
