"""The error that is the user's to put right."""


class UserError(Exception):
    """What was asked for cannot be done; the message is one line: what is wrong, what was got and what to do."""
