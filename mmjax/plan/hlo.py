"""The TPU compiler's optimised program, read from its text.

`compiled.as_text()` is a list of computations, each a list of ops; the entry calls the others, loop
bodies among them.
"""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

Part = tuple[str, ...]  # named scopes, as ('image', 'attention', 'core')

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "collective-permute",
    "all-to-all",
    "ragged-all-to-all",
)
PHASES = ("image", "text", "fusion")  # a pass of the model, whichever objective asked for it first

_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_OP = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"(?<=[\])}]) ([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+(?:e\d+m\d+\w*)?)\[([\d,]*)\](\{[^}]*\})?")
_ESTIMATE = re.compile(r'"estimated_cycles":"(\d+)"')
_SCOPE = re.compile(r'op_name="([^"]*)"')
_CALLED = re.compile(r"(?:to_apply|calls|called_computations)=\{?%?([\w.\-]+)")
# What jax writes between the named scopes: its own loops, calls and transformations.
_NO_SCOPE = re.compile(
    r"while|body|cond|closed_call|checkpoint|rematted_computation|shard_map|pallas_call|"
    r"branch_\d+_fun|custom_[jv]vp_call\w*|.*->.*|"
)


@dataclass(frozen=True)
class Op:
    """A line of a computation."""

    name: str
    opcode: str
    shape: str  # as text, layouts included
    operands: tuple[str, ...]
    attributes: str  # the rest of the line

    @property
    def estimate(self) -> int | None:
        """The cycles the compiler notes, if it does."""
        found = _ESTIMATE.search(self.attributes)
        return int(found[1]) if found else None

    @property
    def collective(self) -> str | None:
        """Which collective starts here, if one does."""
        kind = self.opcode.removesuffix("-start")
        return kind if kind in COLLECTIVES else None

    @property
    def is_custom_kernel(self) -> bool:
        """Whether this is a kernel that somebody wrote, which the compiler cannot see into."""
        return self.opcode == "custom-call" and 'target="tpu_custom_call"' in self.attributes

    @property
    def is_allocation(self) -> bool:
        """Whether this only sets memory aside."""
        return self.opcode == "custom-call" and 'target="AllocateBuffer"' in self.attributes

    @property
    def parameter_number(self) -> int | None:
        """Which operand of the fusion around it this is, if it is one."""
        found = re.match(r"(\d+)\)", self.attributes) if self.opcode == "parameter" else None
        return int(found[1]) if found else None

    def called(self) -> list[str]:
        """The computations that a call, a fusion or a conditional names."""
        names = _CALLED.findall(self.attributes)
        names += re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", self.attributes)
        for group in re.findall(r"branch_computations=\{([^}]*)\}", self.attributes):
            names += [name.strip().lstrip("%") for name in group.split(",")]
        return names


@dataclass(frozen=True)
class Module:
    """A compiled program: ops by computation, and the name of the first computation."""

    computations: Mapping[str, list[Op]]
    entry: str

    @classmethod
    def parse(cls, text: str) -> "Module":
        """The program that `compiled.as_text()` writes."""
        computations: dict[str, list[Op]] = {}
        entry, ops = "", None
        for line in text.splitlines():
            if line.startswith(" "):
                if ops is not None and (op := _parse_op(line)):
                    ops.append(op)
            elif header := _HEADER.match(line):
                ops = computations.setdefault(header[2], [])
                entry = header[2] if header[1] else entry
            else:
                ops = None
        return cls(computations, entry)

    @functools.cached_property
    def ops(self) -> dict[str, Op]:
        """Every op by its name, which no other has."""
        return {op.name: op for ops in self.computations.values() for op in ops}

    def trip_count(self, loop: Op) -> int | None:
        """How often a `while` turns, or None where its condition does not compare with a number.

        A loop of ours counts from 0 in ones up to the number that its condition holds.
        """
        if known := re.search(r"known_trip_count\D*(\d+)", loop.attributes):
            return int(known[1])
        condition = self.computations.get(attribute_of(loop, "condition"), [])
        numbers = {
            op.name: int(value[1])
            for op in condition
            if op.opcode == "constant" and (value := re.match(r"(\d+)\)", op.attributes))
        }
        compared = [
            numbers[name]
            for op in condition
            if op.opcode in ("compare", "fusion")
            for name in op.operands
            if name in numbers
        ]
        return compared[0] if len(compared) == 1 else None


def part_of(op: Op) -> Part:
    """The named scopes that an op was traced in; () where the compiler made it."""
    found = _SCOPE.search(op.attributes)
    if found is None:
        return ()
    path, left = found[1], 1
    while left:  # transpose(jvp(image)) is image, and jit(…) a function that jax calls
        path, left = re.subn(r"(\w+)\(([^()]*)\)", _unwrapped, path)
    names = [name for name in path.split("/")[:-1] if not _NO_SCOPE.fullmatch(name)]
    phases = [i for i, name in enumerate(names) if name in PHASES]
    return tuple(names[phases[-1] :] if phases else names)


def _unwrapped(call: re.Match[str]) -> str:
    return "" if call[1].endswith("jit") else call[2]


@dataclass(frozen=True)
class ArrayShape:
    """An array in a shape's text."""

    sides: tuple[int, ...]
    bits: int  # of an element
    in_hbm: bool  # and not in on-chip memory

    @property
    def bytes(self) -> int:
        """How many the elements take."""
        return (prod(self.sides) * self.bits + 7) // 8


def arrays_of(shape: str) -> list[ArrayShape]:
    """The arrays of a shape, those of a tuple one after the other."""
    return [
        ArrayShape(
            sides=tuple(int(side) for side in sides.split(",") if side),
            bits=8 if kind == "pred" else int(re.sub(r"\D*(\d+).*", r"\1", kind)),
            in_hbm="S(1)" not in layout,
        )
        for kind, sides, layout in _ARRAY.findall(shape)
    ]


def _parse_op(line: str) -> Op | None:
    found = _OP.match(line)
    opcode = _OPCODE.search(found[2]) if found else None
    if not found or not opcode:
        return None
    rest = found[2][opcode.end() :]
    operands, attributes = (rest, "") if ")" not in rest else rest.split(")", 1)
    if opcode[1] in ("constant", "parameter"):
        attributes = rest
    return Op(
        name=found[1],
        opcode=opcode[1],
        shape=found[2][: opcode.start()],
        operands=tuple(re.findall(r"%([\w.\-]+)", operands)),
        attributes=attributes,
    )


def attribute_of(op: Op, name: str) -> str:
    """The name or number that an op has under `name=`; '' where it has none."""
    found = re.search(rf"\b{name}=%?([\w.\-]+)", op.attributes)
    return found[1] if found else ""
