"""Writes what the docs take from the code: the table of mixers, the stack, the gallery of claims.

python docs/make.py            writes README.md's table, docs/{mixers,claims}.md and docs/stack.svg
python docs/make.py --check    exits with 1, and says which of them is not what the code says
"""

import contextlib
import importlib
import inspect
import re
import sys
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from experiments.claims import gallery  # noqa: E402
from seqmodels import mixers, operators  # noqa: E402
from seqmodels.modules import pattern  # noqa: E402

OPERATORS = {
    "linear_attention": "Sₜ = diag(aₜ) Sₜ₋₁ + kₜ vₜᵀ",
    "delta_rule": "Sₜ = (I − βₜ kₜ kₜᵀ) diag(aₜ) Sₜ₋₁ + βₜ kₜ vₜᵀ",
    "diagonal_scan": "hₜ = aₜ hₜ₋₁ + xₜ",
    "document_sums": "oₜ = (Σₛ kₛ vₛᵀ)ᵀ qₜ, s in t's document",
    "softmax_attention": "oₜ = Σₛ softmax(qₜ · kₛ) vₛ",
}
TABLE = "<!-- mixers: python docs/make.py -->", "<!-- end of mixers -->"
WHOLE = "<!-- whole documents: python docs/make.py -->", "<!-- end of whole documents -->"
LINKS = "<!-- links of mixers: python docs/make.py -->", "<!-- end of links -->"


def described(name: str) -> dict:
    """Returns what the docs say of a mixer: equations, papers, file, operators and config.

    The mixer's docstring has a title that cites the paper, and then the equations, indented.
    """
    cls = mixers.mixer_class(name)
    path = Path(inspect.getsourcefile(cls))
    _, equations, *_ = inspect.cleandoc(cls.__doc__).split("\n\n")
    if not all(line.startswith("    ") for line in equations.split("\n")):
        raise ValueError(
            f"{path}: {cls.__name__}'s docstring needs equations, indented, after its title"
        )
    papers = re.findall(r"\d{4}\.\d{5}", cls.__doc__)
    return {
        "equations": [
            symbols(line.strip()) for line in re.sub(r"\n {8,}", " ", equations).split("\n")
        ],
        "papers": list(dict.fromkeys(papers)),
        "path": str(path.relative_to(ROOT)),
        "causal": cls.causal,
        "operators": called(name),
        "config": config(name),
    }


def symbols(equation: str) -> str:
    """Returns an equation of a docstring with Greek letters for their names, and ᵀ for ^T."""
    for word, letter in {
        "alpha": "α",
        "beta": "β",
        "gamma": "γ",
        "lambda": "λ",
        "phi": "φ",
    }.items():
        equation = re.sub(rf"\b{word}(?=_[a-z]\b|_t,|\b)", letter, equation)
    return equation.replace("^T", "ᵀ")


def called(name: str) -> list[str]:
    """Returns the names of the operators that a mixer calls, found by tracing it."""
    mixer, found = mixers.make(name, d_model=128), set()
    with contextlib.ExitStack() as patches:
        for op in OPERATORS:
            original = getattr(operators, op)

            def record(*args, op=op, original=original, **keywords):
                found.add(op)
                return original(*args, **keywords)

            for module in [m for key, m in sys.modules.items() if key.startswith("seqmodels.")]:
                if vars(module).get(op) is original:
                    patches.enter_context(mock.patch.object(module, op, record))
        jax.eval_shape(mixer.init, jax.random.key(0), jnp.zeros((1, 4, 128)))
    return [op for op in OPERATORS if op in found]


def config(name: str) -> str:
    """Returns the name of a mixer's config.

    It is one of a published size, a linearization, or else "small" or, for mixers that see whole
    documents, "digits".
    """
    if not mixers.mixer_class(name).causal:
        return "digits"
    for path in sorted(ROOT.glob(f"configs/{name}_[0-9]*.py")):
        return path.stem
    methods = sorted(path.stem for path in ROOT.glob("configs/linearize/[a-z]*.py"))
    students = {
        method: importlib.import_module(f"configs.linearize.{method}")
        .get_config()
        .linearize.student
        for method in sorted(methods, key=lambda method: method != name)  # its own name first
        if method != "common"
    }
    for method, student in students.items():
        if name != "attention" and pattern.parse(student)[0].name == name:
            return f"linearize/{method}"
    return "small"


def table(rows: dict[str, dict], causal: bool) -> str:
    """Returns README's table of mixers, causal or not; `links` returns the targets of its links."""
    lines = ["| mixer, its file | equation | paper | config |", "|---|---|---|---|"]
    for name, row in rows.items():
        if row["causal"] != causal:
            continue
        equation = row["equations"][0].replace("|", "\\|")
        lines.append(f"| [{name}] | `{equation}` | [{row['papers'][0]}] | `{row['config']}` |")
    return "\n".join(lines)


