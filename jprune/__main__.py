"""``python -m jprune`` runs the command line ``jprune``."""

import sys

from jprune.cli import main

if __name__ == "__main__":
    sys.exit(main())
