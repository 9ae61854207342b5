"""How the studies' command lines end: with a status, and an error told in a line. What they do is theirs."""

import sys
from collections.abc import Callable

from jprune.cli import end_quietly


def exit_status(work: Callable[[], None]) -> int:
    """Do the work of a command; 0, or 1 where it could not be done, or 130 where it was interrupted."""
    try:
        work()
        sys.stdout.flush()
    except BrokenPipeError:
        return end_quietly()
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; give the same command again to go on", file=sys.stderr)
        return 130
    return 0
