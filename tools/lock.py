"""Writes the hashes of what constraints.txt and constraints-oldest.txt pin, which `make` installs with pip's check.

`make lock` after any change of a pin. Of each version the hashes of all its files stand there, for every platform.
torch's do not: its builds for a CPU, CUDA and ROCm are files of several places under one version, so it is pinned only.
Triton's wheels are for Linux alone. uv asks the package index that it is set up for; it is not part of the environment.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PINS = {"constraints.txt": "hashes.txt", "constraints-oldest.txt": "hashes-oldest.txt"}
UNHASHED = {"torch"}
LINUX = {"triton"}
HEADER = "# By `make lock`, from {}: pip checks each file against these. Not by hand.\n"


def pins(path: Path) -> dict[str, str]:
    """Version by name, names as an index has them."""
    lines = (line for line in path.read_text().splitlines() if not line.startswith("#"))
    pairs = (line.split("==") for line in lines if "==" in line)
    return {name.strip().lower().replace("_", "-").replace(".", "-"): version for name, version in pairs}


def hashed(path: Path) -> str:
    """Those pins, each with the hashes of all files of its version."""
    asked = [f"{name}=={version}" for name, version in pins(path).items() if name not in UNHASHED]
    uv = [sys.executable, "-m", "uv", "pip", "compile", "-", "--no-deps", "--generate-hashes"]
    uv += ["--no-header", "--no-annotate", "--quiet", "--native-tls", "--python-version", "3.11.5"]
    done = subprocess.run(uv, input="\n".join(asked), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    lines = done.stdout
    for name in LINUX:
        version = pins(path)[name]
        lines = lines.replace(f"{name}=={version} \\", f"{name}=={version} ; platform_system == 'Linux' \\")
    return HEADER.format(path.name) + lines


def main() -> None:
    for source, target in PINS.items():
        (ROOT / target).write_text(hashed(ROOT / source))


if __name__ == "__main__":
    main()
