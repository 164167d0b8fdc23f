"""Reading machine code: registers, instructions, what orders memory, and the loop that does the work."""

import re
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import NamedTuple

import triton


class Assembly(NamedTuple):
    """A kernel as the assembler left it.

    spills: a thread's bytes of stack, and on AMD the vector registers saved there too (a scalar register that
    moves into a lane of a vector register is none). step: the mnemonics of one pass of the loop that does the
    work. events: what orders memory, a letter each.
    """

    registers: int
    spills: int
    mnemonics: list[str]
    step: list[str]
    events: str


# S store, B barrier, L load of a partial, G other load, X other atomic; at the GPU's scope T ticket (acquire and
# release), R arrival at a grid barrier (release), A look at it (acquire).
PTX_EVENTS = re.compile(
    r"""(?P<S>\bst\.global) | (?P<B>\bbar\.sync) | (?P<L>\bld\.global\.cg)
    | (?P<T>\batom\.global\.gpu\.acq_rel\.add\.u32) | (?P<R>\b(?:atom|red)\.global\.gpu\.release\.add\.u(?:32|64))
    | (?P<A>\bld\.global\.gpu\.acquire) | (?P<G>\bld\.global|\bcp\.async\.c[ag]\.shared\.global)
    | (?P<X>\b(?:atom|red)\.)""",
    re.VERBOSE,
)
AMD_EVENTS = re.compile(
    r"""(?P<S>(?:global|buffer)_store) | (?P<B>s_barrier) | (?P<L>(?:global|buffer)_load.*\ sc0\ nt)
    | (?P<T>buffer_wbl2\ sc1\n s_waitcnt\ vmcnt\(0\)\n global_atomic_add\ .*\ sc0\n
        s_waitcnt\ vmcnt\(0\)\n buffer_inv\ sc1\n)
    | (?P<R>buffer_wbl2\ sc1\n s_waitcnt\ vmcnt\(0\)\n global_atomic_add)
    | (?P<A>(?:global_load_dword.*\ sc1|global_atomic_or(?:_x2)?\ .*\ sc0)\n s_waitcnt\ vmcnt\(0\)\n buffer_inv\ sc1\n)
    | (?P<G>(?:global|buffer)_load) | (?P<X>_atomic_)""",
    re.VERBOSE,
)
MNEMONIC = re.compile(r"(?:@!?U?P\w+\s+)?(\w[\w.]*)")  # behind the predicate, where there is one
LOAD = re.compile(r"LDG\b|LDGSTS|(?:global|buffer)_load")
COPY = re.compile(r"UTMALDG")
STORE = re.compile(r"STG\b|(?:global|buffer)_store")
MATRIX = re.compile(r"[A-Z]*MMA\b|v_mfma")
BITS = {"256": 256, "128": 128, "dwordx4": 128, "dwordx3": 96, "64": 64, "dwordx2": 64}
BITS |= {"U16": 16, "ushort": 16, "short": 16, "U8": 8, "S8": 8, "ubyte": 8, "sbyte": 8}


def events(pattern: re.Pattern, text: str) -> str:
    return "".join(match.lastgroup or "" for match in pattern.finditer(text))


def moved_bits(mnemonic: str) -> int:
    """How many a load or a store moves for each thread."""
    return next((BITS[part] for part in re.split(r"[._]", mnemonic) if part in BITS), 32)


def matrix_instructions(mnemonics: Iterable[str]) -> list[str]:
    """What the matrix units are given, without shapes and types."""
    return [match.group() for match in map(MATRIX.match, mnemonics) if match]


# Loops. A statement is a label or an instruction, its predicate included; a block is a list of statements of which
# the first alone is jumped to and the last alone jumps.

LABEL = re.compile(r"\.L\w+")
JUMP = re.compile(r"(?:@\S+ +)?(?:BRA|BRX|CALL)\b|s_c?branch")
END = re.compile(r"BRA `|BRX|EXIT|RET|s_branch|s_endpgm|s_setpc")  # what stands below is not reached from here


def instructions(statements: Iterable[str]) -> list[str]:
    """The mnemonics, without the labels."""
    return [match.group(1) for match in map(MNEMONIC.match, statements) if match]


