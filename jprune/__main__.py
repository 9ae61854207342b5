"""``python -m jprune`` runs the command line ``jprune``."""

import sys

from jprune.cli import main

sys.exit(main())
