"""Builds any configuration dataclass from plain data (a YAML section); says what is wrong with it.

A configuration class is a frozen dataclass that stands at the top of the file it configures; it may
have a `validate()` method for what types cannot say. Fields that are dataclasses, or dicts of
dataclasses, are sections of their own.
"""

import difflib
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from arbitor.errors import UserError

T = TypeVar("T")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty mapping."""
    try:
        values = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: is not valid YAML ({reason})") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected `key: value` lines, got {type(values).__name__}")
    return values


def write_yaml(values: Mapping[str, Any]) -> str:
    """YAML text that `read_yaml` reads back to equal values."""
    return yaml.safe_dump(dict(values), sort_keys=False)


def parse_value(text: str) -> Any:
    """The value of `key=text` on a command line, read as YAML: `3`, `true`, `[1, 2]`, `name`."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{text!r} is not a YAML value ({reason})") from error


def set_value(values: dict[str, Any], path: str, value: Any) -> None:
    """Sets `key.path` of a nested mapping; sections on the way are made."""
    *sections, key = path.split(".")
    for name in sections:
        if values.get(name) is None:
            values[name] = {}
        values = values[name]
        if not isinstance(values, dict):
            raise UserError(f"{path}: {name} is a value, not a section")
    values[key] = value


def build(cls: type[T], values: Any, path: str = "") -> T:
    """An instance of the dataclass `cls` from nested mappings; `path` is where `values` stands.

    Unknown keys, wrong types and what the classes' own `validate` refuses raise `UserError` naming
    the dotted key.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{path}: expected a section of `key: value` lines, got {values!r}")
    hints = get_type_hints(cls)
    known = {field.name: hints[field.name] for field in fields(cls)}
    unknown = [key for key in values if key not in known]
    if unknown:
        raise UserError(_unknown_key(_join(path, unknown[0]), str(unknown[0]), list(known), path))
    arguments = {
        key: _convert(known[key], value, _join(path, key)) for key, value in values.items()
    }
    for field in fields(cls):
        if field.name not in values and field.default is field.default_factory is MISSING:
            raise UserError(f"{_join(path, field.name)}: missing; give it a value")
    instance = cls(**arguments)
    if hasattr(instance, "validate"):
        instance.validate()
    return instance


def build_part(cls: type[T], values: Any, path: str) -> T:
    """As `build`, from those keys of a section that `cls` has; the section says more."""
    if isinstance(values, Mapping):
        values = {key: values[key] for key in (f.name for f in fields(cls)) if key in values}
    return build(cls, values, path)


def section(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """One section of a YAML mapping, for commands that need only the model or only the data."""
    content = values.get(name)
    if content is not None and not isinstance(content, dict):
        raise UserError(f"{name}: expected a section of `key: value` lines, got {content!r}")
    return content or {}


def _convert(hint: Any, value: Any, path: str) -> Any:
    if is_dataclass(hint):
        return build(hint, {} if value is None else value, path)
    if get_origin(hint) is dict and is_dataclass(get_args(hint)[1]):
        if not isinstance(value, Mapping):
            raise UserError(f"{path}: expected a section of named entries, got {value!r}")
        return {str(k): build(get_args(hint)[1], v, _join(path, k)) for k, v in value.items()}
    try:
        return TypeAdapter(hint, config=ConfigDict(allow_inf_nan=False)).validate_python(value)
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise UserError(f"{path}: {reason}, got {value!r}") from error


def _unknown_key(full_path: str, key: str, known: list[str], path: str) -> str:
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {_join(path, nearest[0])}?" if nearest else f"known: {', '.join(known)}"
    return f"{full_path}: unknown configuration key; {hint}"


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)
