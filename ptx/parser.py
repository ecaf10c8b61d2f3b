"""PTX text to a program: its parameters, its registers, and blocks of instructions.

    program = parse(compiled_kernel.asm["ptx"])

A block ends at a branch, a return or a barrier, so threads that are at the same block execute the same instructions.
"""

import os
import re
from dataclasses import dataclass

from .formats import DTYPES, WIDTHS, PtxError

ENDS_A_BLOCK = ("bra", "ret", "exit", "bar", "barrier")
STATEMENT = re.compile(r"(?:@(?P<negated>!?)(?P<guard>%\w+)\s+)?(?P<words>[\w.:]+)\s*(?P<operands>.*)$", re.S)
OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*")

# A register or constant, several of them in braces, or an address in brackets as (base, offset in bytes).
Operand = str | list[str] | tuple[str, int]


@dataclass(frozen=True)
class Instruction:
    """One statement, `@!%p3 ld.global.v4.b32 {...}, [...]`, and the line of Python that it was compiled from."""

    text: str
    source_line: str
    guard: str | None
    negated: bool
    words: tuple[str, ...]
    operands: tuple[Operand, ...]

    @property
    def name(self) -> str:
        return self.words[0]

    def __str__(self) -> str:
        return f"{self.source_line} {self.text}"

    def unknown(self) -> PtxError:
        """What to raise where this instruction is not covered."""
        return PtxError(f"{self} is not known to this interpreter")


@dataclass(frozen=True)
class Program:
    """An entry function."""

    name: str
    threads: int
    parameters: list[tuple[str, str]]  # (name, type)
    registers: dict[str, type]  # NumPy type by the letters a name begins with
    blocks: list[list[Instruction]]
    labels: dict[str, int]  # -> number of a block

    def register_type(self, name: str) -> type:
        return self.registers[re.match(r"%[a-z]+", name)[0]]


def parse(text: str) -> Program:
    """The first entry function of a PTX module."""
    head = re.search(r"\.visible \.entry (\w+)\(([^)]*)\)", text)
    if head is None:
        raise PtxError("the PTX has no entry function")
    parameters = re.findall(r"\.param \.(\w+)[^,\n]*?(\w+)\s*(?:,|\n|$)", head[2])
    body = text[head.end() :]
    threads = re.search(r"\.(?:reqntid|maxntid) (\d+)", body)
    registers = {prefix: DTYPES[kind] for kind, prefix in re.findall(r"\.reg \.(\w+)\s+(%\w*?)<\d+>", body)}
    blocks, labels = _blocks(body, dict(re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', text)))
    names_and_types = [(name, kind) for kind, name in parameters]
    return Program(head[1], int(threads[1]), names_and_types, registers, blocks, labels)


def _blocks(body: str, files: dict[str, str]) -> tuple[list[list[Instruction]], dict[str, int]]:
    blocks: list[list[Instruction]] = [[]]
    labels: dict[str, int] = {}
    source_line = "?"
    for line in body.split("\n"):
        line = line.split("//")[0].strip()
        if line.startswith("}"):
            break
        if line.startswith(".loc"):
            file, row = line.split()[1:3]
            source_line = f"{os.path.basename(files.get(file, '?'))}:{row}"
        elif line.endswith(":"):
            if blocks[-1]:
                blocks.append([])
            labels[line[:-1]] = len(blocks) - 1
        elif line and line[0] not in ".({":
            for statement in filter(None, map(str.strip, line.split(";"))):
                blocks[-1].append(_instruction(statement, source_line))
                if blocks[-1][-1].name in ENDS_A_BLOCK:
                    blocks.append([])
    return blocks, labels


def _instruction(text: str, source_line: str) -> Instruction:
    match = STATEMENT.match(text)
    operands = tuple(map(_operand, OPERAND.findall(match["operands"])))
    words = tuple(re.split(r"\.|::", match["words"]))
    return Instruction(re.sub(r"\s+", " ", text), source_line, match["guard"], bool(match["negated"]), words, operands)


def _operand(text: str) -> Operand:
    if text[0] == "{":
        return [part.strip() for part in text[1:-1].split(",")]
    if text[0] == "[":
        base, _, offset = text[1:-1].replace(" ", "").partition("+")
        return base, int(offset or "0", 0)
    return text.strip()


@dataclass(frozen=True)
class Access:
    """What a load, store or atomic touches: `count` registers of `kind` each, in one space."""

    space: str
    kind: str
    count: int

    @property
    def size(self) -> int:
        return self.count * WIDTHS[self.kind]


def access_of(instruction: Instruction) -> Access:
    """The access of an ld, st, atom or red; refuses spaces that are not modelled (local, generic)."""
    words = instruction.words
    space = next((word for word in words if word in ("global", "shared", "param")), None)
    if space is None:
        raise instruction.unknown()
    kind = next(word for word in reversed(words) if word in DTYPES)
    return Access(space, kind, next((int(word[1:]) for word in words if word in ("v2", "v4", "v8")), 1))


def smallest_accesses(program: Program) -> dict[str, int]:
    """Bytes of the smallest access to global and to shared memory: the unit in which races are looked for."""
    smallest = {"global": 16, "shared": 16}
    for instruction in (i for block in program.blocks for i in block):
        if instruction.name in ("ld", "st", "atom", "red"):
            access = access_of(instruction)
            if access.space in smallest:
                smallest[access.space] = min(smallest[access.space], access.size)
        elif instruction.name == "cp" and len(instruction.operands) > 1:
            smallest = {space: min(size, int(instruction.operands[2], 0)) for space, size in smallest.items()}
    return smallest
