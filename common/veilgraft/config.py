"""YAML files parsed once, at the edge, into frozen models.

Every mistake is one sentence, `FILE: KEY: expected …, got …`; all mistakes of a file are
reported together.
"""

import difflib
import hashlib
import json
import types
import typing
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    ValidationError,
    ValidationInfo,
)
from pydantic_core import ErrorDetails

from veilgraft.errors import InputError


def _beside_the_file(path: Path, info: ValidationInfo) -> Path:
    base = (info.context or {}).get("base")
    return path if base is None or path.is_absolute() else (Path(base) / path).resolve()


RelativePath = Annotated[Path, AfterValidator(_beside_the_file)]
"""A path; in a file, relative to that file's folder."""


class Config(BaseModel):
    """A frozen model that forbids unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Return the model that the YAML file at `path` describes.

        Raises:
            InputError: naming the file and, for each mistake, key, value and expectation.
        """
        return cls.parse(read_yaml(path), name=str(path), base=path.parent)

    @classmethod
    def parse(cls, values: object, *, name: str, base: Path | None = None) -> Self:
        """Validate plain `values`; `name` stands for the file in messages."""
        if not isinstance(values, Mapping):
            raise InputError(f"{name}: expected a mapping of keys to values, got {_shown(values)}")
        try:
            return cls.model_validate(values, context={"base": base})
        except ValidationError as error:
            raise InputError(*(_sentence(cls, name, e) for e in error.errors())) from None


def canonical(value: object) -> str:
    """Return the canonical JSON of `value`: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def sha256_of(value: object) -> str:
    """Return the SHA-256, in hex, of the canonical JSON of `value`."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


class _UniqueKeys(yaml.SafeLoader):
    """PyYAML's safe loader, which also refuses a key that stands twice, and aliases.

    A few lines of aliases stand for more values than any machine can hold.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "an alias; write the value out", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable):
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key!r} stands twice", key_node.start_mark
                    )
                seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> object:
    """Return what the YAML file holds; raises `InputError` where it can't be read."""
    try:
        # The loader is a SafeLoader; S506 does not see through the subclass.
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)  # noqa: S506
    except OSError as error:
        raise InputError(f"{path}: can't be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: expected UTF-8 text") from None
    except yaml.MarkedYAMLError as error:
        where = f" line {error.problem_mark.line + 1}:" if error.problem_mark else ""
        raise InputError(f"{path}:{where} not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid YAML: {error}") from None


def _shown(value: object) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "…"


def _sentence(model: type[BaseModel], name: str, error: ErrorDetails) -> str:
    key = ".".join(str(part) for part in error["loc"])
    prefix = f"{name}: {key}: " if key else f"{name}: "
    context, came = error.get("ctx", {}), _shown(error["input"])
    match error["type"]:
        case "missing":
            return f"{prefix}missing; a value is required"
        case "extra_forbidden":
            return f"{prefix}unknown key{_suggestion(model, error['loc'])}"
        case "value_error":
            return f"{prefix}{context['error']}"
        case "greater_than":
            return f"{prefix}expected a number above {context['gt']:g}, got {came}"
        case "greater_than_equal":
            return f"{prefix}expected a number of at least {context['ge']:g}, got {came}"
        case "less_than":
            return f"{prefix}expected a number below {context['lt']:g}, got {came}"
        case "less_than_equal":
            return f"{prefix}expected a number of at most {context['le']:g}, got {came}"
        case "literal_error":
            return f"{prefix}expected {context['expected']}, got {came}"
        case "model_type" | "dict_type" | "model_attributes_type":
            return f"{prefix}expected a mapping of keys to values, got {came}"
        case "string_type":
            hint = "; put it in quotes" if isinstance(error["input"], bool | int | float) else ""
            return f"{prefix}expected text, got {came}{hint}"
        case "string_pattern_mismatch":
            return f"{prefix}expected text of the form {context['pattern']}, got {came}"
        case _:
            message = error["msg"].removeprefix("Input should be ").removeprefix("a valid ")
            return f"{prefix}expected {message}, got {came}"


def _suggestion(model: type[BaseModel], location: tuple[int | str, ...]) -> str:
    """Return the nearest known key, where there is one, and the keys that may stand there."""
    for part in location[:-1]:
        inner = _model_at(model, part)
        if inner is None:
            return ""
        model = inner
    known = list(model.model_fields)
    near = difflib.get_close_matches(str(location[-1]), known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; expected one of {', '.join(known)}"


def _model_at(model: type[BaseModel], part: int | str) -> type[BaseModel] | None:
    field = model.model_fields.get(str(part))
    if field is None:
        return None
    candidates = [field.annotation]
    while candidates:
        candidate = candidates.pop()
        if typing.get_origin(candidate) in (typing.Union, types.UnionType, typing.Annotated):
            candidates.extend(typing.get_args(candidate))
        elif isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None
