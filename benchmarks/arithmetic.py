"""What a selection costs on more devices than anyone has at hand: arithmetic, checked on eight in the tests."""

import math
import re
from typing import NamedTuple

PROBES = 1  # thresholds that a pass counts against where the scores are sharded
COUNT = 4  # bytes of a count: uint32
COPIES = 1  # of the scores, at most, that the compiled program for eight CPU devices holds beside them


class Selection(NamedTuple):
    """The cost of one exact global selection, scores to masks; bytes are of one device.

    Attributes:
      scores: bytes of the scores, float32.
      masks: bytes of the masks.
      moved_per_pass: bytes of counts that a pass all-reduces.
      passes: at most, over the scores; the search for the threshold, then for where ties are cut.
      moved: bytes that all passes all-reduce, at most.
      extra: bytes beside scores and masks, at most, as the CPU backend compiles it.
      gathered: bytes that gathering the scores to sort them would bring to every device.
    """

    scores: int
    masks: int
    moved_per_pass: int
    passes: tuple[int, int]
    moved: int
    extra: int
    gathered: int


def selection(parameters: int, leaves: int, devices: int) -> Selection:
    """Work out the cost of a selection over a tree that is sharded evenly over all devices.

    Every pass but two of a search at least halves the interval it searches: 2^32 keys, then the
    positions of all parameters.

    >>> selection(10**11, leaves=1_000, devices=1_024).moved_per_pass
    4000
    """
    each = math.ceil(parameters / devices)
    per_pass = PROBES * leaves * COUNT
    passes = 32 + 2, math.ceil(math.log2(parameters + 1)) + 2
    return Selection(
        scores=4 * each,
        masks=each,
        moved_per_pass=per_pass,
        passes=passes,
        moved=sum(passes) * per_pass,
        extra=COPIES * 4 * each,
        gathered=4 * (parameters - each),
    )


def reductions(compiled: str) -> list[int]:
    """Bytes of the result of every all-reduce in the text of a compiled program.

    >>> reductions("%a = (u32[], u32[2]) all-reduce(%x, %y), channel_id=1")
    [12]
    """
    sizes = {"pred": 1, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
    found = []
    for result in re.findall(r"= (.*?) all-reduce(?:-start)?\(", compiled):
        shapes = re.findall(r"(\w+)\[([\d,]*)\]", result)
        found.append(sum(sizes[kind] * math.prod(map(int, filter(None, dims.split(",")))) for kind, dims in shapes))
    return found
