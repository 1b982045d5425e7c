"""Checks of what is typed and read: switches, numbers, words, patterns, dtypes, JSON.

A check is `(method, name, value) -> value`: the value as it is kept, or a ValueError
that names all three.  A field of a transform declares its own by its type,

    rank: Count                     dropout: Rate
    alpha: Positive | None          init: Annotated[str, one_of(INITS)]

and `check_fields` runs them all, whether the value came by a call or from a file.
Numbers of NumPy and JAX go wherever Python's go, and are kept as Python's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

Check = Callable[[str, str, Any], Any]

# All is computed in float32, or more.
LARGEST = float(np.finfo(np.float32).max)
LEAST = float(np.finfo(np.float32).tiny)
# Characters of a value in a message.
_MOST_SHOWN = 200


def refusal(method: str, name: str, value: Any, expected: str) -> ValueError:
    """What each check raises."""
    return ValueError(f"{method}: {name}={shown(value)}: expected {expected}")


def shown(value: Any) -> str:
    """Its repr, of bounded length."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # of more digits or levels than Python writes
        text = f"a {type(value).__name__} of thousands of digits or levels"
    return text if len(text) <= _MOST_SHOWN else text[:_MOST_SHOWN] + " ..."


def plain(value: Any) -> Any:
    """A number of NumPy or JAX as Python's; anything else as it is."""
    if not isinstance(value, (np.generic, np.ndarray, jax.Array)) or np.ndim(value):
        return value
    for kind, make in ((np.bool_, bool), (jnp.integer, int), (jnp.floating, float)):
        if jnp.issubdtype(value.dtype, kind):
            with contextlib.suppress(jax.errors.JAXTypeError):  # of what JAX traces
                return make(value)
    return value


