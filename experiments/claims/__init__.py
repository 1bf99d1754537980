"""Published claims, reproduced at a size that a laptop finishes: `python -m experiments.claims`.

A file of this folder that defines CLAIM is a claim; its name is the file's. claim.py says what a
claim has, context.py how it trains, pictures.py how it draws. Files without CLAIM are what several
claims share. To add one, add a file:

    def run(context):
        config = some_config.get_config()
        return {
            name: [
                context.train(config, {"model.pattern": pattern}, seed=seed).result["accuracy"]
                for seed in context.seeds
            ]
            for name, pattern in {"ours": "...", "baseline": "..."}.items()
        }

    def judge(measured):
        return [claim.less("ours is more accurate", measured["baseline"], measured["ours"])]

    def draw(measured, figure):
        pictures.bars(figure.subplots(), measured, "accuracy on held-out examples")

    CLAIM = claim.Claim(title="...", paper="arXiv ...", section="...", published="...", ours="...",
                        seeds=3, minutes=5, run=run, judge=judge, draw=draw)
"""

import importlib
import re
from pathlib import Path

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """Returns the names of all claims, in alphabetical order, without importing them."""
    paths = sorted(FOLDER.glob("[a-z]*.py"))
    return [path.stem for path in paths if re.search(r"^CLAIM = ", path.read_text(), re.M)]


def load(name: str):
    """Returns the `claim.Claim` that experiments/claims/<name>.py defines."""
    return importlib.import_module(f"experiments.claims.{name}").CLAIM
