"""YAML text whose values remember their lines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

from partition.errors import PlanError


@dataclass(frozen=True, slots=True)
class YamlDocument:
    """One document: its plain values, and of which file (None: a text) and node they are."""

    values: Any
    source: str | None
    root: yaml.Node | None

    @classmethod
    def parse(cls, text: str, source: str | None = None) -> YamlDocument:
        """Read ``text``, which came from the file ``source``.

        Raises PlanError with the line where it is no YAML or gives a key twice.
        """
        loader: yaml.SafeLoader | None = None
        try:
            loader = yaml.SafeLoader(text)
            root = loader.get_single_node()
            twice = _key_given_twice(root)
            if twice is not None:
                message = f"{twice.value} is given twice; keep one"
                raise PlanError(f"{_at(source, twice.start_mark.line)}: {message}")
            values = None if root is None else loader.construct_document(root)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            if isinstance(error, PlanError):
                raise
            said, line = _complaint(error, text)
            raise PlanError(f"{_at(source, line)}: not YAML: {said}") from None
        finally:
            if loader is not None:
                loader.dispose()
        return cls(values, source, root)

    def at(self, where: str) -> str:
        """ "FILE:LINE" of the key at this path ("nodes[0].link"), or of the nearest that holds it.
        What is merged or an alias stands where it was written."""
        node, line = self.root, 0
        while node is not None:
            where = where.removeprefix(".")
            node, mark, where = _step(node, where)
            line = line if mark is None else mark.line
        return _at(self.source, line)


def _step(node: yaml.Node, where: str) -> tuple[yaml.Node | None, yaml.Mark | None, str]:
    """The child to which the path's next part leads, where that stands, and the path from there;
    (None, None, path) at the end."""
    if isinstance(node, yaml.MappingNode):
        for key, value in reversed(node.value):
            rest = where.removeprefix(str(key.value))
            if where and rest != where and rest[:1] in ("", ".", "["):
                return value, key.start_mark, rest
    elif isinstance(node, yaml.SequenceNode) and where.startswith("["):
        index, _, rest = where[1:].partition("]")
        if int(index) < len(node.value):
            child = node.value[int(index)]
            return child, child.start_mark, rest
    return None, None, where


def _key_given_twice(root: yaml.Node | None) -> yaml.ScalarNode | None:
    waiting, seen = [root], set[int]()
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
        elif isinstance(node, yaml.MappingNode):
            keys = set[str]()
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode):
                    if key.value in keys:
                        return key
                    keys.add(key.value)
                waiting.append(value)
    return None


def _complaint(error: Exception, text: str) -> tuple[str, int]:
    """What the parser says, on one line, and the line (from 0) that it speaks of."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    if mark is not None:
        said = getattr(error, "problem", None) or getattr(error, "context", None)
        return " ".join(str(said).split()), mark.line
    if isinstance(error, yaml.reader.ReaderError):
        said = f"the character {error.character!r} cannot stand here"
        return said, text.count("\n", 0, error.position)
    if isinstance(error, RecursionError):
        return "it is nested too deeply", 0
    return " ".join(str(error).split()), 0


def _at(source: str | None, line: int) -> str:
    return f"line {line + 1}" if source is None else f"{source}:{line + 1}"
