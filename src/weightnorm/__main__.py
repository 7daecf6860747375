"""The command line's entry: ``weightnorm`` and ``python -m weightnorm``."""

import sys
from importlib.util import find_spec

_EXTRA = ("click", "rich", "matplotlib", "jinja2")  # what the ``compare`` extra brings


def main() -> None:
    """Run the command line and exit with its code."""
    missing = [name for name in _EXTRA if find_spec(name) is None]
    if missing:
        print(f"weightnorm: {', '.join(missing)} not installed; pip install 'weightnorm[compare]'", file=sys.stderr)
        sys.exit(2)
    from weightnorm.cli import run  # it needs click

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
