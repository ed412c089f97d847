"""From YAML and pydantic to sentences with line numbers: where, what was found, what would work."""

from __future__ import annotations

from pathlib import Path as FilePath
from typing import Any

import yaml
from pydantic import ValidationError

from compress.errors import RecipeError, nearest

Path = tuple[str | int, ...]


class Lines:
    """The line of every key and list entry of a YAML text."""

    def __init__(self, file: FilePath) -> None:
        self.file = file
        self.by_path: dict[Path, int] = {}
        self.overrides: dict[Path, str] = {}

    def mark_override(self, path: Path, override: str) -> None:
        self.overrides[path] = override

    def place(self, path: Path) -> str:
        """'recipe.yaml:12: stages[0].bits', or the --set that put the value there."""
        name = dotted(path)
        for length in range(len(path), 0, -1):
            if path[:length] in self.overrides:
                return f"--set {self.overrides[path[:length]]}: {name}"
        for length in range(len(path), 0, -1):
            above = [override for inner, override in self.overrides.items() if inner[:length] == path[:length]]
            if above and path[:length] not in self.by_path:
                return f"--set {above[0]}: {name}"
        made = [f"--set {override}" for inner, override in self.overrides.items() if inner[: len(path)] == path]
        # A mistake of the whole, which what was set inside may have made.
        name += f" (with {', '.join(made)})" if made else ""
        for length in range(len(path), -1, -1):
            if path[:length] in self.by_path:
                return f"{self.file}:{self.by_path[path[:length]]}: {name}".rstrip(": ")
        return f"{self.file}: {name}".rstrip(": ")


def dotted(path: Path) -> str:
    """('stages', 0, 'bits') -> 'stages[0].bits'."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def parse_yaml(text: str, file: FilePath) -> tuple[Any, Lines]:
    """Data and line numbers. Raises RecipeError for broken YAML, duplicate keys, or a recipe that is no mapping."""
    lines = Lines(file)
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{file}:{mark.line + 1}" if mark else str(file)
        raise RecipeError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(data, dict) or node is None:
        raise RecipeError(f"{file}: a recipe is a mapping of keys; start with `compress init`.")
    duplicates: list[str] = []
    _walk(node, (), lines, duplicates)
    if duplicates:
        raise RecipeError(duplicates)
    return data, lines


def _walk(node: yaml.Node, path: Path, lines: Lines, duplicates: list[str]) -> None:
    lines.by_path.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*path, str(key.value))
            line = key.start_mark.line + 1
            if inner in lines.by_path:
                duplicates.append(
                    f"{lines.file}:{line}: {dotted(inner)} is given twice (first on line {lines.by_path[inner]})"
                )
            lines.by_path[inner] = line
            _walk(value, inner, lines, duplicates)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _walk(value, (*path, index), lines, duplicates)


def describe(error: ValidationError, data: Any, lines: Lines, schema: dict[str, Any]) -> list[str]:
    """One sentence for each mistake, in file order."""
    by_path: dict[Path, list[str]] = {}
    for problem in error.errors():
        path = _data_path(problem["loc"], data, names_absent_key=problem["type"] in ("missing", "extra_forbidden"))
        sentence = _sentence(problem, path, data, schema)
        if sentence and sentence not in by_path.setdefault(path, []):
            by_path[path].append(sentence)
    for problem in error.errors():
        # A text among values that may be texts is told of by the others; alone, it is the mistake.
        if problem["type"] in _NO_MAPPING and isinstance(problem.get("input"), str):
            path = _data_path(problem["loc"], data, names_absent_key=False)
            by_path.setdefault(path, []).extend([] if by_path.get(path) else [_no_mapping(problem["input"])])
    ordered = sorted(by_path, key=lambda path: (lines.by_path.get(path, _line_above(path, lines)), str(path)))
    return [f"{lines.place(path)}: {'; or '.join(by_path[path])}" for path in ordered if by_path[path]]


def _at(data: Any, path: Path) -> Any:
    for part in path:
        data = data[part]
    return data


def _line_above(path: Path, lines: Lines) -> int:
    for length in range(len(path), -1, -1):
        if path[:length] in lines.by_path:
            return lines.by_path[path[:length]]
    return 0


def _data_path(loc: Path, data: Any, names_absent_key: bool) -> Path:
    """pydantic's location without the tags it adds for unions; the last part of a missing key is kept."""
    path: list[str | int] = []
    place = data
    for position, part in enumerate(loc):
        if _holds(place, part):
            place = place[part]
        elif names_absent_key and position == len(loc) - 1:
            pass
        else:
            continue
        path.append(part)
    return tuple(path)


