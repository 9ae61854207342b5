"""Read a compiled program: kernels, bytes, loops, branches, collectives, scratch memory, time to compile."""

import dataclasses
import math
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax

_BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "f16": 16, "bf16": 16}
_BITS |= {"s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\](\{[^}]*\})?")
_FAST = re.compile(r"T\(.*S\(\d")  # in the layout of an array in a TPU's fast memory: its tiles, then its memory
_JOINED = 'custom_call_target="ConcatBitcast"'  # puts the parts of a prefetched array together, without a copy
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_CALLED = re.compile(r"(?:body|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
# Instructions that launch nothing: names of buffers, and the second halves of asynchronous operations.
_NOTHING = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id"}
_NOTHING |= {"opt-barrier", "add-dependency", "get-dimension-size"}
_COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter", "ragged-all-to-all")


@dataclasses.dataclass
class Kernel:
    """One launch.

    Attributes:
      op: the operation, such as "fusion" or "all-reduce".
      name: name of the instruction.
      read: bytes of its operands in the device's main memory, which is more than it reads if it slices them.
      written: bytes of its result in main memory.
      size: bytes of its result in any memory: a TPU has a fast memory in addition to the main memory.
    """

    op: str
    name: str
    read: int
    written: int
    size: int

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        return self.read + self.written


@dataclasses.dataclass
class Block:
    """A sequence of launches, loops and conditionals.

    Attributes:
      kernels: kernels in the order of the program.
      loops: (trip count or None, body) of each loop.
      conditionals: branches of each conditional.
    """

    kernels: list[Kernel] = dataclasses.field(default_factory=list)
    loops: list[tuple[int | None, "Block"]] = dataclasses.field(default_factory=list)
    conditionals: list[list["Block"]] = dataclasses.field(default_factory=list)

    @property
    def moved(self) -> int:
        """Bytes read and written by the kernels, without loops and branches."""
        return sum(kernel.moved for kernel in self.kernels)

    @property
    def launches(self) -> int:
        """The number of kernels, loops and conditionals, without their contents."""
        return len(self.kernels)

    def blocks(self) -> Iterator["Block"]:
        """Yield this block and all blocks within it."""
        yield self
        for _, body in self.loops:
            yield from body.blocks()
        for branches in self.conditionals:
            for branch in branches:
                yield from branch.blocks()

    def every_kernel(self) -> Iterator[Kernel]:
        """Yield the kernels of this block and of all blocks within it."""
        for block in self.blocks():
            yield from block.kernels

    def least(self) -> tuple[int, int]:
        """Return launches and bytes of a run in which each conditional takes its cheapest branch.

        A loop whose trip count depends on data, such as a selection that is due only at some steps, does not run.
        """
        launches, moved = self.launches, self.moved
        for trips, body in self.loops:
            inner = body.least()
            launches, moved = launches + (trips or 0) * inner[0], moved + (trips or 0) * inner[1]
        for branches in self.conditionals:
            inner = min((branch.least() for branch in branches), key=lambda cost: cost[::-1])
            launches, moved = launches + inner[0], moved + inner[1]
        return launches, moved


@dataclasses.dataclass
class Program:
    """A compiled program.

    Attributes:
      entry: launches of the program.
      arguments: bytes of the arguments, on one device.
      outputs: bytes of the outputs, without those that reuse the memory of arguments.
      scratch: bytes in addition to arguments and outputs.
      busy: compile time in seconds of processor time, which depends little on other programs.
      text: the compiled program.
    """

    entry: Block
    arguments: int
    outputs: int
    scratch: int
    busy: float
    text: str

    def collectives(self) -> list[Kernel]:
        """Return every collective of the program."""
        return [kernel for kernel in self.entry.every_kernel() if kernel.op.startswith(_COLLECTIVES)]

    def gathers(self) -> list[Kernel]:
        """Return every gather of the program, also within a fusion."""
        return [
            Kernel("gather", name, 0, _size(result), _size(result, fast=True))
            for name, result, op, _ in _instructions(self.text)
            if op == "gather"
        ]


def compiled(function: Callable[..., Any], *arguments: Any, **options: Any) -> Program:
    """Compile for the devices of the described arguments; ``options`` are those of ``jax.jit``."""
    lowered = jax.jit(function, **options).lower(*arguments)
    started = sum(os.times()[:4])  # of this process and, because the GPU compiler runs ptxas, of its children
    found = lowered.compile()
    busy = sum(os.times()[:4]) - started
    memory, text = found.memory_analysis(), found.as_text()
    return Program(
        read(text),
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes - memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        busy,
        text,
    )


def read(text: str) -> Block:
    """Parse the launches of a program from its text.

    >>> program = '''
    ... ENTRY %main (x: f32[4]) -> f32[4] {
    ...   %x = f32[4]{0} parameter(0)
    ...   ROOT %y = f32[4]{0} negate(%x)
    ... }'''
    >>> read(program).kernels
    [Kernel(op='negate', name='y', read=16, written=16, size=16)]
    """
    lines: dict[str, list[str]] = {}
    name = entry = ""
    for line in text.splitlines():
        if head := _HEAD.match(line):
            name = head[2]
            entry = name if head[1] else entry
            lines[name] = []
        elif name:
            lines[name].append(line)
    return _block(lines, entry)


def _block(lines: dict[str, list[str]], name: str) -> Block:
    block, sizes = Block(), {}
    for own, result, op, rest in _instructions("\n".join(lines.get(name, []))):
        sizes[own] = _size(result)
        operands, attributes = _split(rest)
        if op in _NOTHING or op.endswith(("-done", "-update")) or _JOINED in attributes:
            continue
        if op == "while":
            condition = re.search(r"condition=%?([\w.\-]+)", attributes)
            body = re.search(r"body=%?([\w.\-]+)", attributes)
            trips = _trips(attributes, lines.get(condition[1] if condition else "", []))
            block.loops.append((trips, _block(lines, body[1] if body else "")))
        elif op == "conditional":
            listed = re.search(r"branch_computations=\{([^}]*)\}", attributes)
            names = re.findall(r"[\w.\-]+", listed[1]) if listed else _CALLED.findall(attributes)
            block.conditionals.append([_block(lines, branch) for branch in names])
        elif op == "call":
            for called in _CALLED.findall(attributes):
                inner = _block(lines, called)
                block.kernels += inner.kernels
                block.loops += inner.loops
                block.conditionals += inner.conditionals
        else:
            reads = sum(sizes.get(operand, 0) for operand in re.findall(r"%([\w.\-]+)", operands))
            moves = op in ("copy-start", "slice-start")
            written = _copied(op, result) if moves else result  # the result also has the operand and a semaphore
            size = _size(written, fast=True)
            block.kernels.append(Kernel(op, own, min(reads, size) if moves else reads, _size(written), size))
    return block


def _trips(attributes: str, condition: list[str]) -> int | None:
    """Return the trip count of a loop: as annotated by the compiler, or the bound of a condition that counts up."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', attributes):
        return int(known[1])
    found = "\n".join(condition)
    bounds = re.findall(r"= s32\[\][^ ]* constant\((\d+)\)", found)
    counting = [op for _, _, op, _ in _instructions(found) if op not in _NOTHING]
    return int(bounds[0]) if len(bounds) == 1 and counting in (["compare"], ["fusion"], ["compare", "copy"]) else None


def _instructions(text: str) -> Iterator[tuple[str, str, str, str]]:
    for line in text.splitlines():
        if match := _LINE.match(line):
            yield match[1], match[2], match[3], match[4]


def _split(rest: str) -> tuple[str, str]:
    """Split into the operands, up to their closing parenthesis, and the attributes after it."""
    depth = 1
    for end, char in enumerate(rest):
        depth += (char == "(") - (char == ")")
        if not depth:
            return rest[:end], rest[end:]
    return rest, ""


def _copied(op: str, result: str) -> str:
    """Return the array that an asynchronous copy writes: the first of (copy, operand), or the one after ((operands),.

    >>> _copied("slice-start", "((f32[8]{0:T(128)}), f32[2]{0:T(128)S(1)}, s32[]{:S(2)})")
    'f32[2]{0:T(128)S(1)}'
    """
    arrays = [match[0] for match in _ARRAY.finditer(result)]
    return arrays[0 if op == "copy-start" else -2]


def _size(result: str, *, fast: bool = False) -> int:
    """Return the bytes of arrays as written in a program; those in a TPU's fast memory count only with ``fast``.

    >>> _size("(f32[2,3]{1,0}, pred[], f32[8]{0:T(128)S(1)})")
    25
    """
    total = 0
    for match in _ARRAY.finditer(result):
        dtype, dims, layout = match.groups()
        if not fast and layout and _FAST.search(layout):
            continue
        count = math.prod(map(int, filter(None, dims.split(","))))
        total += -(-count * _BITS.get(dtype, 0) // 8)
    return total
