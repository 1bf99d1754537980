"""A model and a corpus small enough to train within a test."""

from configs import common
from experiments import data


def make_config(folder, **model):
    """Returns the config of a byte-level run on a few lines of text, written below `folder`."""
    text = folder / "text.txt"
    if not text.exists():
        text.write_text("".join(f"{n} squared is {n * n}.\n" for n in range(1500)))
    config = common.get_config()
    config.data = data.default_config("text")
    config.data.update({"paths": str(text), "document_bytes": 200, "seq_len": 32, "batch_size": 8})
    config.model.update({"pattern": "attention(window=8, num_heads=2)", "num_layers": 1})
    config.model.update({"d_model": 16, "d_ff": 16, **model})
    config.optimizer.learning_rate = 1e-2
    config.schedule.warmup_steps = 2
    config.train.update({"steps": 6, "log_every": 1, "eval_every": 3})
    config.train.update({"eval_batches": 1, "test_batches": 1})
    config.checkpoint.update({"every": 3, "keep": 2})
    config.mesh.data = 1
    config.sample.length = 0
    return config
