"""The error that is the user's to put right, and the exit codes of the command line."""

USER_ERROR = 2
INTERRUPTED = 130  # by Ctrl-C, as shells have it


class UserError(Exception):
    """What was asked for cannot be done; the message is one line: what is wrong, what was got and what to do."""
