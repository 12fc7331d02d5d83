"""The one error that a user can cause."""


class InputError(ValueError):
    """Something a user gave cannot be used; the message is one line.

    It says what was got, what is allowed and what to do. The command line prints
    it without a traceback; every other exception is a fault of this software.
    """
