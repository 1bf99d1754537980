"""Results of claims as they are kept: <name>.json with the measurements, <name>.png drawn of them.

JSON lies in experiments/reports/claims, pictures in docs/claims, where both GitHub and the site
find them; another folder given by --out has both.
"""

import json
import sys
import textwrap
from pathlib import Path

from matplotlib.figure import Figure

from experiments import claims
from experiments.benchmarks import machine
from experiments.claims import claim as claim_module
from experiments.claims import pictures
from experiments.claims.context import Context, processor_seconds
from experiments.training import run_record

ROOT = Path(__file__).resolve().parents[2]
RESULTS, PICTURES = ROOT / "experiments/reports/claims", ROOT / "docs/claims"
_TEXTS = ("title", "paper", "section", "published", "ours", "tried", "minutes")


def make(name: str, context: Context) -> dict:
    """Runs a claim; returns its record: measurements, checks, verdict, command, machine.

    "seconds" is processor time from scratch: on two cores it takes from half as long to as long.
    """
    claim = claims.load(name)
    start = processor_seconds()
    measured = claim.run(context)
    taken = context.seconds(processor_seconds() - start)
    command = ["python", "-m", "experiments.claims", f"--only={name}"]
    return judged(
        name,
        {
            "measurements": json.loads(json.dumps(measured)),
            "smoke": context.smoke,
            "seeds": list(context.seeds),
            "seconds": round(taken, 1),
            "command": " ".join(command + (["--smoke"] if context.smoke else [])),
            "environment": machine.environment() | {"command": sys.argv[1:]},
        },
    )


def judged(name: str, record: dict) -> dict:
    """Returns a record with the claim's texts and its verdict on the measurements, as of now."""
    claim = claims.load(name)
    checks = claim.judge(record["measurements"])
    if not checks or not all(isinstance(check, claim_module.Check) for check in checks):
        raise ValueError(f"{name}: judge has to return claim.Check's, at least one")
    texts = {field: getattr(claim, field) for field in _TEXTS}
    verdict = {
        "holds": all(check.holds for check in checks),
        "checks": [check._asdict() for check in checks],
    }
    new = {"name": name} | texts | verdict
    return new | {key: value for key, value in record.items() if key not in new}


def write(record: dict, results: Path = RESULTS, images: Path = PICTURES) -> None:
    """Writes a record's JSON into one folder and its picture into another."""
    name = record["name"]
    for folder in (results, images):
        folder.mkdir(parents=True, exist_ok=True)
    run_record.write_json(results / f"{name}.json", record)  # first: a picture can be drawn anew
    draw(record, images / f"{name}.png")


def draw(record: dict, path: Path) -> None:
    """Draws a claim's picture of a record's measurements, with the claim as its title."""
    claim = claims.load(record["name"])
    figure = Figure(figsize=claim.figure_size, layout="constrained")
    claim.draw(record["measurements"], figure)
    verdict = "a smoke run" if record["smoke"] else "holds" if record["holds"] else "FAILED here"
    title = textwrap.fill(f"{claim.title} ({claim.paper}): {verdict}", 88)
    figure.suptitle(title, fontsize=11)
    pictures.legend(figure)
    figure.savefig(path, dpi=110)


def read(name: str, results: Path = RESULTS) -> dict | None:
    """Returns the kept record of a claim, or None if there is none."""
    path = results / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def summary(record: dict) -> str:
    """Returns a record as text for the terminal."""
    verdict = "smoke" if record["smoke"] else "holds" if record["holds"] else "FAILED"
    lines = [f"{record['name']}: {verdict}, {record['seconds']:.0f} s. {record['title']}"]
    for check in record["checks"]:
        lines.append(
            f"  {'yes' if check['holds'] else 'NO '} {check['text']}: {check['measured']} "
            f"({check['tolerance']})"
        )
    return "\n".join(lines)
