"""The one error that the command line shows as bad input (exit code 2)."""


class InputError(ValueError):
    """What the user gave cannot work; the message names the argument, its value and what would do."""
