"""Coverage-guided fuzzing of what parses a file, by atheris: `python tools/fuzz_parsers.py csv 180`.

The corpus starts from the parser's small valid files and is kept in runs/fuzz/corpus. A file that gives anything but a
valid value or a ValueError naming it ends the run, and is told as a line for REGRESSIONS of tests/samples/fuzzing.py.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CORPUS = ROOT / "runs/fuzz/corpus"
FAILED = "a line for REGRESSIONS: "
MOST_MEGABYTES, MOST_SECONDS, LONGEST = 3072, 20, 8192
PACKINGS = {"idx images": ("", "gzip"), "idx labels": ("", "gzip"), "checkpoint": ("", "pickle")}


def run(name: str, seconds: int) -> tuple[int, str]:
    """How many files were read, and the line for the one that failed, if any did."""
    done = subprocess.run([sys.executable, __file__, name, str(seconds)], capture_output=True, text=True)
    counts = re.findall(r"^#(\d+)\t", done.stderr, re.MULTILINE)
    lines = [line.removeprefix(FAILED) for line in done.stdout.splitlines() if line.startswith(FAILED)]
    if not lines and done.returncode:
        lines = [f"# {name}: atheris ended with {done.returncode}: {done.stderr[-2000:]!r}"]
    return int(counts[-1]) if counts else 0, "".join(lines[:1])


def guide(name: str, seconds: str) -> None:
    """In this process, which atheris ends."""
    import atheris

    sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
    import numpy  # noqa: F401  # torch's and numpy's own code need not be instrumented
    import torch  # noqa: F401

    with atheris.instrument_imports(
        include=["json", "gzip", "zipfile", "fusedact.data", "fusedact.trainers", "fusedact.tuning"]
    ):
        from samples import fuzzed_files
    from torch import _weights_only_unpickler

    atheris.instrument_func(_weights_only_unpickler.Unpickler.load)
    packings = PACKINGS.get(name, ("",))

    def look(content: bytes) -> None:
        """The first byte chooses how the others are packed, where there is a choice."""
        packed = packings[content[0] % len(packings)] if content else ""
        example = fuzzed_files.File(name, content[len(packings) > 1 :], packed)
        problem = example.problem()
        if problem:
            print(f'{FAILED}    "{name}": {example!r},  # {problem}', flush=True)
            raise AssertionError(problem)

    folder = CORPUS / name.replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    for at, packed in enumerate(packings):
        seeds = fuzzed_files.pickles() if packed == "pickle" else fuzzed_files.PARSERS[name].seeds()
        for number, content in enumerate(seeds):
            (folder / f"seed-{at}-{number}").write_bytes(bytes([at])[: len(packings) > 1] + content)
    limits = [f"-max_total_time={seconds}", f"-rss_limit_mb={MOST_MEGABYTES}", f"-timeout={MOST_SECONDS}"]
    crashes = f"-artifact_prefix={folder.parent}/"
    atheris.Setup([sys.argv[0], *limits, crashes, f"-max_len={LONGEST}", str(folder)], look)
    atheris.Fuzz()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    guide(*sys.argv[1:])
