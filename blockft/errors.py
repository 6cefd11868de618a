"""The one error that is shown to a user without a traceback."""


class UserError(Exception):
    """A mistake of the user: one sentence that says what is wrong, what was found, what is allowed and how to mend it.

    The command line prints it on stderr and exits with code 2.
    """
