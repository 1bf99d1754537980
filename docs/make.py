"""Writes what the docs take from the code: the table of mixers (README.md, docs/mixers.md) and the
picture of the stack.

python docs/make.py            writes them
python docs/make.py --check    exit code 1, and which file, where one of them is not what the code
  says (CI)
"""

import ast
import inspect
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from seqmodels import mixers  # noqa: E402

OPERATORS = {
    "linear_attention": "S_t = diag(a_t) S_t-1 + k_t v_tᵀ",
    "delta_rule": "S_t = (I − β_t k_t k_tᵀ) diag(a_t) S_t-1 + β_t k_t v_tᵀ",
    "diagonal_scan": "h_t = a_t h_t-1 + x_t",
    "softmax_attention": "o_t = Σ_s softmax(q_t · k_s) v_s",
}
MARKS = "<!-- mixers: python docs/make.py -->", "<!-- end of mixers -->"


def described(name: str) -> dict[str, str]:
    """What a mixer's own file says of it: title, equation, papers, path, and the operators that it
    calls."""
    cls = mixers.mixer_class(name)
    path = Path(inspect.getsourcefile(cls))
    text = " ".join(cls.__doc__.split("\n\n")[0].split())
    start = text.index("arXiv")
    depth = 0
    while depth < 1:  # back to the parenthesis that the first paper's number stands in
        start -= 1
        depth += {"(": 1, ")": -1}.get(text[start], 0)
    equation = re.sub(r"\s+", " ", text[:start]).strip(" .,;")
    title = ast.get_docstring(ast.parse(path.read_text())).split("\n")[0].rstrip(".")
    numbers = dict.fromkeys(re.findall(r"\d{4}\.\d{5}", cls.__doc__))
    return {
        "title": title,
        "equation": equation,
        "papers": ", ".join(f"[{n}](https://arxiv.org/abs/{n})" for n in numbers),
        "path": str(path.relative_to(ROOT)),
        "operators": called(path),
    }


def called(path: Path) -> list[str]:
    """The operators that a mixer's file, or a mixer's file that it builds on, takes from
    seqmodels.operators."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "seqmodels.operators":
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "operators":
            found.add(node.attr)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("seqmodels.mixers"):
            names = [node.module.rpartition(".")[2], *(alias.name for alias in node.names)]
            others = {path.with_name(f"{name}.py") for name in names} - {path}
            found |= {op for other in others if other.exists() for op in called(other)}
    return [op for op in OPERATORS if op in found]


def table(rows: dict[str, dict], prefix: str) -> str:
    lines = ["| mixer | what it computes | paper | built on | file |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        equation = row["equation"].replace("|", "\\|")
        operators = ", ".join(f"`{op}`" for op in row["operators"]) or "its own"
        file = f"[{Path(row['path']).name}]({prefix}{row['path']})"
        lines.append(f"| `{name}` | `{equation}` | {row['papers']} | {operators} | {file} |")
    return "\n".join(lines)


def page(rows: dict[str, dict]) -> str:
    return (
        "# Mixers\n\nMade by `python docs/make.py` from the registry (`seqmodels.mixers.names()`). Each trains on the quickstart's text by\n"
        "`python -m experiments.train --config=configs/small.py:<name>`, and all of them run through one suite.\n\n"
        + table(rows, "https://github.com/seqmodels/seqmodels/blob/main/")
        + "\n\n"
        + "\n".join(f"::: {row['path'][:-3].replace('/', '.')}" for row in rows.values())
        + "\n"
    )


def picture(rows: dict[str, dict]) -> str:
    """Operators at the bottom, above each the mixers built on it, and what a model goes through on
    top; SVG."""
    width, column, line = 1000, 250, 20
    shapes = []

    def box(x, y, w, h, fill, text, sub="", size=14):
        shapes.append(
            f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="6" fill="{fill}" stroke="#456"/>'
        )
        shapes.append(
            f'<text x="{x + w / 2}" y="{y + (22 if sub else h / 2 + 5)}" font-size="{size}" font-weight="600" text-anchor="middle">{text}</text>'
        )
        if sub:
            shapes.append(
                f'<text x="{x + w / 2}" y="{y + 42}" font-size="10.5" text-anchor="middle" fill="#345">{sub}</text>'
            )

    most = max(sum(op in row["operators"] for row in rows.values()) for op in OPERATORS)
    top = 110
    bottom = top + most * line + 30
    for i, (text, fill) in enumerate(
        {
            "train": "#e8f0e4",
            "decode": "#e8f0e4",
            "convert": "#e8f0e4",
            "linearize": "#e8f0e4",
        }.items()
    ):
        box(i * column + 10, 10, column - 20, 34, fill, text)
    box(
        10,
        54,
        width - 20,
        34,
        "#f3ecdc",
        "language model: “3*gated_delta_net + attention(window=256)”",
    )
    for i, (op, formula) in enumerate(OPERATORS.items()):
        x = i * column + 10
        shapes.append(
            f'<rect x="{x}" y="{top - 10}" width="{column - 20}" height="{bottom - top}" rx="6" fill="#f7f9fc" stroke="#9ab"/>'
        )
        names = [name for name, row in rows.items() if op in row["operators"]]
        for n, name in enumerate(names):
            shapes.append(
                f'<text x="{x + (column - 20) / 2}" y="{top + 12 + n * line}" font-size="13" text-anchor="middle">{name}</text>'
            )
        box(x, bottom, column - 20, 54, "#dbe7f6", op, formula)
    box(
        10,
        bottom + 66,
        width - 20,
        34,
        "#e9e4f3",
        "XLA (CPU, TPU, GPU) · Pallas TPU · Triton GPU · context parallel",
    )
    body = "\n".join(shapes)
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {bottom + 110}" font-family="sans-serif">\n{body}\n</svg>\n'


def made() -> dict[Path, str]:
    """The text of every file that this program writes."""
    rows = {name: described(name) for name in mixers.names()}
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text().partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    return {
        readme: f"{before}{MARKS[0]}\n\n{table(rows, '')}\n\n{MARKS[1]}{after}",
        ROOT / "docs/mixers.md": page(rows),
        ROOT / "docs/stack.svg": picture(rows),
    }


def main() -> int:
    stale = [path for path, text in made().items() if not path.exists() or path.read_text() != text]
    if "--check" in sys.argv:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is not what the code says: run python docs/make.py")
        return bool(stale)
    for path, text in made().items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
