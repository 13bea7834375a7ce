"""Prompt templates: `{name}` stands for a column of the sample, and a line whose column is empty is left out.

    {question}, {options}   the question; the options as lines `A. text`
    {hint}                  any other column of the data set by its own name; a list is joined by commas
    {?hint} and {!hint}     write nothing: their line stands only if the column is filled, or only if it is empty

A line is left out, with its line break, if it names a column that the sample leaves empty. So
`"{hint}\\n{question}"` is the question alone where there is no hint.
"""

import re
from collections.abc import Mapping

# Braces with anything else in them, such as quotes, are text.
_PLACE = re.compile(r"\{(?P<condition>[?!]?)(?P<name>[^\W\d][\w .-]*)\}")


def names_in(template: str) -> tuple[str, ...]:
    """What a template names, each once."""
    return tuple(dict.fromkeys(place["name"] for place in _PLACE.finditer(template)))


def fill(template: str, values: Mapping[str, str]) -> str:
    """The template with the values in place; what stands in a value is not looked at.

    Raises:
        ValueError: the template names something that has no value.
    """
    for name in names_in(template):
        if name not in values:
            raise ValueError(f"the prompt names {{{name}}}, which has no value (there is: {', '.join(values)})")

    def stands(line: str) -> bool:
        return all(bool(values[place["name"]]) != (place["condition"] == "!") for place in _PLACE.finditer(line))

    def value(place: re.Match[str]) -> str:
        return "" if place["condition"] else values[place["name"]]

    return "\n".join(_PLACE.sub(value, line) for line in template.split("\n") if stands(line))
