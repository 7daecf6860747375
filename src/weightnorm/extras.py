"""Libraries that come with an extra: asked for where they are needed, told of in one line where they are missing."""

from importlib.util import find_spec

from weightnorm.errors import UserError


def require(extra: str, *libraries: str) -> None:
    """Raise UserError if libraries are missing.

    Args:
        extra: what brings them.
        libraries: the names they are imported by.
    """
    missing = [name for name in libraries if find_spec(name) is None]
    if missing:
        raise UserError(f"{', '.join(missing)} not installed; pip install 'weightnorm[{extra}]'")
