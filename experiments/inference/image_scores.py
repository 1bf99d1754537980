"""Scores encoders and denoisers on a split: accuracy by class, confusion; loss by time."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from experiments.inference import image_pictures
from experiments.inference.subjects import Subject
from experiments.training import evaluation, run_record
from seqmodels import sharding


def score(
    subject: Subject, split: str, *, max_batches: int = 0, buckets: int = 16, out: Path | None
) -> dict:
    """Scores a run's encoder or denoiser; prints a table, and writes JSON and a picture into `out`.

    Of an encoder: loss, accuracy, accuracy by class, and which class was taken for which. Of a
    denoiser: loss, and loss by time in `buckets` ranges. With out=None, as on all processes but the
    first, the scores are only computed.

    max_batches: number of the split's batches to score; 0 is all.
    """
    encoder = subject.config.model.architecture == "encoder"
    found = _collect(subject, encoder, max_batches)
    loss = float(found["loss"].mean(dtype=np.float64))
    evaluation.check_finite(subject.name, loss)
    result = {"model": subject.name, "step": subject.step, "split": split, "loss": loss}
    if encoder:
        names, table_WW = subject.dataset.class_names, _confusion(subject, found)
        result |= class_scores(table_WW, names)
    else:
        result |= {"tokens": len(found["loss"]), "by_time": by_time(found, buckets)}
    if out is None:
        return result
    path = out / f"evaluation_{split}"
    run_record.write_json(path.with_suffix(".json"), result)
    picture = path.with_suffix(".png")
    title = f"{subject.config.data.name}, {split} split\n{subject.config.model.pattern}"
    if encoder:
        title += f"\naccuracy {result['accuracy']:.3f} of {result['documents']:,}"
        image_pictures.confusion(table_WW, names, title, picture)
        print(class_text(result))
    else:
        image_pictures.loss_by_time(result["by_time"], title, picture)
        print(time_text(result))
    print(f"\nwritten: {path}.json, {picture}")
    return result


def _collect(subject: Subject, encoder: bool, max_batches: int) -> dict[str, np.ndarray]:
    """Returns loss, label, and prediction (encoders) or time (denoisers) of tokens that count."""
    predict = predictor(subject) if encoder else None
    rows: dict[str, list] = {}
    for batch in itertools.islice(subject.dataset, max_batches or None):
        on_devices = subject.program.put(batch)
        loss_BT, _ = subject.program.token_losses(subject.params, on_devices)
        found = {"loss": loss_BT, "labels": on_devices["labels"], "mask": on_devices["loss_mask"]}
        if predict is not None:
            found["predicted"] = predict(subject.params, on_devices)
        else:
            found["time"] = on_devices["time"]
        if jax.process_count() > 1:
            found = multihost_utils.process_allgather(found, tiled=True)
        found = jax.device_get(found)
        counts_BT = found.pop("mask") > 0
        for name, value_BT in found.items():
            rows.setdefault(name, []).append(value_BT[counts_BT])
    return {name: np.concatenate(values) for name, values in rows.items()}


def predictor(subject: Subject) -> Callable[[Any, dict], jax.Array]:
    """Returns the jitted function (params, batch) -> class of each token, (B, T), of an encoder."""
    program, config = subject.program, subject.config
    mesh = sharding.make_mesh(config.mesh)
    options = sharding.Options.from_config(config.get("parallel", {}))

    @jax.jit
    def predict(params, batch):
        with sharding.scope(mesh, options):
            logits_BTW = program.model.apply(
                program.variables(params),
                batch["inputs"],
                batch["segment_ids"],
                batch.get("coordinates"),
            )
        return jnp.argmax(logits_BTW, axis=-1)

    return predict


def _confusion(subject: Subject, found: dict[str, np.ndarray]) -> np.ndarray:
    """Returns how many documents of each class (row) were taken for each class (column)."""
    W = subject.dataset.num_classes
    pair_N = found["labels"].astype(np.int64) * W + found["predicted"]
    return np.bincount(pair_N, minlength=W * W).reshape(W, W)


def class_scores(table_WW: np.ndarray, names: tuple[str, ...]) -> dict[str, Any]:
    """Returns accuracy and scores of each class, from a confusion table (true, predicted).

    A class's recall is the share of its documents that were recognised; its precision, the share of
    what was taken for it that is of it; `taken_for` is what most of its other documents were taken
    for. Shares of nothing are None.
    """
    right_W = np.diag(table_WW)
    rows = []
    for w, name in enumerate(names):
        true, taken = int(table_WW[w].sum()), int(table_WW[:, w].sum())
        wrong_W = np.where(np.arange(len(names)) == w, 0, table_WW[w])
        rows.append(
            {
                "class": name,
                "documents": true,
                "recall": right_W[w] / true if true else None,
                "precision": right_W[w] / taken if taken else None,
                "taken_for": names[wrong_W.argmax()] if wrong_W.any() else None,
            }
        )
    total = int(table_WW.sum())
    return {
        "accuracy": right_W.sum() / total,
        "documents": total,
        "by_class": rows,
        "confusion": table_WW.tolist(),
    }


def by_time(found: dict[str, np.ndarray], buckets: int) -> list[dict]:
    """Returns the mean loss in those of `buckets` equal ranges of [0, 1] that have tokens."""
    place = np.minimum((found["time"] * buckets).astype(int), buckets - 1)
    count, total = (
        np.bincount(place, weights=weights, minlength=buckets) for weights in (None, found["loss"])
    )
    return [
        {
            "first": i / buckets,
            "last": (i + 1) / buckets,
            "tokens": int(count[i]),
            "loss": total[i] / count[i],
        }
        for i in np.flatnonzero(count)
    ]


def class_text(result: dict) -> str:
    """Returns an encoder's scores as text for the terminal."""

    def share(value):
        return "        -" if value is None else f"{value:>9.4f}"

    width = max(5, *(len(row["class"]) for row in result["by_class"]))
    lines = [
        f"{result['split']} split: accuracy {result['accuracy']:.4f}, loss {result['loss']:.4f}, "
        f"{result['documents']:,} documents",
        f"\n  {'class':<{width}}  documents    recall precision  most often taken for",
    ]
    for row in result["by_class"]:
        shares = f"{share(row['recall'])} {share(row['precision'])}"
        lines.append(
            f"  {row['class']:<{width}} {row['documents']:>10,} {shares}  {row['taken_for'] or '-'}"
        )
    return "\n".join(lines)


def time_text(result: dict) -> str:
    """Returns a denoiser's scores as text for the terminal."""
    lines = [f"{result['split']} split: loss {result['loss']:.4f} (mean squared error per value)"]
    lines.append("\n         time     tokens      loss")
    for row in result["by_time"]:
        span = f"{row['first']:.2f}-{row['last']:.2f}"
        lines.append(f"  {span:>11} {row['tokens']:>10,} {row['loss']:>9.4f}")
    return "\n".join(lines)
