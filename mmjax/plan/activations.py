"""What a step keeps from its forward pass until the backward pass has used it."""

import re
from collections.abc import Iterator

from mmjax.plan.hlo import Module, Op, arrays_of

# These hand arrays on as they are, or in another layout.
_PASSED_ON = ("tuple", "bitcast", "copy", "copy-start", "copy-done")


def activation_bytes(module: Module) -> int:
    """HBM bytes of one device that the forward pass makes and the backward pass reads.

    Beside activations these are the weights as they were cast for the forward pass. They are not
    all alive at once with all else that is temporary, but at the turn between the passes they are.
    """
    ops = {op.name: op for op in module.computations[module.entry]}
    kept = {
        made.name: made for op in ops.values() if _is_backward(op) for made in _sources(op, ops)
    }
    return sum(array.bytes for op in kept.values() for array in arrays_of(op.shape) if array.in_hbm)


def _sources(op: Op, ops: dict[str, Op]) -> Iterator[Op]:
    """The ops of the forward pass whose arrays this op gets, whatever hands them on."""
    ahead, seen = list(op.operands), set[str]()
    while ahead:
        name = ahead.pop()
        if name in seen or name not in ops:
            continue
        seen.add(name)
        source = ops[name]
        if source.opcode in _PASSED_ON:
            ahead += source.operands
        elif source.opcode == "get-tuple-element":  # one of the arrays that a loop ends with
            if all(name in ops and _is_forward(ops[name]) for name in source.operands):
                yield source
        elif _is_forward(source):
            yield source


def _is_forward(op: Op) -> bool:
    name = _name(op)
    return "jvp(" in name and "transpose(" not in name


def _is_backward(op: Op) -> bool:
    return "transpose(" in _name(op)


def _name(op: Op) -> str:
    found = re.search(r'op_name="([^"]*)"', op.attributes)
    return found[1] if found else ""