def read_json(data: bytes) -> Any:
    """What JSON says, as strictly as the format is meant.

    Raises ValueError with the reason for another encoding, a key that is there twice,
    nesting deeper than 127, numbers that JSON or float64 does not have, and half
    characters: all of which Python's reader would take.
    """
    text = data.decode("utf-8")
    try:
        read = json.loads(
            text,
            object_pairs_hook=_once,
            parse_int=lambda x: -0.0 if x == "-0" else int(x),
            parse_float=_finite,
            parse_constant=_finite,
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if "\\ud" in text.lower():  # escapes of two halves of a character
        json.dumps(read, ensure_ascii=False).encode("utf-8")
    level = [read]
    for _ in range(_DEEPEST):
        level = [y for x in level for y in _inside(x)]
    if any(isinstance(x, (dict, list)) for x in level):
        raise ValueError("nested too deeply")
    return read


# Dicts and lists in one another: as many as the readers written in Rust take.
_DEEPEST = 127


def _inside(x: Any) -> Iterable[Any]:
    if isinstance(x, dict):
        return x.values()
    return x if isinstance(x, list) else ()


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        names = [k for k, _ in pairs]
        twice = next(k for k in names if names.count(k) > 1)
        raise ValueError(f"{shown(twice)} is there twice")
    return out


def _finite(text: str) -> float:
    value = float(text)
    if not np.isfinite(value):
        raise ValueError(f"{shown(text)} is no number of JSON")
    return value


# --- switches and numbers ------------------------------------------------------------


def check_flag(method: str, name: str, value: Any) -> bool:
    value = plain(value)
    if not isinstance(value, bool):
        raise refusal(method, name, value, "True or False")
    return value


def whole(least: int | None, what: str) -> Check:
    """The check that a value is an integer; `what` is for the message."""

    def check(method: str, name: str, value: Any) -> int:
        value = plain(value)
        if (
            isinstance(value, bool)
            or not isinstance(value, int)
            or (least is not None and value < least)
            or abs(value) >= 2**63
        ):
            raise refusal(method, name, value, what)
        return value

    return check


def real(fits: Callable[[float], bool], what: str) -> Check:
    """The check that a value is a finite number for which `fits` is true."""

    def check(method: str, name: str, value: Any) -> int | float:
        value = plain(value)
        known = isinstance(value, (int, float)) and not isinstance(value, bool)
        # NaN is within no bounds.
        if not known or not -LARGEST <= value <= LARGEST or not fits(value):
            raise refusal(method, name, value, what)
        return value

    return check


check_whole = whole(None, "an integer")
check_count = whole(1, "an integer of at least 1")
check_index = whole(0, "an integer, 0 or more")
check_number = real(lambda x: True, "a finite number")
check_positive = real(lambda x: x >= LEAST, "a number above 0 that float32 holds")
check_fraction = real(lambda x: 0 < x < 1, "between 0 and 1")
# In float32, where all but 1 may be 1.
check_rate = real(
    lambda x: 0 <= x and bool(np.float32(x) < 1),
    "a rate from 0 up to, not including, 1",
)

Count = Annotated[int, check_count]
CountOrZero = Annotated[int, check_index]
Positive = Annotated[float, check_positive]
Rate = Annotated[float, check_rate]

# --- words ---------------------------------------------------------------------------


def check_word(method: str, name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise refusal(method, name, value, "a word in quotes")
    return str(value)


def one_of(known: Iterable[str]) -> Check:
    """The check that a word is one of these."""
    words = tuple(known)

    def check(method: str, name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in words:
            raise refusal(method, name, value, f"one of {words}")
        return str(value)

    return check


def check_regex(text: str) -> None:
    """Raises ValueError with the reason for which `text` is no regular expression."""
    try:
        re.compile(text)
    # The last two: of nesting, and of counts, beyond what `re` takes.
    except (re.error, ValueError, RecursionError, OverflowError) as error:
        raise ValueError(str(error)) from None


def _pattern_of(check: Check) -> Check:
    def check_pattern(
        method: str, name: str, value: Any
    ) -> tuple[tuple[str, Any], ...]:
        """A {regex: value} mapping as a hashable tuple; the first match wins."""
        value = () if value is None else value
        items = value.items() if isinstance(value, Mapping) else value
        if not isinstance(value, (Mapping, tuple)) or not all(
            isinstance(x, tuple) and len(x) == 2 and isinstance(x[0], str)
            for x in items
        ):
            raise refusal(
                method, name, value, "{regular expression for the whole path: value}"
            )
        for regex, _ in items:
            try:
                check_regex(regex)
            except ValueError as error:
                raise ValueError(
                    f"{method}: {name} key {shown(regex)} is no regular expression: "
                    f"{error}"
                ) from None
        return tuple(
            (str(k), check(method, f"{name}[{shown(k)}]", v)) for k, v in items
        )

    return check_pattern


Counts = Annotated[Any, _pattern_of(check_count)]
Positives = Annotated[Any, _pattern_of(check_positive)]

# --- dtypes --------------------------------------------------------------------------


def check_float(name: str, dtype: Any, argument: str = "dtype") -> None:
    """Raises ValueError unless dtype is floating, or None."""
    if dtype is not None:
        check_floating(name, argument, dtype)


def check_floating(method: str, name: str, value: Any) -> str:
    """The name of a floating-point dtype that JAX has."""
    try:
        dtype = jnp.dtype(value)
    except Exception:  # NumPy reads words in many ways, each with errors of its own
        dtype = None
    # float128 is NumPy's alone.
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize > 8:
        raise refusal(method, name, value, "a floating-point dtype")
    return dtype.name


Floating = Annotated[Any, check_floating]

# --- the fields of a dataclass -------------------------------------------------------

_BY_TYPE: dict[Any, Check] = {
    bool: check_flag,
    int: check_whole,
    float: check_number,
    str: check_word,
}


def check_fields(name: str, made: Any) -> None:
    """Each field of a frozen dataclass by the check that its type declares.

    What is neither a plain type nor has a check (a field that holds transforms) is the
    class' own affair.
    """
    for field, (check, optional) in declared(type(made)).items():
        value = getattr(made, field)
        if value is None and optional:
            continue
        object.__setattr__(made, field, check(name, field, value))


@functools.cache
def declared(cls: type) -> dict[str, tuple[Check, bool]]:
    """{field: (its check, whether None may stand there)}, as the types say."""
    hints = typing.get_type_hints(cls, include_extras=True)
    out = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        hint, optional = hints[field.name], False
        if typing.get_origin(hint) in (typing.Union, types.UnionType):
            others = [x for x in typing.get_args(hint) if x is not type(None)]
            optional = len(others) < len(typing.get_args(hint))
            hint = others[0] if len(others) == 1 else hint
        if typing.get_origin(hint) is Annotated:
            out[field.name] = hint.__metadata__[-1], optional
        elif hint in _BY_TYPE:
            out[field.name] = _BY_TYPE[hint], optional
    return out
