"""Reads a YAML file into plain values and remembers the line on which each of them stands."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from orchestrator.spec_errors import KeyPath, Problem, SpecError, dotted, nearest

PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "map", "seq")}
MERGE_TAG = "tag:yaml.org,2002:merge"
# Aliases of aliases grow exponentially when they are expanded: a short file could otherwise fill the memory.
MAX_VALUES = 100_000


@dataclass(frozen=True)
class Document:
    """A YAML file as plain values, with the line and the spelling of each; `unreadable` keys hold None instead."""

    file: str
    data: object
    lines: dict[str, int]
    scalars: dict[str, str]
    problems: list[Problem]
    unreadable: set[str]

    def line_of(self, key: str) -> int:
        """The line of a dotted key, else that of the nearest enclosing key that the file does hold."""
        while key and key not in self.lines:
            key = key[: max(key.rfind("."), key.rfind("["), 0)]
        return self.lines.get(key, 1)

    def problem(self, key: str, what: str) -> Problem:
        """A mistake at a dotted key of this file."""
        return Problem(self.file, self.line_of(key), key, what)


def read_text(path: str | Path) -> str:
    """The text of a file.

    Raises:
        SpecError: there is no such file, it is a folder, it cannot be opened, or it is not UTF-8.
    """
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        neighbours = [str(neighbour) for neighbour in sorted(Path(path).parent.glob("*.y*ml"))]
        meant = nearest(str(Path(path)), neighbours)
        raise _file_problem(path, "no such file" + (f", did you mean {meant}?" if meant else "")) from None
    except IsADirectoryError:
        raise _file_problem(path, "is a folder, a sweep is one YAML file") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise _file_problem(path, f"cannot be read: {reason or error}") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise SpecError([Problem(str(path), line, "", "is not UTF-8 text, save the file as UTF-8")]) from None


def _file_problem(path: str | Path, what: str) -> SpecError:
    return SpecError([Problem(str(path), None, "", what)])


class _Loader(yaml.SafeLoader):
    """YAML's plain values only; a date stays the text it was written as."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag in PLAIN_TAGS or tag == MERGE_TAG]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse(text: str, file: str) -> Document:
    """Reads YAML text; what is wrong inside a readable document (duplicate keys) is in its `problems`.

    Raises:
        SpecError: the text is not YAML, or is empty.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            raise SpecError([Problem(file, None, "", "is empty, a sweep needs at least name, models and datasets")])
        reader = _Reader(loader, file)
        data = reader.value(node, ())
    except yaml.MarkedYAMLError as error:
        raise SpecError([_syntax_problem(error, file)]) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        what = f"not valid YAML: the character U+{ord(text[error.position]):04X} is not allowed"
        raise SpecError([Problem(file, line, "", what)]) from None
    except (ValueError, OverflowError):
        # The parser turns an escape such as "\UFFFFFFFF" into a character without checking that there is one.
        what = "not valid YAML: an escape in a quoted text names no character"
        raise SpecError([Problem(file, None, "", what)]) from None
    except RecursionError:
        raise SpecError([Problem(file, None, "", "not a sweep: nested too deeply")]) from None
    return Document(file, data, reader.lines, reader.scalars, reader.problems, reader.unreadable)


def _syntax_problem(error: yaml.MarkedYAMLError, file: str) -> Problem:
    what = f"not valid YAML: {error.problem or 'cannot be read'}"
    if error.context and error.problem and error.problem.startswith("but "):
        what = f"not valid YAML: {error.context}, {error.problem}"
    elif error.context and error.context_mark:
        what += f" ({error.context} that starts on line {error.context_mark.line + 1})"
    if "'\\t'" in what:
        what += ", indent with spaces"
    mark = error.problem_mark
    return Problem(file, mark.line + 1 if mark else None, "", what, column=mark.column + 1 if mark else None)


class _Reader:
    """Turns the nodes of one document into values, noting lines, spellings and duplicate keys on the way."""

    def __init__(self, loader: _Loader, file: str) -> None:
        self.loader = loader
        self.file = file
        self.lines: dict[str, int] = {}
        self.scalars: dict[str, str] = {}
        self.problems: list[Problem] = []
        self.unreadable: set[str] = set()
        self._open_nodes: set[int] = set()
        self._values_read = 0

    def value(self, node: yaml.Node, path: KeyPath) -> object:
        key = dotted(path)
        self.lines.setdefault(key, node.start_mark.line + 1)
        self._count()
        if node.tag not in PLAIN_TAGS:
            return self._left_out(node, key, f"the YAML tag {node.tag} is not supported, write a plain value")
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, key)
        if id(node) in self._open_nodes:
            return self._left_out(node, key, "contains itself, through a YAML alias")
        self._open_nodes.add(id(node))
        try:
            if isinstance(node, yaml.SequenceNode):
                return [self.value(item, (*path, index)) for index, item in enumerate(node.value)]
            return self._mapping(node, path)
        finally:
            self._open_nodes.discard(id(node))

    def _scalar(self, node: yaml.ScalarNode, key: str) -> object:
        self.scalars[key] = node.value
        try:
            value: object = self.loader.construct_object(node)
        except (yaml.YAMLError, ValueError, KeyError, IndexError):
            return self._left_out(node, key, f"cannot read {node.value[:40]!r} as {node.tag.rpartition(':')[2]}")
        if isinstance(value, int) and value.bit_length() > 63:
            return self._left_out(node, key, "the number is too large")
        return value

    def _mapping(self, node: yaml.Node, path: KeyPath) -> dict[str, object]:
        values: dict[str, object] = {}
        for key_node, value_node in self._pairs(node, path):
            name = key_node.value
            key = dotted((*path, name))
            line = key_node.start_mark.line + 1
            if name in values:
                self._wrong(key_node, key, f"duplicate key, first given on line {self.lines[key]}")
                continue
            self.lines[key] = line
            values[name] = self.value(value_node, (*path, name))
        return values

    def _pairs(self, node: yaml.Node, path: KeyPath) -> Iterator[tuple[yaml.ScalarNode, yaml.Node]]:
        """The keys of a mapping with their values; what `<<` merges in comes last and never replaces a key."""
        self._count()
        written: set[str] = set()
        merged: list[yaml.Node] = []
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or not key_node.value.isprintable():
                self._wrong(key_node, dotted(path), "a key must be one plain word")
            elif key_node.tag == MERGE_TAG:
                merged += value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
            else:
                # The spelling is the key: `on`, `off` and `1` are names here, not booleans and numbers.
                written.add(key_node.value)
                yield key_node, value_node
        for source in merged:
            if not isinstance(source, yaml.MappingNode) or id(source) in self._open_nodes:
                self._wrong(source, dotted(path), "<< must name another mapping")
                continue
            self._open_nodes.add(id(source))
            pairs = list(self._pairs(source, path))
            self._open_nodes.discard(id(source))
            for key_node, value_node in pairs:
                if key_node.value not in written:
                    written.add(key_node.value)
                    yield key_node, value_node

    def _count(self) -> None:
        self._values_read += 1
        if self._values_read > MAX_VALUES:
            raise SpecError([Problem(self.file, None, "", f"not a sweep: more than {MAX_VALUES} values")])

    def _left_out(self, node: yaml.Node, key: str, what: str) -> object:
        """Reports a value that cannot be read, and stands in for it."""
        self.unreadable.add(key)
        self._wrong(node, key, what)
        return None

    def _wrong(self, node: yaml.Node, key: str, what: str) -> None:
        self.problems.append(Problem(self.file, node.start_mark.line + 1, key, what))