def blocks_of(statements: list[str]) -> list[list[str]]:
    blocks = [[""]]  # the entry, to which nothing jumps
    for statement in statements:
        above = blocks[-1][-1]
        if LABEL.match(statement) or JUMP.match(above) or END.match(above):
            blocks.append([])
        blocks[-1].append(statement)
    return blocks


def followers(blocks: list[list[str]]) -> Iterator[tuple[int, int]]:
    """(block, block that may come next), by their numbers."""
    labels = map(LABEL.match, (block[0] for block in blocks))
    numbers = {label.group(): number for number, label in enumerate(labels) if label}
    for number, block in enumerate(blocks):
        if JUMP.match(block[-1]):
            yield from ((number, numbers[label]) for label in LABEL.findall(block[-1]))
        if not END.match(block[-1]):
            yield number, number + 1


def reached(neighbours: dict[int, set[int]], start: int, found: set[int]) -> set[int]:
    """What is reached from the start without passing through what is found already, and all that is found."""
    waiting = [start]
    while waiting:
        number = waiting.pop()
        if number not in found:
            found.add(number)
            waiting.extend(neighbours[number])
    return found


def loops(blocks: list[list[str]]) -> list[set[int]]:
    """The numbers of each loop's blocks.

    A loop is what leads to a jump back to its head and cannot be entered but by the head. The text's order says
    nothing of it: assemblers place a wait of the loop behind the kernel's end, and a jump back from there is no loop.
    """
    after: dict[int, set[int]] = defaultdict(set)
    before: dict[int, set[int]] = defaultdict(set)
    for number, follower in followers(blocks):
        after[number].add(follower)
        before[follower].add(number)
    found: dict[int, set[int]] = defaultdict(set)
    for number in reached(after, 0, set()):
        for head in after[number]:
            body = reached(before, number, {head})
            if 0 not in body:
                found[head] |= body
    return list(found.values())


def step(statements: list[str]) -> list[str]:
    """The mnemonics of the innermost loop that has matrix instructions, of several such that with most of them.

    A loop that waits inside it has none and is part of it. Where no loop has any, the longest of the innermost.
    """
    blocks = blocks_of(statements)
    bodies = [
        (body, instructions(chain.from_iterable(blocks[number] for number in sorted(body)))) for body in loops(blocks)
    ]
    bodies = [(body, code) for body, code in bodies if matrix_instructions(code)] or bodies
    innermost = [code for body, code in bodies if not any(other < body for other, _ in bodies)]
    return max(innermost, key=lambda code: (len(matrix_instructions(code)), len(code)), default=[])


# What the compilers leave

SASS = re.compile(r"^(?:\s+/\*[0-9a-f]+\*/\s+(?=[@A-Z])|(?=\.L_x))(.*)", re.MULTILINE)
AMDGCN = re.compile(r"^(?:\t(?!s_nop)(?=[a-z])|(?=\.LBB))(.*)", re.MULTILINE)


def tool(name: str, *arguments: str) -> str:
    """What that tool, of those in Triton's wheel, prints."""
    path = getattr(triton.knobs.nvidia, name).path
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def read_nvidia(asm) -> Assembly:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(asm["cubin"])
        cubin.flush()
        usage = tool("cuobjdump", "--dump-resource-usage", cubin.name)
        sass = tool("nvdisasm", "-ndf", "-c", cubin.name)
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage).groups())
    statements = SASS.findall(sass)
    return Assembly(
        registers=registers,
        spills=stack + local,
        mnemonics=instructions(statements),
        step=step(statements),
        events=events(PTX_EVENTS, asm["ptx"]),
    )


def read_amd(asm) -> Assembly:
    text = asm["amdgcn"]
    figures = {name: int(value) for name, value in re.findall(r"\.(\w+): +(\d+)$", text, re.MULTILINE)}
    statements = AMDGCN.findall(text)
    return Assembly(
        registers=figures["vgpr_count"],
        spills=figures["vgpr_spill_count"] + figures["private_segment_fixed_size"],
        mnemonics=instructions(statements),
        step=step(statements),
        events=events(AMD_EVENTS, "\n".join(s for s in statements if not LABEL.match(s))),
    )
