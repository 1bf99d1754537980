"""Builds docs/claims.md, the gallery of claims, from kept results alone."""

from collections.abc import Iterable
from pathlib import Path

from experiments import claims
from experiments.benchmarks import machine
from experiments.claims import claim, kept

PAGE = kept.ROOT / "docs/claims.md"
_LIMIT = 180  # minutes that all claims together may take


def page(records: Iterable[dict], unmeasured: Iterable[claim.Claim] = ()) -> str:
    """Returns the gallery in Markdown: a table of all claims, then a section for each.

    unmeasured: claims without a kept result, which the table lists last.
    """
    records = sorted(records, key=lambda record: record["name"])
    failed = sum(not record["holds"] for record in records)
    minutes = sum(record["seconds"] for record in records) / 60
    lines = [
        "# Claims",
        "",
        "Published claims, reproduced at a size that a laptop finishes: what the paper reports,",
        "what was trained and measured here in its place, and whether it held. Made from",
        "`experiments/reports/claims` by `python -m experiments.claims --gallery`; a claim that failed stays.",
        "",
        f"{len(records) - failed} of {len(records)} hold. From scratch they took {minutes:.0f}",
        f"minutes of processor time together, of at most {_LIMIT}: two cores take from half as long",
        "to as long. A section's time includes runs that it shares with others.",
        "",
        "| claim | paper | here | minutes |",
        "|---|---|---|---:|",
    ]
    for record in records:
        title, section = _cell(record["title"]), _cell(record["section"].partition(";")[0])
        lines.append(
            f"| [{title}](#{record['name']}) | {_link(record['paper'])}, {section} "
            f"| {_verdict(record)} | {record['seconds'] / 60:.1f} |"
        )
    for each in unmeasured:
        section = _cell(each.section.partition(";")[0])
        lines.append(
            f"| {_cell(each.title)} | {_link(each.paper)}, {section} | not measured yet | |"
        )
    for record in records:
        lines += ["", *_section(record)]
    return "\n".join([*lines, ""])


def _section(record: dict) -> list[str]:
    """Returns the gallery's lines on one claim."""
    name = record["name"]
    lines = [
        f'<a id="{name}"></a>',
        "",
        f"## {record['title']}",
        "",
        f"![{record['title']}](claims/{name}.png)",
        "",
        f"**Published** ({_link(record['paper'])}, {record['section']}). {record['published']}",
        "",
        f"**Here.** {record['ours']}",
        "",
        f"**{_verdict(record)}.**" + ("" if record["holds"] else f" {record['tried']}"),
        "",
        "| | measured | holds if | |",
        "|---|---|---|---|",
    ]
    for check in record["checks"]:
        cells = (check["text"], check["measured"], check["tolerance"])
        lines.append(f"| {' | '.join(map(_cell, cells))} | {'yes' if check['holds'] else 'NO'} |")
    git = record["environment"]["git"] or {"commit": "unknown", "dirty": False}
    commit = git["commit"][:10] + (" with changes" if git["dirty"] else "")
    seeds = len(record["seeds"])
    return [
        *lines,
        "",
        f"`{record['command']}`: {record['seconds']:.0f} s of processor time, "
        f"{seeds} seed{'s' if seeds > 1 else ''}, commit {commit}. "
        f"{machine.describe(record['environment'])}",
    ]


def line(name: str) -> str:
    """Returns a claim's name, minutes and title as one line of text."""
    known = claims.load(name)
    return f"{name:<24} {known.minutes:>4g} min  {known.title}"


def made() -> dict[Path, str]:
    """Returns {path: up-to-date text} of the gallery, as docs/make.py's `made` does.

    Kept results of claims that have no file any more are left out.
    """
    records = [record for name in claims.names() if (record := kept.read(name))]
    unmeasured = [claims.load(name) for name in claims.names() if not kept.read(name)]
    return {PAGE: page(records, unmeasured)}


def write() -> None:
    for path, text in made().items():
        path.write_text(text)


def _verdict(record: dict) -> str:
    return "Holds" if record["holds"] else "FAILED"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _link(paper: str) -> str:
    """Returns a paper as a link to arXiv, where its text has an arXiv number."""
    kind, _, number = paper.partition(" ")
    return f"[{paper}](https://arxiv.org/abs/{number})" if kind == "arXiv" else paper
