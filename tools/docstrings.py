"""How mkdocstrings reads our docstrings: as plain text, not as Markdown."""

from typing import Any

import griffe

from tools.pages import as_markdown


class Plain(griffe.Extension):
    """griffe calls these for each function, and for each class once it has its members."""

    def on_function(self, *, func: griffe.Function, **loading: Any) -> None:
        _rewrite(func, {parameter.name for parameter in func.parameters})

    def on_class_members(self, *, cls: griffe.Class, **loading: Any) -> None:
        _rewrite(cls, {parameter.name for parameter in cls.parameters} | set(cls.members))


def _rewrite(documented: griffe.Object, names: set[str]) -> None:
    if documented.docstring:
        documented.docstring.value = as_markdown(documented.docstring.value, names)
