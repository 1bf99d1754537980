"""What a run says at its end: scores beside baselines, a sample, a picture, result.json; or why it had to stop."""

import math
from pathlib import Path

import jax

from experiments import data, metrics, plots, run_record, sampling
from experiments.checkpoints import Checkpoints
from experiments.data import baselines

_BIGRAM_TRAINING_BYTES = 64 << 20


def finish(config, workdir: Path, result: dict, model, params, tokenizer) -> dict:
    """Adds a sample to the scores of the test split; on process 0 baselines and file names too, and writes result.json and
    loss.png."""
    if tokenizer is not None and config.sample.length:
        tokens = sampling.stream_tokens(
            model,
            params,
            sampling.prompt_tokens(config.sample.prompt, tokenizer),
            config.sample.length,
            temperature=config.sample.temperature,
            seed=config.seed,
            stop_token=tokenizer.document_id,
        )
        result["sample"] = config.sample.prompt + "".join(sampling.stream_text(tokens, tokenizer))
    if jax.process_index():
        return result
    byte_level = config.data.get("tokenizer") == "bytes"
    lines = {}
    if byte_level:
        held_out = list(first_bytes(data.documents(config.data, "test"), result["bytes"]))
        train = first_bytes(data.documents(config.data, "train"), _BIGRAM_TRAINING_BYTES)
        lines["gzip -9"] = baselines.gzip_bits_per_byte(b"".join(held_out))
        lines["byte bigram"] = baselines.bigram_bits_per_byte(train, held_out)
        result["baselines_bits_per_byte"] = lines
    result["workdir"] = str(workdir)
    result["checkpoint"] = str(workdir / "checkpoints" / str(result["steps"]))
    result["loss_curve"] = str(workdir / "loss.png")
    units = ("bits a byte", 1 / math.log(2)) if byte_level else ("nats a token", 1.0)
    plots.loss_curve(metrics.read_metrics(workdir), workdir / "loss.png", *units, lines)
    run_record.write_json(workdir / "result.json", result)
    return result


def text(result: dict) -> str:
    """The end of a run, for people."""
    out = [
        f"test loss {result['loss']:.4f} nats a token, perplexity {result['perplexity']:.3f}, "
        f"accuracy {result['accuracy']:.4f}, over {result['tokens']:,} tokens"
    ]
    if "bits_per_byte" in result:
        out += ["", f"bits per byte on {result['bytes']:,} held-out bytes"]
        scores = {"this model": result["bits_per_byte"]} | result.get("baselines_bits_per_byte", {})
        out += [f"  {name:<12} {value:6.3f}" for name, value in scores.items()]
    if "sample" in result:
        out += ["", "sample", *("  | " + line for line in result["sample"].split("\n"))]
    out += ["", f"checkpoint  {result['checkpoint']}", f"loss curve  {result['loss_curve']}"]
    return "\n".join(out)


def non_finite(step: int, values: dict, checkpoints: Checkpoints, learning_rate: float) -> str:
    """What to tell who trains when a step's metrics are not finite."""
    checkpoints.wait()
    last = checkpoints.latest_step()
    kept = (
        f"The last good checkpoint is {checkpoints.path(last)}; the same command with the same --workdir goes on from it."
        if last is not None
        else "There is no checkpoint yet."
    )
    shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
    return (
        f"step {step} is not finite ({shown}); its state was not saved. {kept}\n"
        f"What to try: a lower --config.optimizer.learning_rate (it was {learning_rate:.3g} at this step), a longer "
        "--config.schedule.warmup_steps, a smaller --config.optimizer.clip, --config.model.dtype=float32. "
        "JAX_DEBUG_NANS=True in the environment names the operation that made it."
    )


def first_bytes(documents, count: int):
    """Whole documents up to `count` bytes in all, the last one cut there."""
    for i in range(len(documents)):
        document = documents[i][:count]
        count -= len(document)
        yield document
        if not count:
            return
