"""The one exception for a user's mistake. Everything else that is raised is a fault of the program."""


class InputError(ValueError):
    """The input cannot be used. The message, one line, says what was given, what is accepted and what to do.

    Command-line programs print it without a traceback and exit with status 2.
    """
