"""Formats tables as text and Markdown, and checks of a benchmark's targets."""

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

from experiments.benchmarks import machine

Row = dict[str, object]


class Target(NamedTuple):
    """A benchmark's target, with what was measured. met: None where this run did not measure it."""

    claim: str
    found: str
    met: bool | None


@dataclasses.dataclass
class Section:
    """One benchmark's section of a report.

    settings: those of this run. rows: all measurements, for JSON. table: the rows to print. checks:
      rows of correctness checks. notes: lines of text beside the table. wrong: whether an
      implementation gave wrong results.
    """

    name: str
    settings: Row
    rows: list[Row]
    table: list[Row]
    targets: list[Target]
    checks: list[Row] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    wrong: bool = False


def text(section: Section) -> str:
    """Returns a section as text for the terminal: its settings, notes and table."""
    table = text_table(section.table) if section.table else "nothing was timed"
    return "\n".join([f"{section.name}: {_settings(section)}", *section.notes, table])


def save(folder: Path, environment: Row, sections: list[Section]) -> None:
    """Writes sections to result.json and tables.md, with the picture <name>.png of each, if any."""
    folder.mkdir(parents=True, exist_ok=True)
    result = {
        "environment": environment,
        "sections": [
            {
                "name": section.name,
                "settings": section.settings,
                "checks": section.checks,
                "rows": section.rows,
                "targets": [target._asdict() for target in section.targets],
            }
            for section in sections
        ],
    }
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    parts = ["# Benchmarks", machine.describe(environment)]
    for section in sections:
        parts += [f"## {section.name}", _settings(section)]
        parts += ["\n".join(f"- {note}" for note in section.notes)] if section.notes else []
        parts += [markdown_table(section.table)] if section.table else []
        if (folder / f"{section.name}.png").exists():
            parts += [f"![{section.name}]({section.name}.png)"]
    parts += [
        "## Targets",
        "```\n" + targets_text([t for s in sections for t in s.targets]) + "\n```",
    ]
    (folder / "tables.md").write_text("\n\n".join(parts) + "\n")


def _settings(section: Section) -> str:
    return ", ".join(f"{name} {value}" for name, value in section.settings.items())


def text_table(rows: list[Row]) -> str:
    """Returns rows as an aligned table in plain text, with the columns of the first row."""
    cells = _cells(rows)
    numeric = [all(not isinstance(row[name], str) for row in rows) for name in rows[0]]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric)
        ).rstrip()
        for line in cells
    )


def markdown_table(rows: list[Row]) -> str:
    header, *body = _cells(rows)
    numeric = [all(not isinstance(row[name], str) for row in rows) for name in rows[0]]
    rule = ["---:" if right else "---" for right in numeric]
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *body])


def _cells(rows: list[Row]) -> list[list[str]]:
    names = list(rows[0])
    return [names, *([_cell(row[name]) for name in names] for row in rows)]


def _cell(value) -> str:
    """Returns a table cell as text; a float with three significant digits, None as "-"."""
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip(".")


def targets_text(targets: list[Target]) -> str:
    words = {True: "met", False: "NOT MET", None: "not measured"}
    return "\n".join(f"{words[t.met]:>12}  {t.claim}: {t.found}" for t in targets)
