"""Checks every kernel numerically, forward and backward, against the chunked form.

    python -m kernels_pallas.selfcheck                   all kernels for the device at hand: a table
                                                         to paste into an issue
    python -m kernels_pallas.selfcheck --op=delta_rule   those of one operator
    python -m kernels_pallas.selfcheck --interpret       on a CPU, through the interpreters, at tiny
                                                         sizes (minutes)

The exit code is 1 if a kernel gives wrong numbers or raises an error; a kind of call that a kernel
does not support counts as not run. `dispatch.kernel_check` defines the comparison. Results are
recorded (not with --interpret) for `dispatch.verification`, which otherwise makes the same check
before it chooses a kernel for a call that names no implementation.
"""

import argparse
import platform
import signal
import sys

from kernels_pallas.dispatch import Operator, absent_tpu, devices, kernel_check, verification
from kernels_pallas.ops.causal_conv import api as causal_conv
from kernels_pallas.ops.delta_rule import api as delta_rule
from kernels_pallas.ops.diagonal_scan import api as diagonal_scan
from kernels_pallas.ops.document_sums import api as document_sums
from kernels_pallas.ops.linear_attention import api as linear_attention
from kernels_pallas.ops.softmax_attention import api as softmax_attention

OPERATORS = {
    operator.name: operator
    for operator in (
        linear_attention.OPERATOR,
        delta_rule.OPERATOR,
        diagonal_scan.OPERATOR,
        document_sums.OPERATOR,
        softmax_attention.OPERATOR,
        causal_conv.OPERATOR,
    )
}
HEADING = (
    f"{'operator':18} {'kernel':11} {'case':20} {'dtype':9} {'forward':>8} {'gradient':>8}  "
    f"{'bound':>7} {'seconds':>8}"
)


def checks(operator: Operator, platforms) -> list[tuple[str, str, str]]:
    """Returns (implementation, kind of call, dtype) for each check of an operator's kernels.

    Kernels count if they are for one of the `platforms`, such as "tpu".
    """
    return [
        (implementation.name, kind, dtype)
        for implementation in operator.implementations
        if implementation.platform in platforms
        for kind in (operator.case.kinds if operator.case else ())
        for dtype in _dtypes(operator.case, implementation.name, kind)
    ]


def _dtypes(case, implementation, kind):
    if kind == "complex":
        return ("float32",)
    more = ("float16",) if implementation in case.float16 else ()
    return "bfloat16", "float32", *more


def line(result: kernel_check.CheckResult) -> str:
    """Returns one check's result as a row of the table that `main` prints."""
    call = f"{result.operator:18} {result.implementation:11} {result.kind:20} {result.dtype:9}"
    errors = ("       -" if x is None else f"{x:8.1e}" for x in (result.forward, result.gradient))
    verdict = "ok" if result.problem is None else "not run" if result.refused else "WRONG"
    bound = kernel_check.BOUND[result.dtype]
    text = f"{call} {' '.join(errors)}  {bound:7.0e} {result.seconds:8.1f}  {verdict}"
    return text if result.problem is None else f"{text}: {result.problem}"


def main(arguments=None) -> int:
    """Runs the checks that the command line selects and prints a table; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m kernels_pallas.selfcheck")
    parser.add_argument("--op", choices=OPERATORS, help="one operator; default: all")
    parser.add_argument(
        "--interpret",
        action="store_true",
        help="on a CPU: run the kernels interpreted, at tiny sizes",
    )
    options = parser.parse_args(arguments)
    absent_tpu.pass_over()
    try:
        target = devices.current()
    except RuntimeError as error:  # JAX_PLATFORMS names a platform that is not there
        parser.error(str(error))
    interpret = options.interpret and target.platform == "cpu"
    platforms = ("tpu", "gpu") if interpret else (target.platform,)
    found = {name: x for each in platforms for name, x in verification.versions(each).items()}
    listed = ", ".join(f"{name} {version}" for name, version in found.items())
    print(f"{target.kind} ({target.platform}), {listed}, Python {platform.python_version()}")
    operators = OPERATORS.values() if options.op is None else (OPERATORS[options.op],)
    calls = [(operator, *call) for operator in operators for call in checks(operator, platforms)]
    if not calls:
        print(f"no operator has a kernel for {target.platform}; --interpret runs those of others")
        return 0
    print(HEADING)
    wrong = False
    shape = kernel_check.TINY if interpret else kernel_check.FULL
    for operator, *call in calls:
        with devices.interpreted(interpret):
            result = kernel_check.check(operator, *call, shape=shape)
        print(line(result), flush=True)
        wrong |= result.problem is not None and not result.refused
        if not interpret:
            verification.record(verification.record_key(target, operator.name, *call), result)
    return int(wrong)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `... | head` ends it, quietly
    sys.exit(main())
