"""One way to read a config file: YAML into a msgspec Struct, with errors that name the field and what would be right.

Semantic checks belong into a Struct's `__post_init__` as `ValueError("field: what is wrong with it")`; the path to the
Struct is put in front.
"""

from __future__ import annotations

import difflib
import pathlib
import re
import types
import typing
from collections.abc import Hashable, Iterable
from typing import Any, Literal, TypeVar, Union

import msgspec
import yaml

from kvindex.errors import ConfigError

T = TypeVar("T")
MAX_FILE_BYTES = 1 << 20

_AT = re.compile(r"^(?P<text>.*?)(?: - at (?P<key>`key` in )?`\$(?P<path>[^`]*)`)?$", re.DOTALL)
_STEP = re.compile(r"\.([^.\[]+)|\[(\d+|\.\.\.)\]")
_FIELD = re.compile(r"field `([^`]*)`")


class _Loader(yaml.SafeLoader):
    """A key given twice is an error: the first one would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable):
                if key in seen:
                    raise yaml.MarkedYAMLError(problem=f"`{key}` is given twice", problem_mark=key_node.start_mark)
                seen.add(key)
        return super().construct_mapping(node, deep)


def load(path: str | pathlib.Path, type_: type[T]) -> T:
    """Read and decode one file; raises ConfigError that begins with the file's name."""
    file = pathlib.Path(path)
    try:
        size = file.stat().st_size
        if size > MAX_FILE_BYTES:
            raise ConfigError(f"{path}: {size} bytes is more than the {MAX_FILE_BYTES} that a config may have")
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text") from None
    try:
        return decode(text, type_)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def decode(text: str, type_: type[T]) -> T:
    try:
        data = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError(f"{where}not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"not valid YAML: {error}") from None
    return convert({} if data is None else data, type_)


def convert(data: Any, type_: type[T]) -> T:
    """Decode plain data; raises ConfigError `path.to.field: what is wrong`."""
    try:
        return msgspec.convert(data, type_)
    except msgspec.ValidationError as error:
        raise ConfigError(_message(str(error), data, type_)) from None


def _message(error: str, data: Any, type_: Any) -> str:
    match = _AT.match(error)
    assert match is not None
    text, path = match["text"], match["path"] or ""
    where, value, value_type = _walk(path, data, type_)
    if match["key"]:
        return f"{where or 'top level'}: a key is wrong: {_lower(text)}"
    if field := _FIELD.search(text):
        name = _join(where, field[1])
        known = [f.encode_name for f in msgspec.structs.fields(_struct(value_type))]
        if "unknown" in text:
            return f"{name}: unknown field; {_suggest(field[1], known)}"
        return f"{name}: is required and missing"
    if text.startswith("Invalid enum value"):
        return f"{where}: {value!r} is not allowed; {_suggest(str(value), list(_literals(value_type)))}"
    if not text.startswith(("Expected", "Invalid", "Object", "Input")):
        # from a __post_init__: `field: what is wrong`
        return _join(where, text) if re.match(r"[\w\[\]]+: ", text) or not where else f"{where}: {text}"
    shown = "" if isinstance(value, dict | list) else f" ({value!r})"
    return f"{where or 'top level'}: {_lower(text)}{shown}".replace("`", "")


def _walk(path: str, data: Any, type_: Any) -> tuple[str, Any, Any]:
    """Follow msgspec's path; dictionary keys, which it writes as `[...]`, are found again by trying."""
    where = ""
    for name, index in _STEP.findall(path):
        if name:
            struct = _struct(type_)
            field = next((f for f in msgspec.structs.fields(struct) if f.encode_name == name), None) if struct else None
            type_ = field.type if field else Any
            data = data.get(name) if isinstance(data, dict) else None
            where = _join(where, name)
        elif index == "...":
            arguments = _arguments(type_, dict)
            type_ = arguments[1] if len(arguments) == 2 else Any
            key = next((k for k, v in data.items() if not _fits(v, type_)), None) if isinstance(data, dict) else None
            data = data.get(key) if isinstance(data, dict) else None
            where = _join(where, str(key))
        else:
            type_ = next(iter(_arguments(type_, list, tuple)), Any)
            data = data[int(index)] if isinstance(data, list) and int(index) < len(data) else None
            where = f"{where}[{index}]"
    return where, data, type_


def _fits(value: Any, type_: Any) -> bool:
    try:
        msgspec.convert(value, type_)
    except msgspec.ValidationError:
        return False
    return True


def _alternatives(type_: Any) -> Iterable[Any]:
    origin = typing.get_origin(type_)
    if origin is typing.Annotated:
        return _alternatives(typing.get_args(type_)[0])
    if origin in (Union, types.UnionType):
        return [a for part in typing.get_args(type_) for a in _alternatives(part)]
    return [type_]


def _struct(type_: Any) -> Any:
    return next((a for a in _alternatives(type_) if isinstance(a, type) and issubclass(a, msgspec.Struct)), None)


def _arguments(type_: Any, *origins: type) -> tuple[Any, ...]:
    return next((typing.get_args(a) for a in _alternatives(type_) if typing.get_origin(a) in origins), ())


def _literals(type_: Any) -> Iterable[str]:
    return (str(v) for a in _alternatives(type_) if typing.get_origin(a) is Literal for v in typing.get_args(a))


def _suggest(given: str, known: list[str]) -> str:
    close = difflib.get_close_matches(given, known, n=1, cutoff=0.6)
    hint = f"did you mean `{close[0]}`? " if close else ""
    return f"{hint}known: {', '.join(known)}"


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]
