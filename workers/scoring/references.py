"""What every rule asks of the reference answers."""

from collections.abc import Sequence


def require_answers(answers: Sequence[str]) -> None:
    """Raise ValueError if there are none: no score would be right."""
    if not answers:
        raise ValueError("no answers to score against")
