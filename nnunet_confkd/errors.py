"""The error for bad input."""


class InputError(ValueError):
    """What the user gave does not allow what was asked for. The text names the file, what is wrong and what to do.

    The command line prints it without a traceback; any other exception is a fault of the program.
    """
