"""Writes THIRD_PARTY.md: what constraints.txt pins, its licence and what it is for, as the installed packages say."""

import re
import tomllib
from collections import defaultdict
from importlib.metadata import Distribution, distribution
from pathlib import Path

from lock import pins
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "THIRD_PARTY.md"
EXTRAS = ("gpu", "cli", "dev", "models", "docs", "audit")  # that `make` installs
SPDX = {  # what packages without a License-Expression say
    "Apache 2.0": "Apache-2.0",
    "Apache 2.0 License": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "BSD License": "BSD",
    "ISC License": "ISC",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "PSFL": "PSF-2.0",
    "Python Software Foundation License": "PSF-2.0",
}
HEADER = """# What fusedact stands on

By `make lock`; not by hand. fusedact is under Apache-2.0 and ships no other's code: it asks for the packages below,
each under its own licence, unchanged. At run time those are torch and NumPy, on a GPU Triton, for the command line what
stands under cli; the rest is for developers. MPL-2.0 packages are used as they are, by developers alone. The digits of
`fusedact/mnist.npz` are described in `fusedact/data.py`.

| Package | Version | Licence | For |
| --- | --- | --- | --- |
"""


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def licence(package: Distribution) -> str:
    """As SPDX names it where the package says enough, "BSD" where it does not say which."""
    told = package.metadata
    if expression := told.get("License-Expression"):
        return expression
    classes = [text.rpartition(" :: ")[2] for text in told.get_all("Classifier") or [] if text.startswith("License ::")]
    said = (told.get("License") or "").strip()
    short = [said] if said and said != "UNKNOWN" and "\n" not in said and len(said) < 40 else []
    found = [SPDX.get(text, text) for text in (*short, *classes)]
    if not found:
        raise ValueError(f"{told['Name']} does not say its licence")
    return found[0]


def reasons() -> dict[str, set[str]]:
    """For each package, by which of the extras it comes; "run time" for what is always needed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = {"run time": project["dependencies"]} | {e: project["optional-dependencies"][e] for e in EXTRAS}
    found: defaultdict[str, set[str]] = defaultdict(set)
    for group, texts in groups.items():
        waiting, seen = [each for each in map(Requirement, texts) if _applies(each, ())], set()
        while waiting:
            asked = waiting.pop()
            name, extras = canonical(asked.name), tuple(sorted(asked.extras))
            if (name, extras) not in seen:
                seen.add((name, extras))
                found[name].add(group)
                needed = map(Requirement, distribution(name).requires or [])
                waiting += [each for each in needed if _applies(each, extras)]
    return found


def _applies(asked: Requirement, extras: tuple[str, ...]) -> bool:
    return asked.marker is None or any(asked.marker.evaluate({"extra": extra}) for extra in (*extras, ""))


def page() -> str:
    why = reasons()
    rows = [
        f"| {name} | {version} | {licence(distribution(name))} | {', '.join(sorted(why[name]))} |"
        for name, version in pins(ROOT / "constraints.txt").items()
    ]
    return HEADER + "\n".join(rows) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
