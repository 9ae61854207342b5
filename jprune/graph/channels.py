"""Find the channels of different parameters that must be removed together.

Every index of every axis of every array in a traced program has an integer id. Tracing records which ids are
equal (``tie``), which are never removed (``freeze``) and which are combinations of others (``product``, from
``reshape``). ``solve`` turns this into classes of ids once, at the end, so the order of the equations does not
matter. Removing a class removes every index that has one of its ids, in every array.

Ids below ``FIRST_CHANNEL`` are never removed; ``Constraints.reasons`` has the reason for each of them.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

FIRST_CHANNEL = 1024
_BLOCKS = "removed only in whole blocks: a reshape merges it with an outer axis, whose indices are removed instead"
_TOGETHER = "all of its indices can only be removed together"
_INSIDE = "inputs of a group are removed with the whole group"

Ids = Int32[np.ndarray, " n"]


class Member(NamedTuple):
    """The axis of one leaf that a group of channels belongs to.

    Attributes:
      path: the leaf's path.
      axis: the axis of the leaf.
      indices: for every channel of the group, the indices along the axis that belong to it.
    """

    path: str
    axis: int
    indices: Int32[np.ndarray, "channels indices"]

    def __repr__(self) -> str:
        return f"Member(path={self.path!r}, axis={self.axis}, indices=int32{list(self.indices.shape)})"


@dataclasses.dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels that can be removed; each is removed from all members together.

    Attributes:
      size: number of channels.
      members: the axes of parameters that lose indices with a channel.
      state: the same for the leaves of ``state``.
      exact: whether the program at the smaller sizes equals the model with these channels masked to zero.
      kind: "channels" if a channel is one index of every axis, "blocks" if it is several (heads, groups).
      why: remarks: why the group is not exact, or what removing a channel implies.
      roots: the class of ids of every channel, an entry of ``graph.roots``.
    """

    size: int
    members: tuple[Member, ...]
    exact: bool
    kind: str
    why: tuple[str, ...]
    roots: Int32[np.ndarray, " channels"] = dataclasses.field(repr=False)
    state: tuple[Member, ...] = ()


class LeafAxis(NamedTuple):
    """An axis of a leaf of the parameters or the state, with its ids."""

    path: str
    axis: int
    ids: np.ndarray
    is_state: bool


