"""Samples images and videos of each class from a run's denoiser, into a PNG or a GIF."""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.data import make_dataset
from experiments.data.patching import HIGH, to_bytes
from experiments.inference import image_pictures
from experiments.launch import cli
from experiments.training import restore, steps
from seqmodels import denoiser, sharding


def sample(
    config,
    workdir: str,
    step: int | None = None,
    *,
    classes: Sequence[str] = (),
    count: int = 8,
    sampling_steps: int = 50,
    guidance: float = 1.0,
    seed: int = 0,
    out: Path,
) -> Path:
    """Samples from a denoiser and writes a sheet with a row per class; returns its path.

    config: of the run in `workdir`. step: which checkpoint; None is the latest.
    classes: names of classes; () is all of them.
    count: number of samples per class.
    sampling_steps, guidance: see `denoiser.ddim_sample`.
    out: the path without its ending, which is .png for images and .gif for videos.

    Raises UserError for a run that is no denoiser, an unknown class, or numbers out of range.
    """
    _check(config, count, sampling_steps)
    dataset = make_dataset(config.data, "test")
    names = dataset.class_names
    patching = dataset.patching
    if patching is None:
        raise cli.UserError(f"the run's data, {config.data.name!r}, are no images: nothing to draw")
    chosen = cli.chosen("classes", classes, names) if classes else names
    config = restore.reading_config(config)
    program = steps.build(config, patching.tokens * config.data.pack)
    step, params = restore.evaluation_params(program, config, Path(workdir), step)
    mesh = sharding.make_mesh(config.mesh)
    options = sharding.Options.from_config(config.get("parallel", {}))

    @jax.jit
    def run(params, key, label_B):
        with sharding.scope(mesh, options):
            return denoiser.ddim_sample(
                program.model,
                program.variables(params),
                key,
                (label_B.size, patching.tokens, patching.features),
                label_B,
                steps=sampling_steps,
                guidance=guidance,
                largest=HIGH,
            )

    label_B = np.repeat([names.index(name) for name in chosen], count)
    # The mesh splits rows: the batch is filled up to a multiple of its devices.
    extra = -len(label_B) % mesh.size
    key = jax.random.key(seed)
    x_BTE = run(params, key, jnp.asarray(np.append(label_B, label_B[:1].repeat(extra))))
    pixels = patching.unpatchify(np.asarray(x_BTE)[: len(label_B)])
    pixels = to_bytes(pixels).reshape(len(chosen), count, *pixels.shape[1:])
    title = f"{config.model.pattern}, step {step}: {sampling_steps} steps, guidance {guidance:g}"
    out.parent.mkdir(parents=True, exist_ok=True)
    return image_pictures.write_samples(pixels, chosen, title, out)


def _check(config, count: int, sampling_steps: int) -> None:
    if (architecture := config.model.architecture) != "denoiser":
        what = {
            "encoder": "tells classes: score it with experiments.evaluate",
            "language_model": "continues text",
        }[architecture]
        raise cli.UserError(f"the run is no denoiser; its {architecture} {what}")
    for flag, value in (("samples", count), ("steps", sampling_steps)):
        if value < 1:
            raise cli.UserError(f"--{flag} is {value}; it must be at least 1")
