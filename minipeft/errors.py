class InputError(ValueError):
    """What the caller gave is wrong: commands print its one line and exit with code 2."""


class SaidElsewhere(InputError):
    """Another process of the same training has said what is wrong; this one ends as that does, without a word."""
