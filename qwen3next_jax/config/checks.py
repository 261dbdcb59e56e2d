"""Shared by the configs: how values are read, and the wording of what is wrong with them."""

import dataclasses
import difflib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

import numpy as np

FLOAT32_TINY, FLOAT32_MAX = 2.0**-126, 2.0**128 * (1 - 2.0**-24)  # the range of normal numbers


def read_json(path: Any) -> dict[str, Any]:
    """The JSON object in a file, {} if there is no such file.

    Raises:
      ValueError: the file holds something else.
    """
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}; expected a JSON object")
    return found


def as_mapping(given: Any) -> Any:
    """Converts a `ConfigDict` or a config of transformers, which are no Mappings, by `to_dict`."""
    return given.to_dict() if hasattr(given, "to_dict") else given


def frozen(kind: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Converts lists to tuples, NumPy's scalars to Python's, and ints of float fields to floats."""
    types = {field.name: field.type for field in dataclasses.fields(kind)}

    def freeze(key: str, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return tuple(freeze("", item) for item in value)
        if isinstance(value, np.generic):  # such as one from np.geomspace
            value = value.item()
        whole = isinstance(value, int) and not isinstance(value, bool)
        return float(value) if whole and types.get(key) is float else value

    return {key: freeze(key, value) for key, value in given.items()}


def require_known(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raises a ValueError that lists the unknown names, each with the nearest known ones."""
    for problem in unknown_names(what, given, known):
        raise ValueError(problem)


def unknown_names(what: str, given: Iterable[str], known: Iterable[str]) -> Iterable[str]:
    """Yields one message that lists all unknown names, if there are any."""
    known, complaints = list(known), []
    for name in given:
        if name in known:
            continue
        if near := difflib.get_close_matches(name, known, n=3, cutoff=0.5):
            hint = f"did you mean {either(near)}?"
        elif len(known) <= 10:
            hint = "expected one of " + ", ".join(known)
        else:
            hint = f"nothing like it among {len(known)} known ones"
        complaints.append(f"{name!r} ({hint})")
    if complaints:
        yield f"Unknown {what}: {', '.join(complaints)}"


def either(names: Iterable[str]) -> str:
    """The names as a message lists them: "'a' or 'b'"."""
    return " or ".join(repr(name) for name in names)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a nested mapping by dotted key; an empty mapping contributes none."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def is_positive(value: Any) -> TypeGuard[float]:
    """Whether a value is a finite number above 0."""
    return isinstance(value, int | float) and value is not True and 0 < value < math.inf


def not_divisible(name: str, value: int, divisor_name: str, divisor: int) -> str:
    """The message for a value that another one must divide."""
    return (
        f"{name}={value} is not divisible by {divisor_name}={divisor}; choose a divisor, such as "
        + nearest(divisors(value), divisor)
    )


def divisors(number: int) -> list[int]:
    """All divisors of a positive number, in rising order."""
    low = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*low, *(number // d for d in low)})


def nearest(choices: Iterable[int], wanted: int) -> str:
    """The two choices nearest to `wanted`, for a message: "2 or 4"."""
    return " or ".join(map(str, sorted(sorted(choices, key=lambda c: abs(c - wanted))[:2])))
