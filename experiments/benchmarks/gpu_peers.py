"""Compares our Triton kernels with flash-linear-attention and mlstm_kernels, for `experiments.bench
gpu_peers`.

TFLA's mLSTM with sigmoid gates and no normaliser is linear attention with one decay per head and
token: its forget gate's input is the logit of our decay, its input gate is open.
"""

import dataclasses
import json
from pathlib import Path

import jax

from experiments.benchmarks import machine, operators, report, sweep, timing
from experiments.benchmarks.entries import BenchmarkEntry
from experiments.benchmarks.peers import Comparison, torch_entry

TOKENS = 65536
LENGTHS = (2048, 4096, 8192, 16384, 32768, 65536)
SHAPE = operators.Shape(H=16, K=128, V=128)
OPEN = 30.0  # an input gate whose sigmoid is 1 in float32
# NVIDIA's data sheets: dense bfloat16 FLOP/s, bytes/s.
ROOFLINES = {"H100": (989e12, 3.35e12), "H200": (989e12, 4.8e12), "A100": (312e12, 2.04e12)}
CHUNK = 64  # of the FLOP count
LIMIT = 0.67  # the most that our forward+backward may take, as a share of the peer's


def _simple_gla(x):
    from fla.ops.simple_gla import chunk_simple_gla

    return chunk_simple_gla(**_qkv(x), g=x["log_decay"])


def _gla(x):
    from fla.ops.gla import chunk_gla

    return chunk_gla(**_qkv(x), g=x["log_decay"])


def _delta_net(x):
    from fla.ops.delta_rule import chunk_delta_rule

    return chunk_delta_rule(**_qkv(x), beta=x["beta"].to(x["q"].dtype))


def _gated_delta_net(x):
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return chunk_gated_delta_rule(**_qkv(x), g=x["log_decay"], beta=x["beta"].to(x["q"].dtype))


def _qkv(x):
    states = {"initial_state": x["initial_state"], "output_final_state": True}
    return {name: x[name] for name in "qkv"} | states


def _mlstm(x):
    import torch
    from mlstm_kernels.torch import get_mlstm_kernel

    kernel = get_mlstm_kernel("chunkwise--triton_xl_chunk_siging")
    g_BHT = x["log_decay"].transpose(1, 2)
    q, k, v = (x[name].transpose(1, 2).contiguous() for name in "qkv")
    o_BHTV, (final_BHKV, *_) = kernel(
        q=q,
        k=k,
        v=v,
        i=torch.full_like(g_BHT, OPEN),
        f=g_BHT - torch.log(-torch.expm1(g_BHT)),
        c_initial=x["initial_state"],
        n_initial=torch.zeros_like(x["initial_state"][..., 0]),
        normalize=False,
        return_last_states=True,
    )
    return o_BHTV.transpose(1, 2), final_BHKV


COMPARISONS = (
    Comparison("Mamba-2 SSD", "linear_attention", "per_token", "fla", _simple_gla, LIMIT),
    Comparison("GLA", "linear_attention", "per_channel", "fla", _gla, LIMIT),
    Comparison("DeltaNet", "delta_rule", "none", "fla", _delta_net, LIMIT),
    Comparison("Gated DeltaNet", "delta_rule", "per_token", "fla", _gated_delta_net, LIMIT),
    Comparison("mLSTM", "linear_attention", "per_token", "mlstm_kernels", _mlstm, 1.0),
)


def peer_entry(comparison: Comparison) -> BenchmarkEntry:
    """Returns the benchmark entry of a peer library's call, in torch on the GPU."""
    return torch_entry(comparison, "cuda", "pip install -e '.[peers]'")


def roofline(op: str, variant: str, B: int, T: int, backward: bool) -> tuple[float, float]:
    """Returns (FLOPs, bytes moved) of one operator call, for a bound on its time at the GPU's peak.

    FLOPs are of the matrix products of a chunked form, in chunks of CHUNK tokens. Bytes are
    bfloat16 inputs (float32 gates) read once and results written once. backward: with the backward
    pass.
    """
    K, V, tokens = SHAPE.K, SHAPE.V, B * T * SHAPE.H
    flops = 2 * (2 * K * V + CHUNK / 2 * (K + V))
    if op == "delta_rule":
        flops += 2 * (K * V + CHUNK / 2 * (K + V))
    gate = {"none": 0, "per_token": 4, "per_channel": 4 * K}[variant] + 4 * (op == "delta_rule")
    moved = 2 * (2 * K + 2 * V) + gate
    if backward:  # inputs and the output's cotangent read again, a gradient of each input written
        moved += 2 * (2 * K + 2 * V) + gate + 2 * (2 * K + V) + gate
        flops *= 3.5  # forward, states again, and two products for each one forward
    return tokens * flops, tokens * moved