class GroupedConvolution(NamedTuple):
    """The channels of a convolution with groups, which loses whole groups or the same positions of every group.

    Attributes:
      features: ids of the channels that it reads, group by group.
      inside: ids of the axis of its kernel that has the inputs of one group.
      made: ids of its outputs, group by group.
      groups: number of groups.
      whole_is_exact: whether removing whole groups is the same as masking them.
      positions_are_exact: the same for positions.
    """

    features: Ids
    inside: Ids
    made: Ids
    groups: int
    whole_is_exact: bool
    positions_are_exact: bool

    def ties(self, whole: bool, frozen: Ids) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the pairs of axes that lose the same indices; ``frozen`` is for ``inside`` where groups go whole."""
        features, made = (ids.reshape(self.groups, -1) for ids in (self.features, self.made))
        if whole:
            columns = [*features.T[1:], *made.T]
            return [(self.inside, frozen), *((features[:, 0], column) for column in columns)]
        inputs = [(self.inside, row) for row in features]
        return inputs + [(made[0], row) for row in made[1:]]


class Mark(NamedTuple):
    """Lengths of the recorded lists, so that later entries can be undone."""

    ties: int
    products: int
    grouped: int
    notes: int
    consumed: int


class Constraints:
    """Ids and the constraints between them, collected while a program is traced."""

    def __init__(self) -> None:
        self.count = FIRST_CHANNEL
        self.reasons: list[str] = [""]
        self._ties: list[tuple[np.ndarray, np.ndarray]] = []
        self._products: list[_Product] = []
        self._grouped: list[GroupedConvolution] = []
        self._notes: list[tuple[np.ndarray, str]] = []
        self._consumed: list[np.ndarray] = []

    def fresh(self, size: int) -> np.ndarray:
        """Return new ids for an axis; an axis of size one is never removed."""
        if size <= 1:
            return self.frozen(size, "its size is one")
        self.count += size
        return np.arange(self.count - size, self.count, dtype=np.int32)

    def frozen(self, size: int, why: str) -> np.ndarray:
        """Return ids of an axis that is never removed, for a reason that ``print(graph)`` shows."""
        if why not in self.reasons:
            if len(self.reasons) == FIRST_CHANNEL - 1:
                why = self.reasons[-1]
            else:
                self.reasons.append(why)
        return np.broadcast_to(np.int32(self.reasons.index(why)), (size,))

    def tie(self, left: np.ndarray, right: np.ndarray) -> None:
        """Require that two axes of the same size lose the same indices."""
        if left is right or (is_frozen(left) and is_frozen(right)) or np.array_equal(left, right):
            return
        self._ties.append((left, right))

    def freeze(self, ids: np.ndarray, why: str) -> None:
        """Require that an axis never loses an index."""
        if not is_frozen(ids):
            self.tie(ids, self.frozen(len(ids), why))

    def product(self, flat: np.ndarray, factors: Sequence[np.ndarray]) -> None:
        """Require that ``flat``, which merges axes in row-major order, loses an index if one of them does."""
        if not (is_frozen(flat) and all(map(is_frozen, factors))):
            self._products.append(_Product(flat, tuple(factors)))

    def grouped(self, convolution: GroupedConvolution) -> None:
        """Require that the groups of a convolution keep equal sizes."""
        self._grouped.append(convolution)

    def note(self, ids: np.ndarray, why: str) -> None:
        """Record why removing one of these channels differs from masking it."""
        if not is_frozen(ids):
            self._notes.append((ids, why))

    def consume(self, ids: np.ndarray) -> None:
        """Record that these channels are read: summed over, or reduced."""
        if not is_frozen(ids):
            self._consumed.append(ids)

    def mark(self) -> Mark:
        """Return the current position, for ``rewind``."""
        products, grouped = len(self._products), len(self._grouped)
        return Mark(len(self._ties), products, grouped, len(self._notes), len(self._consumed))

    def rewind(self, mark: Mark) -> None:
        """Discard all records since ``mark``; ids stay allocated."""
        del self._ties[mark.ties :], self._products[mark.products :], self._grouped[mark.grouped :]
        del self._notes[mark.notes :], self._consumed[mark.consumed :]

    def solve(self) -> "Solution":
        """Find the classes of ids that are removed together.

        Convolutions with groups lose whole groups. Those that cannot lose any, because the groups are coupled or one of
        them stays, lose the same positions of every group instead.
        """
        solver = self._solved([True] * len(self._grouped))
        whole = [len(one.inside) == 1 or not _loses_nothing(solver, one.features) for one in self._grouped]
        if not all(whole):
            solver = self._solved(whole)
        read = np.zeros(self.count, bool)
        for ids in self._consumed:
            read[solver.label[ids]] = True
        noted: dict[str, list[np.ndarray]] = {}
        for ids, note in [*self._notes, *self._notes_of_groups(whole)]:
            noted.setdefault(note, []).append(solver.label[ids])
        notes = {note: np.unique(np.concatenate(roots)) for note, roots in noted.items()}
        why = solver.why(np.arange(self.count))
        return Solution(np.where(why > 0, 0, solver.label), solver.label, why, tuple(self.reasons), read, notes)

    def _solved(self, whole: Sequence[bool]) -> "_Solver":
        ties = list(self._ties)
        for convolution, entire in zip(self._grouped, whole, strict=True):
            ties += convolution.ties(entire, self.frozen(len(convolution.inside), _INSIDE))
        solver = _Solver(self.count, ties)
        _solve_products(solver, self._products, self.frozen(1, _BLOCKS)[0], self.frozen(1, _TOGETHER)[0])
        return solver

    def _notes_of_groups(self, whole: Sequence[bool]) -> list[tuple[np.ndarray, str]]:
        pairs = zip(self._grouped, whole, strict=True)
        inexact = [one for one, entire in pairs if not (one.whole_is_exact if entire else one.positions_are_exact)]
        return [(one.features, "a grouped convolution of a channel that is not zero when masked") for one in inexact]


class Solution(NamedTuple):
    """Classes of ids.

    Attributes:
      roots: the class of every id; 0 for every id that is never removed.
      labels: the class of every id, whether or not it can be removed.
      why: for every id an index into ``reasons`` that says why it is never removed; 0 if it can be removed.
      reasons: texts.
      read: whether any channel of a class (indexed by root) is summed over or reduced.
      notes: for every reason why removing differs from masking, the roots concerned.
    """

    roots: Int32[np.ndarray, " ids"]
    labels: Int32[np.ndarray, " ids"]
    why: Int32[np.ndarray, " ids"]
    reasons: tuple[str, ...]
    read: Bool[np.ndarray, " ids"]
    notes: Mapping[str, Int32[np.ndarray, " roots"]]


def channel_groups(
    axes: Sequence[LeafAxis], solution: Solution, stacked: Mapping[str, tuple[int, ...]]
) -> tuple[ChannelGroup, ...]:
    """Sort the classes of ids into groups whose channels have the same axes, numbers of indices and notes.

    Args:
      axes: every axis of every leaf.
      solution: the solved constraints.
      stacked: paths of leaves with stacked axes, for the remark that all layers lose the same channels.
    """
    if not axes:
        return ()
    roots = np.concatenate([solution.roots[axis.ids] for axis in axes])
    places = np.repeat(np.arange(len(axes)), [len(axis.ids) for axis in axes])
    indices = np.concatenate([np.arange(len(axis.ids)) for axis in axes])
    is_state = np.array([axis.is_state for axis in axes])
    wanted = solution.read[roots] & (roots > 0)
    in_params = np.zeros(len(solution.roots), bool)
    in_params[roots[~is_state[places]]] = True
    roots, places, indices = (x[wanted & in_params[roots]] for x in (roots, places, indices))
    # Each axis and each note has a random number. Channels with equal sums of these belong to one group.
    draw = np.random.default_rng(0)
    kinds = np.zeros(len(solution.roots), np.uint64)
    np.add.at(kinds, roots, draw.integers(1 << 62, size=len(axes), dtype=np.uint64)[places])
    for concerned in solution.notes.values():
        kinds[concerned] += draw.integers(1 << 62, dtype=np.uint64)
    _, first, group = np.unique(kinds[roots], return_index=True, return_inverse=True)
    groups = []
    for place in np.argsort(first):
        chosen = group == place
        groups.append(_group(roots[chosen], places[chosen], indices[chosen], axes, solution=solution, stacked=stacked))
    return tuple(groups)


def is_frozen(ids: np.ndarray) -> bool:
    """Whether the ids of an axis alone show that it never loses an index."""
    return len(ids) == 0 or (ids.strides[0] == 0 and int(ids[0]) < FIRST_CHANNEL)


class _Product(NamedTuple):
    """``flat[i, j, ...]`` is removed if and only if one of ``factors[0][i]``, ``factors[1][j]``, ... is."""

    flat: Ids
    factors: tuple[Ids, ...]

    @property
    def grid(self) -> np.ndarray:
        return self.flat.reshape([len(factor) for factor in self.factors])

    def along(self, factor: int) -> np.ndarray:
        """Return the ids of one factor, repeated over the others, in the order of ``flat``."""
        sizes = [len(f) if k == factor else 1 for k, f in enumerate(self.factors)]
        return np.broadcast_to(self.factors[factor].reshape(sizes), self.grid.shape).reshape(-1)


def _loses_nothing(solver: "_Solver", ids: np.ndarray) -> bool:
    """Whether no channel of an axis can be removed: all of them stay, or they can only be removed together."""
    frozen = solver.why(ids) > 0
    return bool(frozen.all() or (not frozen.any() and len(np.unique(solver.label[ids])) == 1))


class _Solver:
    """Connected components of ids: ``label`` is the smallest id of each component, its root."""

    def __init__(self, count: int, ties: list[tuple[np.ndarray, np.ndarray]]):
        self.label = np.arange(count, dtype=np.int32)
        self._why = np.zeros(count, np.int32)  # by root
        self._why[:FIRST_CHANNEL] = np.arange(FIRST_CHANNEL)
        self.tie(ties)

    def why(self, ids: np.ndarray) -> np.ndarray:
        """Return the index of the reason why each id is never removed, 0 if it can be."""
        found: np.ndarray = self._why[self.label[ids]]
        return found

    def tie(self, ties: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
        pairs = list(ties)
        if not pairs:
            return
        left, right = (np.concatenate([pair[side] for pair in pairs]) for side in (0, 1))
        low, high = np.minimum(left, right), np.maximum(left, right)
        frozen = low < FIRST_CHANNEL  # its reason marks the other side, and nothing is connected
        self._connect(low[~frozen], high[~frozen])
        self.freeze(high[frozen], low[frozen])

    def freeze(self, ids: np.ndarray, reasons: np.ndarray) -> None:
        """Mark the components of these ids as never removed; the first reason is kept."""
        roots = self.label[ids]
        new = (self._why[roots] == 0) & (roots >= FIRST_CHANNEL)
        self._why[roots[new]] = reasons[new]

    def _connect(self, left: np.ndarray, right: np.ndarray) -> None:
        label = self.label
        while True:
            a, b = label[left], label[right]
            differ = a != b
            if not differ.any():
                break
            left, right, a, b = left[differ], right[differ], a[differ], b[differ]
            label[np.maximum(a, b)] = np.minimum(a, b)  # roots point only to smaller roots, so there is no cycle
            while True:
                above = label[label]
                if np.array_equal(above, label):
                    break
                label = above
        marked = np.flatnonzero(self._why)
        self._why[label[marked]] = self._why[marked]
        self.label = label


def _solve_products(solver: _Solver, products: list[_Product], blocks: np.int32, together: np.int32) -> None:
    """Apply the products: tie those where only one factor can lose channels; in the others the outermost may."""
    waiting = list(products)
    while waiting:
        undecided, ties = [], []
        for product in waiting:
            _freeze_factors(solver, product, together)
            live = [k for k, ids in enumerate(product.factors) if not solver.why(ids).all()]
            if len(live) <= 1:
                ties.append((product.flat, product.along(live[0] if live else 0)))
            else:
                undecided.append((product, live))
        solver.tie(ties)
        if not ties and undecided:
            _freeze_inner_axes(solver, undecided, blocks)
        waiting = [product for product, _ in undecided]


def _freeze_factors(solver: _Solver, product: _Product, together: np.int32) -> None:
    """Freeze what no factor can lose.

    An index stays if its combinations cannot all be removed. A factor stays if the combinations of all its indices are
    the same classes, as where groups keep equal sizes: removing one index would empty the merged axis.
    """
    why = solver.why(product.grid)
    for k, factor in enumerate(product.factors):
        reason = why.max(axis=tuple(axis for axis in range(why.ndim) if axis != k))
        newly = (reason > 0) & (solver.why(factor) == 0)
        if newly.any():
            solver.freeze(factor[newly], reason[newly])
    labels = solver.label[product.grid]
    same = [bool((labels == labels.take([0], axis=k)).all()) for k in range(labels.ndim)]
    for factor in (f for f, equal in zip(product.factors, same, strict=True) if equal and len(f) > 1 and not all(same)):
        free = factor[solver.why(factor) == 0]
        solver.freeze(free, np.full(len(free), together))


def _freeze_inner_axes(solver: _Solver, undecided: list[tuple[_Product, list[int]]], blocks: np.int32) -> None:
    """Let the outermost axis of each reshape lose indices (heads, groups) and freeze the axes inside it.

    An axis without frozen indices is preferred to one with some. For example, in (query, key or value) x heads x size,
    heads are removed, because query, key and value are sliced separately. A decision can determine others, so a product
    that shares a class with one decided in this round waits for the next round.
    """
    decided = np.zeros(len(solver.label), bool)
    for product, live in undecided:
        if any(decided[solver.label[product.factors[k]]].any() for k in live):
            continue
        for k in live:
            roots = solver.label[product.factors[k]]
            decided[roots[roots >= FIRST_CHANNEL]] = True
        first = next((k for k in live if not solver.why(product.factors[k]).any()), live[0])
        for k in (k for k in live if k != first):
            solver.freeze(product.factors[k], np.full(len(product.factors[k]), blocks))


def _group(
    roots: np.ndarray,
    places: np.ndarray,
    indices: np.ndarray,
    axes: Sequence[LeafAxis],
    *,
    solution: Solution,
    stacked: Mapping[str, tuple[int, ...]],
) -> ChannelGroup:
    channels = np.unique(roots)
    members: list[Member] = []
    state: list[Member] = []
    for place in np.unique(places):
        order = np.argsort(roots[places == place], kind="stable")
        index = indices[places == place][order].reshape(len(channels), -1).astype(np.int32)
        member = Member(axes[place].path, axes[place].axis, index)
        (state if axes[place].is_state else members).append(member)
    why = [note for note, concerned in solution.notes.items() if np.isin(channels[0], concerned)]
    exact = not why
    layers = dict.fromkeys(member.path for member in members if stacked.get(member.path))
    if layers:
        why.append(f"the same channels are removed in every layer of {', '.join(layers)}")
    if len(channels) == 1:
        why.append(
            "it stays unless min_channels is 0: its indices can only be removed together, which would empty an axis"
        )
    kind = "blocks" if any(member.indices.shape[1] > 1 for member in members) else "channels"
    return ChannelGroup(len(channels), tuple(members), exact, kind, tuple(why), channels, tuple(state))
