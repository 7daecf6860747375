"""The command line's entry: ``weightnorm`` and ``python -m weightnorm``."""

import sys

from weightnorm.errors import USER_ERROR, UserError
from weightnorm.extras import require


def main() -> None:
    """Run the command line and exit with its code."""
    try:
        require("compare", "click", "rich")  # or [checkpoints], which has less
    except UserError as error:
        print(f"weightnorm: {error}", file=sys.stderr)
        sys.exit(USER_ERROR)
    from weightnorm.cli import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
