"""On what two reports measured: numbers of other sources, texts or questions do not compare."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def measured_apart(report_a: Mapping[str, Any], report_b: Mapping[str, Any]) -> list[str]:
    """What both measured under one name, and not on the same bytes: the source, a text, a task's questions."""
    one, other = _measured_on(report_a), _measured_on(report_b)
    return [name for name in one if name in other and one[name] != other[name]]


def part_of(report: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """What lies below `keys`, if that is an object; else an empty one."""
    value: Any = report
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return dict(value) if isinstance(value, Mapping) else {}


def _measured_on(report: Mapping[str, Any]) -> dict[str, Any]:
    """Digests of what was measured on, by name."""
    source = part_of(report, "provenance", "source")
    found: dict[str, Any] = {"the source": source["digest"]} if "digest" in source else {}
    found |= {
        f"the text {item.get('set', item.get('name'))}": item.get("digest") for item in _items(report, "evaluation")
    }
    return found | {f"the task {item.get('name')}": item.get("prompts_digest") for item in _items(report, "tasks")}


def _items(report: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    value = report.get(key)
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []
