"""What a knob raises when a model cannot take a value."""


class KnobError(ValueError):
    """A knob value that this model cannot take; the message says which values it can."""
