"""Bytes that an op moves to and from a device's HBM.

Of an array that an op takes a slice of, or writes one into in place, only the slice counts: what
the turns of a loop leave for one another is stacked in one array, and each touches a part of it.
"""

from collections.abc import Sequence

from mmjax.plan.hlo import Module, Op, arrays_of

Part = int | None  # bytes of an array; None: all of it


def traffic(module: Module, op: Op) -> int:
    """Bytes that one run of an op reads and writes; what lies in on-chip memory is not counted."""
    if op.is_allocation:
        return 0
    written = _in_hbm(op.shape, _written(module, op))
    read = sum(
        _in_hbm(module.ops[name].shape, [_read(module, op, place)])
        for place, name in enumerate(op.operands)
        if name in module.ops
    )
    return written + read


def _in_hbm(shape: str, parts: Sequence[Part]) -> int:
    """Those parts of a shape's arrays that lie in HBM; where the numbers differ, all of them."""
    arrays = arrays_of(shape)
    if len(parts) != len(arrays):
        parts = [None] * len(arrays)
    return sum(
        array.bytes if part is None else min(part, array.bytes)
        for array, part in zip(arrays, parts, strict=True)
        if array.in_hbm
    )


def _read(module: Module, op: Op, place: int) -> Part:
    """How much an op reads of its operand at `place`."""
    if place == 0 and op.opcode in ("dynamic-slice", "slice"):
        return _size(op)
    if place == 0 and op.opcode == "dynamic-update-slice":
        return 0
    if op.opcode != "fusion":
        return None
    parameters = [inner for inner in _inside(module, op) if inner.parameter_number == place]
    return _used(module, _inside(module, op), parameters[0]) if parameters else None


def _used(module: Module, ops: Sequence[Op], source: Op) -> Part:
    """How much of what `source` gives the other ops of a computation use."""
    total = 0
    for op in ops:
        for place, name in enumerate(op.operands):
            if name == source.name:
                bitcast = op.opcode == "bitcast"
                part = _used(module, ops, op) if bitcast else _read(module, op, place)
                if part is None:
                    return None
                total += part
    return total if source is not ops[-1] else None


def _written(module: Module, op: Op) -> list[Part]:
    """How much an op writes of each array of its result."""
    if op.opcode == "dynamic-update-slice":
        return [_size(module.ops[op.operands[1]])]
    if op.opcode == "bitcast" and op.operands[0] in module.ops:
        return _written(module, module.ops[op.operands[0]])
    if op.opcode == "fusion" and (ops := _inside(module, op)):
        root = ops[-1]
        results = root.operands if root.opcode == "tuple" else [root.name]
        return [part for name in results for part in _written(module, module.ops[name])]
    return [None] * len(arrays_of(op.shape))


def _inside(module: Module, fusion: Op) -> list[Op]:
    """The ops of a fusion; its result is the last."""
    return [inner for name in fusion.called() for inner in module.computations.get(name, [])]


def _size(op: Op) -> int:
    return sum(array.bytes for array in arrays_of(op.shape))
