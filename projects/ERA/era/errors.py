"""The one exception for a user's mistake."""


class UserError(ValueError):
    """A user's mistake, told in one clear sentence.

    The sentence names the key or the file, what was found, what was expected and what to do. The
    command-line tools print it without a traceback and exit with status 2; library callers catch it as
    a ``ValueError``.
    """
