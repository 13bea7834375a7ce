"""The kinds of value a sweep can hold, each with the words that say what is allowed when something else is written."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    BeforeValidator,
    Field,
    GetJsonSchemaHandler,
    StringConstraints,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    WrapValidator,
)
from pydantic_core import PydanticCustomError
from pydantic_core.core_schema import CoreSchema

T = TypeVar("T")

# Ends the description of what may be one value or several.
OR_A_LIST = ", or a list of them"


def not_expected(words: str, choices: tuple[str, ...] = ()) -> PydanticCustomError:
    """The error that is printed as `must be <words>, got ...`; `choices` serve to find the nearest name."""
    return PydanticCustomError("expected", "{words}", {"words": words, "choices": choices})


def refused(words: str) -> PydanticCustomError:
    """The error that is printed as it stands."""
    return PydanticCustomError("refused", "{words}", {"words": words})


def expecting(words: str, choices: tuple[str, ...] = ()) -> WrapValidator:
    """Replaces whatever a type has to say about a wrong value by one plain description of the right ones."""

    def check(value: object, handler: ValidatorFunctionWrapHandler) -> object:
        try:
            return handler(value)
        except ValidationError:
            raise not_expected(words, choices) from None

    return WrapValidator(check)


def one_of(literal: Any, also: str = "") -> WrapValidator:
    """`expecting` for a Literal type: lists its names."""
    choices = get_args(literal)
    return expecting("one of " + ", ".join(choices) + also, choices)


def listed(value: object) -> object:
    """YAML lists as tuples, so that the whole sweep is immutable."""
    if isinstance(value, tuple):
        return value
    if not isinstance(value, list):
        raise PydanticCustomError("not_a_list", "must be a list")
    if not value:
        raise refused("must not be an empty list, name at least one value or leave the key out")
    return tuple(value)


def one_or_more(value: object, handler: ValidatorFunctionWrapHandler) -> object:
    """A list as `listed` has it, or a value that stands alone as a list of one.

    What is wrong with a value that stands alone is reported at its own key, in the words of `expecting` for an item,
    not at the key of an item that nobody wrote.
    """
    if isinstance(value, list | tuple):
        return handler(listed(value))
    try:
        return handler((value,))
    except ValidationError as error:
        context = error.errors()[0]["ctx"]
        raise not_expected(context["words"] + OR_A_LIST, context["choices"]) from None


def named(value: object) -> object:
    """A plain name is short for a mapping that only holds a name."""
    if isinstance(value, str):
        return {"name": value}
    if not isinstance(value, dict):
        raise not_expected("a name, or a mapping with a name")
    return value


def unless_off(value: object) -> object:
    """`off` as None. YAML 1.1 reads a bare off as false; a quoted one stays text."""
    if value is False or value == "off":
        return None
    if not isinstance(value, dict):
        raise not_expected("a mapping of keys, or off")
    return value


def block_setting(value: object) -> object:
    """A number of blocks, or the explicit indices of the blocks that run."""
    if isinstance(value, list):
        return block_indices(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise not_expected("a number of blocks >= 1 or a list of block indices such as [0, 1, 3]")
    return value


def block_indices(value: object) -> object:
    """Block indices as a tuple; an order other than the model's, or a block twice, is refused, not repaired."""
    if not isinstance(value, list) or not value:
        raise not_expected("a list of block indices such as [0, 1, 3]")
    if any(isinstance(index, bool) or not isinstance(index, int) or index < 0 for index in value):
        raise not_expected("a list of block indices, each a whole number >= 0")
    if value != sorted(set(value)):
        raise not_expected("a list of block indices in ascending order, each once")
    return tuple(value)


def block_positions(value: object) -> object:
    """Blocks that are named by index or, below 0, from the last; each once, perhaps none."""
    if not isinstance(value, list) or any(isinstance(index, bool) or not isinstance(index, int) for index in value):
        raise not_expected("a list of block indices such as [0, -1], where -1 is the last")
    if len(set(value)) < len(value):
        raise not_expected("a list of block indices, each once")
    return tuple(value)


def image_size(value: object) -> object:
    """Height and width in pixels, written with an x between them."""
    if not isinstance(value, str) or not re.fullmatch(r"[1-9][0-9]{0,5}x[1-9][0-9]{0,5}", value):
        raise not_expected("HEIGHTxWIDTH in pixels such as 560x336")
    return value


class AlsoAllowed:
    """Tells editors, through the JSON Schema, of a short form that a validator turns into the full one."""

    def __init__(self, *schemas: dict[str, object]) -> None:
        self.schemas = schemas

    def __get_pydantic_json_schema__(self, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        full = handler(core_schema)
        forms = [form for form in full.get("anyOf", [full]) if form != {"type": "null"}]
        return {"anyOf": [*self.schemas, *forms]}


class OneAllowed:
    """Tells editors, through the JSON Schema, that an item of a list may stand alone."""

    def __get_pydantic_json_schema__(self, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        full = handler(core_schema)
        return {"anyOf": [full["items"], {**full, "minItems": 1, "uniqueItems": True}]}


Text = Annotated[str, StringConstraints(min_length=1), expecting("text")]
SafeName = Annotated[
    str,
    StringConstraints(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$", max_length=100),
    expecting("at most 100 letters, digits, dots, dashes and underscores, not starting with a dot"),
]
CountInt = Annotated[int, Field(ge=1), expecting("a whole number >= 1")]
NaturalInt = Annotated[int, Field(ge=0), expecting("a whole number >= 0")]
SeedInt = Annotated[int, Field(ge=0, lt=2**32), expecting("a whole number from 0 to 4294967295")]
PositiveNumber = Annotated[float, Field(gt=0, allow_inf_nan=False), expecting("a number > 0")]
Fraction = Annotated[float, Field(gt=0, lt=1), expecting("a number between 0 and 1, both excluded")]
Flag = Annotated[bool, expecting("true or false")]
WorkerCount = Annotated[
    Annotated[int, Field(ge=1)] | Literal["all"], expecting("a whole number >= 1, or all", choices=("all",))
]
ImageSize = Annotated[
    str, BeforeValidator(image_size), WithJsonSchema({"type": "string", "pattern": "^[1-9][0-9]{0,5}x[1-9][0-9]{0,5}$"})
]
BlockPositions = Annotated[
    tuple[int, ...],
    BeforeValidator(block_positions),
    WithJsonSchema({"type": "array", "items": {"type": "integer"}, "uniqueItems": True}),
]
BlockSetting = Annotated[
    int | tuple[int, ...],
    BeforeValidator(block_setting),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 1},
                {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1, "uniqueItems": True},
            ]
        }
    ),
]
# The length is checked by `listed`, before the items are: pydantic would count only those that are right.
Entries = Annotated[tuple[T, ...], Field(json_schema_extra={"minItems": 1}), BeforeValidator(listed)]
Levels = Annotated[
    tuple[T, ...], Field(json_schema_extra={"minItems": 1, "uniqueItems": True}), BeforeValidator(listed)
]
OneOrMore = Annotated[tuple[T, ...], WrapValidator(one_or_more), OneAllowed()]