def _holds(place: Any, part: str | int) -> bool:
    if isinstance(place, list):
        return isinstance(part, int) and part < len(place)
    return isinstance(place, dict) and part in place


def _sentence(problem: Any, path: Path, data: Any, schema: dict[str, Any]) -> str:
    kind, value, context = problem["type"], problem.get("input"), problem.get("ctx") or {}
    if kind == "extra_forbidden":
        known = fields_at(schema, problem["loc"][:-1])
        others = _kinds_with(schema, problem["loc"])
        hint = f" It is a field of {', '.join(others)}." if others else nearest(str(path[-1]), known)
        return f"unknown key.{hint} Known here: {', '.join(known)}"
    if kind == "missing":
        return "missing; every recipe needs it" if len(path) == 1 else "missing; it is required here"
    if kind == "union_tag_invalid":
        known = [name.strip(" '") for name in str(context["expected_tags"]).split(",")]
        return f"unknown kind {context['tag']!r}.{nearest(str(context['tag']), known)} Known: {', '.join(known)}"
    if kind == "union_tag_not_found":
        return "give its `kind`; `compress kinds` lists them"
    if kind == "string_type" and isinstance(value, dict):
        return ""
    if kind == "too_short" and len(_at(data, path) or ()) >= int(context["min_length"]):
        return ""  # pydantic counts valid entries; the invalid ones are reported themselves
    if kind == "too_short":
        return f"give at least {context['min_length']}"
    if kind in _NO_MAPPING:
        return "" if isinstance(value, str) else _no_mapping(value)
    if kind == "literal_error":
        found = f"found {value!r}, expected {context['expected']}"
        options = [name.strip(" '") for name in str(context["expected"]).replace(" or ", ", ").split(",")]
        near = nearest(value, options) if isinstance(value, str) else ""
        return f"{found}.{near}" if near else found
    if kind == "string_pattern_mismatch" and path[-1:] == ("name",):
        return f"found {value!r}; use lower-case letters, digits, '.', '_' and '-', at most 64, no folder separators"
    if kind == "value_error":
        return str(context.get("error", problem["msg"]))
    message = str(problem["msg"]).replace("a valid tuple", "a list")
    return f"{message[0].lower()}{message[1:]}" + (f", found {value!r}" if not isinstance(value, dict | list) else "")


_NO_MAPPING = ("model_attributes_type", "model_type", "dict_type")


def _no_mapping(value: Any) -> str:
    return f"found {value!r}, expected keys and values, such as {{key: value}}"


def fields_at(schema: dict[str, Any], loc: Path) -> list[str]:
    """Field names the JSON schema allows at a pydantic location."""
    node = _resolve(schema, schema)
    for part in loc:
        step = _step(schema, node, part)
        if step is not None:
            node = _resolve(schema, step)
    names: list[str] = list(node.get("properties", {}))
    return names


def _kinds_with(schema: dict[str, Any], loc: Path) -> list[str]:
    """Other kinds of the same list that have the unknown key at the end of a pydantic location."""
    if len(loc) < 2:
        return []
    *above, kind, key = loc
    node = _resolve(schema, schema)
    for part in above:
        step = _step(schema, node, part)
        if step is None:
            return []
        node = _resolve(schema, step)
    kinds = node.get("discriminator", {}).get("mapping", {})
    if kind not in kinds:
        return []
    return [name for name, place in kinds.items() if key in _resolve(schema, {"$ref": place}).get("properties", {})]


def _resolve(schema: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    while True:
        options = [option for option in node.get("anyOf", ()) if option.get("type") != "null"]
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rsplit("/", 1)[1]]
        elif len(options) == 1:  # a value that may be left out
            node = options[0]
        else:
            return node


def _step(schema: dict[str, Any], node: dict[str, Any], part: str | int) -> dict[str, Any] | None:
    """The schema below `part`: a property, a list entry, or the union member with that tag."""
    if isinstance(part, int):
        found: dict[str, Any] | None = node.get("items")
        return found
    if part in node.get("properties", {}):
        inner: dict[str, Any] = node["properties"][part]
        return inner
    mapping = node.get("discriminator", {}).get("mapping", {})
    if part in mapping:
        return {"$ref": mapping[part]}
    for option in (*node.get("anyOf", ()), *node.get("oneOf", ())):
        resolved = _resolve(schema, option)
        if str(part) == resolved.get("title") or part in resolved.get("discriminator", {}).get("mapping", {}):
            return resolved if str(part) == resolved.get("title") else _step(schema, resolved, part)
    options = [_resolve(schema, option) for option in node.get("anyOf", ()) if option.get("type") != "null"]
    return _step(schema, options[0], part) if len(options) == 1 else None
