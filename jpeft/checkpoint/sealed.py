"""JSON files that carry a digest of themselves.

    {"sha256": digest, **content}    digest = sha256(content, keys sorted, no spaces)

The digest is of what the file says, not of its bytes: other spaces change nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jpeft.types import DamagedError

DIGEST = "sha256"


def seal(content: Mapping[str, Any]) -> str:
    """The text of a file that says `content`; TypeError for what JSON cannot hold.

    Numbers may be NumPy's or JAX's.
    """
    plain = json.loads(json.dumps(content, default=_number))
    return json.dumps({DIGEST: _digest(plain), **plain}, indent=1)


def unseal(file: Any, *, unsealed: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """What a sealed file says, and under DIGEST what it told of itself.

    unsealed: whether a file without a digest is one that had none when it was written.
    Raises DamagedError, naming the file, if it says anything else than was written.
    """
    try:
        content = json.loads(file.read_bytes().decode())
    except FileNotFoundError as error:
        raise DamagedError(f"{file}: missing; the checkpoint is incomplete") from error
    except OSError as error:
        raise DamagedError(f"{file}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{file}: damaged: it is no JSON ({error})") from error
    if not isinstance(content, dict):
        raise DamagedError(f"{file}: damaged: it holds a {type(content).__name__}")
    if DIGEST not in content and unsealed(content):
        return content
    told = content.pop(DIGEST, None)
    if told != (found := _digest(content)):
        raise DamagedError(
            f"{file}: damaged: it says {DIGEST} {told!r:.70}, and its content has "
            f"{found!r}; what it holds was changed after it was saved"
        )
    return {**content, DIGEST: told}


def metadata_of(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """The caller's own data, as it will be read again.

    Raises ValueError where two keys would become one, and for what JSON cannot hold.
    """
    _check_keys(given := dict(metadata or {}))
    try:
        return json.loads(json.dumps(given, default=_number))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"metadata: expected what JSON can hold, numbers, strings, lists and "
            f"dictionaries of them: {error}"
        ) from error


def _check_keys(value: Any) -> None:
    if isinstance(value, Mapping):
        written = list(json.loads(json.dumps(dict.fromkeys(value))))
        if len(written) < len(value):
            raise ValueError(
                f"metadata: of the keys {list(value)[:4]} two are written alike in "
                "JSON; make every key a string"
            )
        for x in value.values():
            _check_keys(x)
    elif isinstance(value, (list, tuple)):
        for x in value:
            _check_keys(x)


def _number(x: Any) -> Any:
    if isinstance(x, (np.generic, np.ndarray, jax.Array)):
        return x.tolist()
    raise TypeError(f"{type(x).__name__} is not JSON serializable")


def _digest(content: Any) -> str:
    try:
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    except RecursionError as error:
        raise DamagedError("a file is nested too deeply to be read") from error
    return hashlib.sha256(text.encode()).hexdigest()