def links(rows: dict[str, dict]) -> str:
    papers = sorted({row["papers"][0] for row in rows.values()})
    return "\n".join(
        [f"[{name}]: {row['path']}" for name, row in rows.items()]
        + [f"[{number}]: https://arxiv.org/abs/{number}" for number in papers]
    )


def page(rows: dict[str, dict]) -> str:
    lines = [
        "# Mixers",
        "",
        "Made by `python docs/make.py` from the registry, `seqmodels.mixers.names()`. Causal ones train",
        "on the quickstart's text, `python -m experiments.train --config=configs/small.py:<name>`;",
        "all of them, those that see whole documents too, on digits, `configs/digits.py:<name>`. All",
        "run through one suite.",
        "",
        "| mixer | equations | papers | built on | config |",
        "|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        equations = "<br>".join(f"`{line}`" for line in row["equations"]).replace("|", "\\|")
        papers = ", ".join(
            f"[{number}](https://arxiv.org/abs/{number})" for number in row["papers"]
        )
        operators = ", ".join(map(linked, row["operators"])) or "its own"
        cells = (f"[{name}](#{module(row)})", equations, papers, operators, f"`{row['config']}`")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"::: {module(row)}" for row in rows.values()), ""])


def linked(operator: str) -> str:
    """Returns an operator's name in Markdown, linked to its page in docs/math if there is one."""
    page = f"math/{operator}.md"
    return f"[`{operator}`]({page})" if (ROOT / "docs" / page).exists() else f"`{operator}`"


def module(row: dict) -> str:
    return row["path"][:-3].replace("/", ".")


def picture(rows: dict[str, dict]) -> str:
    """Returns the SVG picture of the stack: operators, the mixers built on each, models, uses."""
    width, column, line, top = 1250, 250, 20, 110
    most = max(sum(op in row["operators"] for row in rows.values()) for op in OPERATORS)
    bottom = top + most * line + 30
    shapes = []

    def rectangle(x, y, w, h, fill, stroke="#456"):
        shapes.append(
            f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="6" fill="{fill}" '
            f'stroke="{stroke}"/>'
        )

    def write(x, y, text, size=14, weight=400):
        shapes.append(
            f'<text x="{x}" y="{y}" font-size="{size}" font-weight="{weight}" text-anchor="middle">'
            f"{text}</text>"
        )

    def box(x, y, w, h, fill, text):
        rectangle(x, y, w, h, fill)
        write(x + w / 2, y + h / 2 + 5, text, weight=600)

    for i, text in enumerate(("train", "generate", "convert", "linearize")):
        box(i * 312 + 10, 10, 292, 34, "#e8f0e4", text)
    model = "language model, encoder, denoiser: “3*gated_delta_net + attention(window=256)”"
    box(10, 54, width - 20, 34, "#f3ecdc", model)
    for i, (op, formula) in enumerate(OPERATORS.items()):
        x, middle = i * column + 10, i * column + column / 2
        rectangle(x, top - 10, column - 20, bottom - top, "#f7f9fc", "#9ab")
        names = [name for name, row in rows.items() if op in row["operators"]]
        for n, name in enumerate(names):
            write(middle, top + 12 + n * line, name, 13)
        rectangle(x, bottom, column - 20, 54, "#dbe7f6")
        write(middle, bottom + 22, op, weight=600)
        write(middle, bottom + 42, formula, 10.5)
    forms = "XLA (CPU, TPU, GPU) · Pallas (TPU) · Triton (GPU) · context parallel"
    box(10, bottom + 66, width - 20, 34, "#e9e4f3", forms)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {bottom + 110}" '
            'font-family="sans-serif">',
            *shapes,
            "</svg>\n",
        ]
    )


def between(text: str, marks: tuple[str, str], made: str) -> str:
    """Returns `text` with what stands between the two marks replaced by `made`."""
    before, _, rest = text.partition(marks[0])
    after = rest.partition(marks[1])[2]
    return f"{before}{marks[0]}\n\n{made}\n\n{marks[1]}{after}"


def made() -> dict[Path, str]:
    """Returns {path: up-to-date text} of every file that this program writes."""
    jax.clear_caches()  # an operator in a function that was traced before would not be seen
    for name in mixers.names():  # a module first imported while `called` patches would keep that
        mixers.mixer_class(name)
    rows = {name: described(name) for name in mixers.names()}
    readme = ROOT / "README.md"
    text = between(readme.read_text(), TABLE, table(rows, causal=True))
    text = between(text, WHOLE, table(rows, causal=False))
    return {
        readme: between(text, LINKS, links(rows)),
        ROOT / "docs/mixers.md": page(rows),
        ROOT / "docs/stack.svg": picture(rows),
        **gallery.made(),
    }


def main() -> int:
    stale = {
        path: text for path, text in made().items() if not path.exists() or path.read_text() != text
    }
    for path, text in stale.items():
        if "--check" in sys.argv:
            print(f"{path.relative_to(ROOT)} is not what the code says: run python docs/make.py")
        else:
            path.write_text(text)
    return int("--check" in sys.argv and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
