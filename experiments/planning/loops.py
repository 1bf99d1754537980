"""How often a loop of a compiled program runs, found by going round with its counters alone.

Compilers leave counters that start anywhere, step by more than one where they unrolled, and compare
as u32 or s32; so the few scalar instructions between a counter and its test are carried out.
"""

import operator
import re

_MOST = 1_000_000
_BINARY = {
    "add": operator.add, "subtract": operator.sub, "multiply": operator.mul, "minimum": min, "maximum": max,
    "and": operator.and_, "or": operator.or_,
}  # fmt: skip
_COMPARE = {
    "LT": operator.lt, "LE": operator.le, "GT": operator.gt, "GE": operator.ge, "EQ": operator.eq, "NE": operator.ne,
}  # fmt: skip
_SAME = {"copy", "bitcast", "convert", "reshape"}


class _Unknown(Exception):
    """The value depends on more than constants and counters."""


def trips(program, loop, computation: str) -> int | None:
    """Rounds of a `while` of this computation, or None where its counters come from elsewhere."""
    condition, body = ((loop.attribute(name) or "").lstrip("%") for name in ("condition", "body"))
    state: dict[int, int] = {}

    def outside(_):
        raise _Unknown

    def entering(index: int) -> int:
        (given,) = loop.operands
        values = program.by_name[computation][given]
        if values.operation != "tuple":
            raise _Unknown
        return _value(program, computation, values.operands[index], outside)

    def now(index: int) -> int:
        if index not in state:
            state[index] = entering(index)
        return state[index]

    def after(index: int) -> int:
        results = program.by_name[body][program.roots[body]]
        if results.operation != "tuple":
            raise _Unknown
        return _value(program, body, results.operands[index], now)

    try:
        for rounds in range(_MOST):
            if not _value(program, condition, program.roots[condition], now):
                return rounds
            known = -1
            while known != len(state):  # a counter may need another one
                known = len(state)
                later = {index: after(index) for index in list(state)}
            state.update(later)
    except _Unknown:
        pass
    return None


def _value(program, computation: str, name: str, element) -> int:
    """Of a scalar instruction. element(index): of the tuple that a loop is given, or of a fusion's
    parameters."""
    instruction = program.by_name[computation][name]
    operation, attributes = instruction.operation, instruction.attributes
    if operation == "constant" and re.fullmatch(r"-?\d+|true|false", attributes):
        return {"true": 1, "false": 0}[attributes] if attributes.isalpha() else int(attributes)
    if operation == "get-tuple-element":
        if program.by_name[computation][instruction.operands[0]].operation == "parameter":
            return element(int(instruction.attribute("index")))
        raise _Unknown
    if operation == "parameter":  # of a fusion
        return element(int(attributes))

    def operand(i: int) -> int:
        return _value(program, computation, instruction.operands[i], element)

    if operation in _SAME:
        return operand(0)
    if operation in _BINARY:
        return _BINARY[operation](operand(0), operand(1))
    if operation == "compare":
        return _COMPARE[instruction.attribute("direction")](operand(0), operand(1))
    if operation in ("fusion", "call"):
        (inner,) = instruction.called
        return _value(program, inner, program.roots[inner], operand)
    raise _Unknown
