"""Ends a run: writes scores with baselines, a sample and a loss curve, or words the error."""

import math
from pathlib import Path

import jax

from experiments import data
from experiments.data import baselines, packing
from experiments.data.text import Piece
from experiments.training import metrics, plots, run_record
from experiments.training.checkpoints import Checkpoints
from seqmodels import models
from seqmodels.text import sampling

_BIGRAM_TRAINING_BYTES = 64 << 20


LANGUAGE = models.ARCHITECTURES[0]
# What a model's loss is measured in.
UNITS = {
    LANGUAGE: "nats per token",
    "encoder": "nats per label",
    "denoiser": "squared error per channel",
}


def _samples_text(config, tokenizer) -> bool:
    """Returns whether a run ends with a text: its model is of language, and the config asks."""
    of_language = models.architecture_of(config.model) == LANGUAGE
    return of_language and tokenizer is not None and bool(config.sample.length)


def check_sample(config, model, tokenizer) -> None:
    """Raises ValueError if the sample that the config asks for could not be generated."""
    if _samples_text(config, tokenizer):
        sampling.check_options(config.sample.temperature, None, None)
        prompt = sampling.prompt_tokens(config.sample.prompt, tokenizer)
        try:
            sampling.check_length(model, len(prompt), config.sample.length)
        except ValueError as error:
            raise ValueError(f"config.sample: {error}") from error


def finish(config, workdir: Path, result: dict, model, params, tokenizer) -> dict:
    """Returns `result`, the scores of the test split, with a language model's text sample added.

    Process 0 also adds baselines and the paths of files, and writes result.json and loss.png.
    """
    architecture = models.architecture_of(config.model)
    if architecture != LANGUAGE:
        result["architecture"] = architecture
    if architecture == "denoiser":  # which predicts no label
        result = {k: v for k, v in result.items() if k not in ("perplexity", "accuracy")}
    if _samples_text(config, tokenizer):
        prompt = sampling.prompt_tokens(config.sample.prompt, tokenizer)
        options = {"temperature": config.sample.temperature, "seed": config.seed}
        length = config.sample.length
        said = sampling.generate(model, params, tokenizer, [prompt], length, **options)[0]
        result["sample"] = config.sample.prompt + said
    if jax.process_index():
        return result
    byte_level = config.data.get("tokenizer") == "bytes" and architecture == LANGUAGE
    lines = {}
    if byte_level:
        held_out = scored_bytes(data.documents(config.data, "test"), result["bytes"])
        documents = data.documents(config.data, "train")
        train = first_bytes(documents, range(len(documents)), _BIGRAM_TRAINING_BYTES)
        lines["gzip -9"] = baselines.gzip_bits_per_byte(held_out)
        lines["byte bigram"] = baselines.bigram_bits_per_byte(train, held_out)
        result["baselines_bits_per_byte"] = lines
    result["workdir"] = str(workdir)
    result["checkpoint"] = str(workdir / "checkpoints" / str(result["steps"]))
    result["loss_curve"] = str(workdir / "loss.png")
    units = ("bits per byte", 1 / math.log(2)) if byte_level else (UNITS[architecture], 1.0)
    plots.loss_curve(metrics.read_metrics(workdir), workdir / "loss.png", *units, lines)
    run_record.write_json(workdir / "result.json", result)
    return result


def text(result: dict) -> str:
    """Returns the result of a run (`finish`) as text for the terminal."""
    architecture = result.get("architecture", LANGUAGE)
    scores = [f"test loss {result['loss']:.4f} {UNITS[architecture]}"]
    if architecture == LANGUAGE:
        scores.append(f"perplexity {result['perplexity']:.3f}")
    if "accuracy" in result:
        scores.append(f"accuracy {result['accuracy']:.4f}")
    counted = "labels" if architecture == "encoder" else "tokens"
    out = [f"{', '.join(scores)}, over {result['tokens']:,} {counted}"]
    if "bits_per_byte" in result:
        out += ["", f"bits per byte on {result['bytes']:,} held-out bytes"]
        scores = {"this model": result["bits_per_byte"]} | result.get("baselines_bits_per_byte", {})
        out += [f"  {name:<12} {value:6.3f}" for name, value in scores.items()]
    if "sample" in result:
        out += ["", "sample", *("  | " + line for line in result["sample"].split("\n"))]
    out += ["", f"checkpoint  {result['checkpoint']}", f"loss curve  {result['loss_curve']}"]
    return "\n".join(out)


def non_finite(step: int, values: dict, checkpoints: Checkpoints, learning_rate: float) -> str:
    """Returns the error text for metrics `values` that are not finite, with what to try."""
    checkpoints.wait()
    last = checkpoints.latest_step()
    kept = (
        f"The last good checkpoint is {checkpoints.path(last)}; the same command with the same "
        "--workdir goes on from it."
        if last is not None
        else "There is no checkpoint yet."
    )
    shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
    return (
        f"step {step} is not finite ({shown}); its state was not saved. {kept}\n"
        f"What to try: a lower --config.optimizer.learning_rate (it was {learning_rate:.3g} at "
        "this step), a longer "
        "--config.schedule.warmup_steps, a smaller --config.optimizer.clip, "
        "--config.model.dtype=float32. "
        "JAX_DEBUG_NANS=True in the environment names the operation that made it."
    )


def scored_bytes(documents, count: int) -> list[bytes]:
    """Returns the documents that make up the first `count` bytes of one pass over a split.

    The last one is cut there. They are in the corpus's order, not the pass's.
    """
    order = packing.one_pass_order(len(documents))
    numbers = (order[i] for i in range(len(documents)))
    pieces = first_bytes(documents, numbers, count)
    return [piece for _, piece in sorted((order[i], piece) for i, piece in enumerate(pieces))]


def first_bytes(documents, numbers, count: int):
    """Yields documents[i], i in `numbers`, until `count` bytes are reached; the last one is cut."""
    for i in numbers:
        document = documents[i]
        yield document if len(document) <= count else Piece(document[:count])
        count -= min(count, len(document))
        if not count:
            return
