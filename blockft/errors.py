"""The one error that is shown to a user without a traceback."""


class UserError(Exception):
    """A mistake of the user, in one sentence: what is wrong, what was found, what is allowed, how to mend it.

    The command line prints it on stderr and exits with code 2.
    """
