"""Differences between two settings, in words."""

from collections.abc import Iterator, Mapping
from typing import Any

_ABSENT = object()


def differences(before: Any, now: Any, labels: tuple[str, str] = ("was", "now")) -> list[str]:
    """One line for each leaf of nested mappings and lists that differs: `stages[0].learning_rate: was 0.1, now 0.2`."""
    old, new = dict(_leaves(before, "")), dict(_leaves(now, ""))
    lines = []
    for key in [*old, *(k for k in new if k not in old)]:
        a, b = old.get(key, _ABSENT), new.get(key, _ABSENT)
        if a != b:
            lines.append(f"{key or 'value'}: {labels[0]} {_show(a)}, {labels[1]} {_show(b)}")
    return lines


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, child in value.items():
            yield from _leaves(child, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple) and value:
        for index, child in enumerate(value):
            yield from _leaves(child, f"{path}[{index}]")
    else:
        yield path, list(value) if isinstance(value, tuple) else value


def _show(value: Any) -> str:
    return "absent" if value is _ABSENT else repr(value)
