"""What the studies' command lines share: how a shard is written, and how they end. What they do is theirs."""

import sys
from collections.abc import Callable

from jprune.cli import end_quietly


def exit_status(work: Callable[[], None]) -> int:
    """Do the work of a command; 0, or 1 where it could not be done, told in a line, or 130 where it was interrupted."""
    try:
        return quietly(work)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; give the same command again to go on", file=sys.stderr)
        return 130


def quietly(work: Callable[[], None]) -> int:
    """Do the work of a command and print all that it says; 0, or 1 where nobody reads it any more (``| head``)."""
    try:
        try:
            work()
        except SystemExit:  # from --help or a wrong option; what they printed may still wait
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    except BrokenPipeError:
        return end_quietly()
    return 0


def parse_shard(shard: str) -> tuple[int, int]:
    """Which part of how many a process takes.

    Raises:
      ValueError: it is not i/n, or there is no such part.

    >>> parse_shard("1/4")
    (1, 4)
    """
    i, _, n = shard.partition("/")
    if not (i.isdecimal() and n.isdecimal() and int(i) < int(n)):
        raise ValueError(f"shard={shard!r} must be i/n with 0 <= i < n")
    return int(i), int(n)
