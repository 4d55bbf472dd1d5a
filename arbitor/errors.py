"""The one exception for mistakes that the user can mend."""


class UserError(ValueError):
    """A mistake in what the user gave: a config key, a file, a command line.

    The message is one line that names the culprit, what was expected and what to do. Entry points
    print it without a stack trace and exit with code 2.
    """