def measure(comparison: Comparison, lengths, rounds: int, log=print) -> list[dict]:
    """Times our Triton kernel, the peer and cuDNN attention in turn; returns a row per T and pass.

    lengths: the values of T. Ours and the peer's results are checked first; wrong ones are not
      timed.
    """
    case = operators.CASES[comparison.op]
    ours = case.entry("triton", comparison.variant, SHAPE)
    settings = sweep.Settings(shape=SHAPE, dtype="bfloat16")
    entries = [ours, peer_entry(comparison)]
    checks, sound = sweep.check(case, comparison.variant, settings, entries, log)
    notes = {check["implementation"]: sweep.verdict(check) for check in checks}
    softmax = operators.CASES["softmax_attention"]
    attention = softmax.entry("cudnn", "full", SHAPE)
    rows = []
    for T in lengths:
        shape = dataclasses.replace(SHAPE, B=max(1, TOKENS // T))
        for backward in (False, True):
            problem = operators.make_problem(case, shape, T, comparison.variant, "bfloat16")
            calls = {entry.name: entry.prepare(problem, backward).run for entry in sound}
            problem = operators.make_problem(softmax, shape, T, "full", "bfloat16")
            try:
                calls["cudnn attention"] = attention.prepare(problem, backward).run
            except NotImplementedError as reason:
                notes["cudnn attention"] = f"not run: {reason}"
            timings = timing.interleaved(calls, rounds, 10.0)
            row = _row(comparison, T, backward) | {"notes": notes}
            row |= {"ms": {name: 1e3 * t.median for name, t in timings.items()}}
            row |= {"quartiles": {n: (1e3 * t.lower, 1e3 * t.upper) for n, t in timings.items()}}
            rows.append(row)
            log(report.text_table([line(row)]))
    return rows


def _row(comparison: Comparison, T: int, backward: bool) -> dict:
    B = max(1, TOKENS // T)
    flops, moved = roofline(comparison.op, comparison.variant, B, T, backward)
    return {
        "comparison": comparison.name,
        "peer": comparison.package,
        "T": T,
        "B": B,
        "pass": "forward+backward" if backward else "forward",
        "limit": comparison.limit if backward else None,
        "flops": flops,
        "bytes": moved,
    }


def not_run(comparison: Comparison, lengths) -> list[dict]:
    """Returns the rows of `measure` without times, for a machine that has no GPU."""
    return [_row(comparison, T, backward) for T in lengths for backward in (False, True)]


def line(row: dict) -> dict:
    """Returns one measurement as a row of the printed table.

    "of roofline": the least time that the FLOPs and bytes need at the GPU's peak, over our time.
    """
    ms = row.get("ms", {})
    ours, peer = ms.get("triton"), ms.get(row["peer"])
    compute, bandwidth = _peak()
    bound = max(row["flops"] / compute, row["bytes"] / bandwidth) * 1e3 if compute else None
    return {
        "": row["comparison"],
        "B": row["B"],
        "T": row["T"],
        "pass": row["pass"],
        "ours ms": ours or "not run",
        "peer ms": peer or "not run",
        "cuDNN attention ms": ms.get("cudnn attention") or "not run",
        "ours/peer": ours / peer if ours and peer else None,
        "at most": row["limit"],
        "GFLOP": row["flops"] / 1e9,
        "MB": row["bytes"] / 1e6,
        "of roofline": bound / ours if bound and ours else None,
    }


def _peak() -> tuple[float | None, float | None]:
    kind = jax.devices()[0].device_kind
    return next((peak for name, peak in ROOFLINES.items() if name in kind), (None, None))


def crossings(rows: list[dict]) -> list[str]:
    """Returns a line per comparison and pass: from which T our kernel beats cuDNN attention."""
    found = []
    for name, which in sorted({(row["comparison"], row["pass"]) for row in rows}):
        faster = {
            row["T"]: row["ms"]["triton"] < row["ms"]["cudnn attention"]
            for row in rows
            if (row["comparison"], row["pass"]) == (name, which)
            and {"triton", "cudnn attention"} <= row.get("ms", {}).keys()
        }
        last_slower = max((T for T in faster if not faster[T]), default=0)
        onward = [T for T in faster if last_slower < T]
        where = f"from T {min(onward)} on" if onward else "at no length, to the longest"
        where = where if faster else "at no length: not measured"
        found.append(f"- {name}, {which}: faster than cuDNN attention {where}")
    return found


def save(folder: Path, rows: list[dict]) -> None:
    """Writes the measurements, with the hardware and versions, to gpu_peers.json and gpu_peers.md.

    Raises:
      ValueError: nothing was measured, and the folder already holds measurements.
    """
    path = folder / "gpu_peers.json"
    held = json.loads(path.read_text())["rows"] if path.exists() else []
    measured, held_measured = (any("ms" in row for row in those) for those in (rows, held))
    if not measured and held_measured:
        raise ValueError(f"no GPU is at hand, and {path} holds measurements: they stay as they are")
    folder.mkdir(parents=True, exist_ok=True)
    environment = machine.environment()
    saved = {"environment": environment, "rows": rows}
    path.write_text(json.dumps(saved, indent=1) + "\n")
    where = f"On {jax.devices()[0].device_kind}: {machine.describe(environment)}"
    if not measured:
        where = "Not run: no GPU was at hand."
    parts = [
        "# Triton kernels against their peers",
        where,
        f"Written by `python -m experiments.bench gpu_peers`: {TOKENS} tokens in all, {SHAPE.H} "
        f"heads, K = V = {SHAPE.K}, bfloat16; medians in one run. GFLOP counts chunks of {CHUNK}; "
        "MB reads inputs and writes results once.",
        report.markdown_table([line(row) for row in rows]),
        "\n".join(crossings(rows)),
    ]
    (folder / "gpu_peers.md").write_text("\n\n".join(parts) + "\n")
