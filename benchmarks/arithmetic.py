"""Compute the cost of a selection on many devices by arithmetic, which the tests check on eight."""

import math
import re
from typing import NamedTuple

PROBES = 15  # thresholds per pass on GPUs and TPUs; 1 on CPUs if the scores are sharded
PLACES = 0xFF000003  # float32 values from -inf to +inf, and one lower place
COUNT = 4  # bytes of a count: uint32
COPIES = 1  # additional copies of the scores, at most, in the compiled program for eight CPU devices


class Selection(NamedTuple):
    """The cost of one exact global selection, from scores to masks; bytes are per device.

    Attributes:
      scores: bytes of the scores, float32.
      masks: bytes of the masks.
      moved_per_pass: bytes of counts that a pass all-reduces.
      passes: reads of the scores: the search for the threshold (on CPUs at most), then ties if they are cut.
      moved: bytes that the search all-reduces; ties add the counts of one line of each leaf.
      extra: upper bound of the bytes in addition to scores and masks, as compiled by the CPU backend.
      gathered: bytes that every device would receive if the scores were gathered to sort them.
    """

    scores: int
    masks: int
    moved_per_pass: int
    passes: tuple[int, int]
    moved: int
    extra: int
    gathered: int


def selection(parameters: int, leaves: int, devices: int, probes: int = PROBES) -> Selection:
    """Compute the cost of a selection over a tree that is sharded evenly over all devices.

    A pass leaves one of ``probes + 1`` parts of the places. With one probe, as on CPUs, the probe need not be in the
    middle, but all except two passes at least halve the interval.

    >>> selection(10**11, leaves=1_000, devices=1_024).moved_per_pass
    60000
    """
    each = math.ceil(parameters / devices)
    per_pass = probes * leaves * COUNT
    search = math.ceil(math.log(PLACES, probes + 1)) + (2 if probes == 1 else 0)
    return Selection(
        scores=4 * each,
        masks=each,
        moved_per_pass=per_pass,
        passes=(search, 2),
        moved=search * per_pass,
        extra=COPIES * 4 * each,
        gathered=4 * (parameters - each),
    )


def reductions(compiled: str) -> list[int]:
    """Return the bytes of the result of every all-reduce in the text of a compiled program.

    >>> reductions("%a = (u32[], u32[2]) all-reduce(%x, %y), channel_id=1")
    [12]
    """
    sizes = {"pred": 1, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
    found = []
    for result in re.findall(r"= (.*?) all-reduce(?:-start)?\(", compiled):
        shapes = re.findall(r"(\w+)\[([\d,]*)\]", result)
        found.append(sum(sizes[kind] * math.prod(map(int, filter(None, dims.split(",")))) for kind, dims in shapes))
    return found
