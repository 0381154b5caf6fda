"""Validate plain values against the dataclasses of options: strictly, without coercion and without an unknown key.

Apart from `schema.py`, so that who only needs the retention rules of a run (`python -m runner ls`) imports pydantic
alone, and neither omegaconf nor every option there is.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from typing import Annotated, Any, get_args, get_type_hints

from pydantic import Field, TypeAdapter, ValidationError

from runner.checkpoint.retention import RetentionRule

BY_KIND = Field(discriminator="kind")

Retention = Mapping[str, Annotated[RetentionRule, BY_KIND]]


@functools.cache
def adapter_of(schema: Any) -> TypeAdapter[Any]:
    """Return pydantic's validator and serializer of a type, which forbids unknown keys in every dataclass of it."""
    for option in _find_dataclasses(schema):
        # The defaults would drop an unknown key in silence, and take an endless number for any that is larger.
        option.__pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False}
    return TypeAdapter(schema)


def validate_plain(schema: Any, plain: Any) -> Any:
    """Return plain JSON values as the type `schema`. Raises pydantic's ValidationError where they are no such thing."""
    # As JSON, not as Python values: `strict` then takes a list for a tuple and a whole number for a float.
    return adapter_of(schema).validate_json(json.dumps(plain), strict=True)


def validate_saved(schema: Any, plain: Any) -> Any:
    """Return plain JSON values out of a file as the type `schema`. Raises ValueError, in one line, where it cannot."""
    try:
        return validate_plain(schema, plain)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _find_dataclasses(annotation: Any) -> Iterator[Any]:
    """Yield every dataclass in a type, also those in the fields of others."""
    if is_dataclass(annotation):
        yield annotation
        for hint in get_type_hints(annotation).values():
            yield from _find_dataclasses(hint)
    for argument in get_args(annotation):
        yield from _find_dataclasses(argument)
