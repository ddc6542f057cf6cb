class InputError(ValueError):
    """What the caller gave is wrong: commands print its one line and exit with code 2."""
