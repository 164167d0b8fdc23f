"""Sites that repeat over the blocks of a model, each kind as one row: 'layers.{0..11}.mlp'."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any, NamedTuple

from fusedact.fusion.site import Site

MODEL = "(the model)"
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a segment of a path that is a number


class Row(NamedTuple):
    """Sites of equal label, kind and reason, at places that differ in numbers alone."""

    where: str
    sites: list[Site]


def rows(sites: Sequence[Site]) -> list[Row]:
    """In the model's order. A fused site stands at its module, where that holds no other; else at its first layer."""
    times = Counter(site.module for site in sites)
    alike: dict[Any, list[tuple[str, Site]]] = {}
    for site in sites:
        alone = site.fused and times[site.module] == 1
        where = site.parts[0] if _is_within(site) and not alone else site.module
        pattern = _NUMBER.sub("#", where), tuple(_NUMBER.sub("#", part) for part in site.parts)
        same = replace(site, module="", parts=())
        alike.setdefault((pattern, same), []).append((where, site))
    parts = [part for group in alike.values() for part in _whole_blocks(group)]
    order = {site: at for at, site in enumerate(sites)}
    parts.sort(key=lambda part: order[part[0][1]])
    return [Row(_spelled(part), [site for _, site in part]) for part in parts]


def _is_within(site: Site) -> bool:
    """Whether its first part is a layer of the module, not a function; in the model itself its label tells: a class."""
    return site.parts[0].startswith(f"{site.module}.") if site.module else site.label[0].isupper()


def _whole_blocks(group: list[tuple[str, Site]]) -> list[list[tuple[str, Site]]]:
    """The group, in the fewest parts of which each holds all combinations of the numbers at its places."""
    numbers = [_numbers(where) for where, _ in group]
    columns = [set(column) for column in zip(*numbers, strict=True)]
    if len(set(numbers)) == prod(map(len, columns)):
        return [group]
    ways = []
    for at, column in enumerate(columns):
        if len(column) > 1:
            parts = [[m for m in group if _numbers(m[0])[at] == number] for number in sorted(column)]
            ways.append([block for part in parts for block in _whole_blocks(part)])
    return min(ways, key=len)


def _numbers(path: str) -> tuple[int, ...]:
    return tuple(map(int, _NUMBER.findall(path)))


def _spelled(group: list[tuple[str, Site]]) -> str:
    """'layers.{0..11}.mlp' for layers.0.mlp to layers.11.mlp."""
    columns = (sorted(set(column)) for column in zip(*(_numbers(where) for where, _ in group), strict=True))
    return _NUMBER.sub(lambda _: _set(next(columns)), group[0][0]) or MODEL


def _set(numbers: list[int]) -> str:
    first, last = numbers[0], numbers[-1]
    if first == last:
        return str(first)
    if last - first == len(numbers) - 1 and len(numbers) > 2:
        return f"{{{first}..{last}}}"
    return f"{{{', '.join(map(str, numbers))}}}"
