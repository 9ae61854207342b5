"""Select the channels to remove: rank scores of whole channels, up to an exact budget."""

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, PyTree

from jprune.graph import Graph
from jprune.graph.axes import Axes
from jprune.graph.channels import ChannelGroup, Member
from jprune.pruning.amounts import (
    Amount,
    Budget,
    Keep,
    Kept,
    PerLayer,
    Scheduled,
    amount_of,
    fraction,
    part_of,
    single,
    without,
)
from jprune.pruning.scores.elementwise import working_dtype
from jprune.pruning.selection import uint64
from jprune.pruning.selection.layers import describe, is_mask, layers_of
from jprune.pruning.selection.uint64 import Count
from jprune.pruning.structured.budgets import BUDGETS, Cost, cost_of
from jprune.trees import check_pattern, first_matches, flatten, literally

_reshard: Callable[..., Array] = jax.sharding.reshard
_partition: Callable[..., jax.sharding.PartitionSpec] = jax.sharding.PartitionSpec
_WHOLE = _partition()
_REDUCTIONS = ("mean", "sum", "l2")

PerGroup: TypeAlias = int | Mapping[str, int]


def channel_group_masks(
    graph: Graph,
    scores: PyTree,
    *,
    sparsity: float | Mapping[str, float] | None = None,
    keep: int | None = None,
    parameters: float | None = None,
    multiply_adds: float | None = None,
    round_to: PerGroup = 1,
    min_channels: PerGroup = 1,
    reduce: str = "mean",
    per_group: bool = False,
    groups: str | None = None,
    inexact: bool = False,
    among: PyTree = None,
) -> PyTree:
    """Return masks that remove the channels with the lowest scores from every layer that has them.

    Channels are removed in the order of their scores until the budget is met, so the amount removed exceeds the target
    by less than the last removal: one channel, or with ``round_to`` several of one group.

    Args:
      graph: made by ``jprune.trace_model``.
      scores: tree of float arrays like the parameters, None for leaves that are not scored; the largest are kept, so
        for magnitudes pass ``jprune.magnitude(where=graph)(params)`` or ``jnp.abs`` of each leaf, not the signed
        weights.
      sparsity: the fraction of the channels to remove; or ``{regex: fraction}``, the fraction for each group with a
        member that matches (the first expression that matches applies; other groups stay whole). Members are named as
        in ``print(graph)``: by path, or by path and axis, ``attention/out/kernel[0]`` for its heads.
      keep: number of channels to keep.
      parameters: the fraction of all parameters to remove.
      multiply_adds: the fraction of the multiply-adds of all matrix products and convolutions to remove, for the
        inputs with which the graph was traced. Exactly one of these four must be given.
      round_to: axes that lose channels keep a multiple of this number of indices, such as 8 or 16 for tensor cores;
        an int, or ``{regex: int}`` for groups with a member that matches.
      min_channels: minimum number of channels that every group keeps, an int or ``{regex: int}``. With 0 a group may
        lose all of them, which removes the layers that compute and read it, such as those of a residual branch.
      reduce: how to combine the scores of the weights of a channel: "mean", "sum", or "l2", the root of the sum of
        squares.
      per_group: whether every group loses about the same fraction of its channels; otherwise all channels compete.
      groups: regular expression; only groups with a member that matches are pruned.
      inexact: whether to also prune groups for which removing channels is not the same as masking them.
      among: bool tree like the parameters; channels masked there are removed first, even with ``per_group``.

    Returns:
      A tree like ``scores`` of bool arrays, False at all weights of a removed channel (kernels, biases, normalization).
      Leaves with channels have a mask even if they have no score; other leaves without a score have None.

    Raises:
      TypeError: not exactly one amount is given, or one has the wrong type.
      ValueError: the budget cannot be met (the message gives the reason), a regular expression matches nothing,
        the graph is of another model, no group has a score, or (outside jit) a score is NaN.

    >>> import jprune
    >>> params = {"a": jnp.array([[1.0, -3.0]]), "b": jnp.array([[2.0], [2.0]])}
    >>> graph = jprune.trace_model(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], params, jnp.ones((1, 1)))
    >>> channel_group_masks(graph, jprune.magnitude(where=graph)(params), sparsity=0.5)
    {'a': Array([[False,  True]], dtype=bool), 'b': Array([[False],
           [ True]], dtype=bool)}
    """
    amounts = {"sparsity": sparsity, "keep": keep, "parameters": parameters, "multiply_adds": multiply_adds}
    given = [name for name, amount in amounts.items() if amount is not None]
    if len(given) != 1:
        raise TypeError(
            f"pass one of sparsity=, keep=, parameters= or multiply_adds=; given: {', '.join(given) or 'none'}"
        )
    budget = "channels" if given[0] in ("sparsity", "keep") else given[0]
    selection = structured(
        graph,
        budget=budget,
        round_to=round_to,
        min_channels=min_channels,
        reduce=reduce,
        per_group=per_group,
        groups=groups,
        inexact=inexact,
    )
    if keep is not None:
        return selection(scores, keep=keep, among=among)
    if sparsity is None:
        fraction(given[0], amounts[given[0]])
    return selection(scores, sparsity=amounts[given[0]], among=among)


def structured(
    graph: Graph,
    *,
    budget: str = "channels",
    round_to: PerGroup = 1,
    min_channels: PerGroup = 1,
    reduce: str = "mean",
    per_group: bool = False,
    groups: str | None = None,
    inexact: bool = False,
) -> "ChannelSelection":
    """Return a selection of whole channels for ``prune``; amounts are fractions of the channels or of the cost.

    ``prune`` scores the leaves that ``where`` selects and masks all weights of a removed channel, even in leaves that
    ``where`` does not select: biases and normalization parameters become exactly zero with the kernels.

    Args:
      graph: made by ``jprune.trace_model``.
      budget: the unit of a sparsity and of ``jprune.Keep``: "channels", "parameters" or "multiply_adds".
      round_to: see ``channel_group_masks``, as for the other arguments.
      min_channels: minimum number of channels that every group keeps.
      reduce: "mean", "sum" or "l2".
      per_group: whether every group loses about the same fraction.
      groups: only groups with a member that matches this regular expression are pruned.
      inexact: whether to also prune groups for which removing channels is not the same as masking them.

    Returns:
      A selection for ``prune(selection=...)``.

    Raises:
      ValueError: an argument is not one of the allowed values, or a regular expression matches no group.

    >>> import jprune, optax
    >>> params = {"a": {"kernel": jnp.array([[1.0, 3.0]])}, "b": {"kernel": jnp.array([[2.0], [2.0]])}}
    >>> apply = lambda p, x: jnp.tanh(x @ p["a"]["kernel"]) @ p["b"]["kernel"]
    >>> graph = jprune.trace_model(apply, params, jnp.ones((1, 1)))
    >>> tx = jprune.prune(jprune.magnitude(), {100: 0.5}, selection=jprune.structured(graph, budget="multiply_adds"))
    """
    refuse_no_graph(graph)
    if reduce not in _REDUCTIONS:
        raise ValueError(f"reduce={reduce!r} is unknown; use 'mean', 'sum' or 'l2'")
    if budget not in BUDGETS:
        raise ValueError(f"budget={budget!r} is unknown; use 'channels', 'parameters' or 'multiply_adds'")
    chosen = tuple(group for group in graph.channels if group.exact or inexact)
    if groups is not None:
        check_pattern(f"groups={groups!r}", groups)
        if graph.channels and not any(_matches(groups, group) for group in graph.channels):
            hint = literally(groups, [name for group in graph.channels for name in _names(group)])
            raise ValueError(f"groups={groups!r} matches none of {_some(graph.channels)}{hint}")
        chosen = tuple(group for group in chosen if _matches(groups, group))
    if not chosen:
        wanted = "" if groups is None else f" that groups={groups!r} matches"
        raise ValueError(
            f"the graph has no group of channels{wanted} that can be removed exactly; print(graph) shows why, "
            "inexact=True prunes the other groups too"
        )
    multiples = _per_group("round_to", round_to, chosen, graph, least=1)
    steps = tuple(_step(group, multiple) for group, multiple in zip(chosen, multiples, strict=True))
    floors = _per_group("min_channels", min_channels, chosen, graph, least=0)
    return ChannelSelection(graph, budget, chosen, steps, tuple(floors), reduce, per_group)


@dataclasses.dataclass(frozen=True, eq=False)
class ChannelSelection:
    """A selection of whole channels, made by ``structured``.

    Attributes:
      graph: graph of the model.
      budget: "channels", "parameters" or "multiply_adds".
      groups: the groups that may lose channels.
      steps: for each group, the number of channels removed at a time.
      floors: for each group, the minimum number of channels kept.
      reduce: "mean", "sum" or "l2".
      per_group: whether every group loses about the same fraction.
    """

    graph: Graph
    budget: str
    groups: tuple[ChannelGroup, ...]
    steps: tuple[int, ...]
    floors: tuple[int, ...]
    reduce: str
    per_group: bool

    def loses_channels(self, path: str) -> bool:
        """Whether a leaf has channels that may be removed; ``prune`` masks it even if ``where`` does not select it."""
        return any(member.path == path for group in self.groups for member in group.members)

    def budget_of(self, weights: PyTree) -> Budget:
        """Return the total of the budget, and the function that counts what an amount keeps of it.

        Args:
          weights: tree of the leaves that are scored, or of their shapes; None for other leaves.

        Raises:
          ValueError: the weights are not those of the graph's model, or no group has a score; the function raises it if
            an amount cannot be reached.
        """
        self._masks_among(weights, None)
        paths, leaves, _ = flatten(weights)
        choice = self._scored([path for path, leaf in zip(paths, leaves, strict=True) if leaf is not None])
        cost = cost_of(self.graph, choice.groups, self.budget)

        def kept(amount: float | Keep | PerLayer) -> Kept:
            if not isinstance(amount, Mapping):
                return Kept(self._limit(choice, cost, amount), {})
            limits = self._limits_by_group(choice, amount)
            names = [f"{group.members[0].path}[{group.members[0].axis}]" for group in choice.groups]
            return Kept(sum(limits), dict(zip(names, limits, strict=True)))

        return Budget(cost.after(np.zeros(len(cost.classes), bool)), _words(self.budget), kept)

    def __call__(
        self,
        scores: PyTree,
        *,
        sparsity: float | PerLayer | Scheduled | None = None,
        keep: int | Scheduled | None = None,
        among: PyTree = None,
        min_keep: int = 0,
        axes: Axes = None,
    ) -> PyTree:
        """Select channels; see ``channel_group_masks``.

        Args:
          scores: tree of float arrays, None for leaves that are not scored.
          sparsity: the fraction of the budget to remove, or ``{regex: fraction}`` of the channels of a group.
          keep: the count of the budget to keep.
          among: bool tree; channels masked there are removed first.
          min_keep: must be 0; use ``min_channels`` of ``structured``.
          axes: not used; the graph has the roles of the axes.

        Returns:
          A tree of bool arrays like ``scores``, with masks for all leaves that have channels.
        """
        if min_keep:
            raise ValueError(
                f"min_keep={min_keep} counts weights; for channels, pass min_channels= to jprune.structured"
            )
        amount = amount_of(sparsity, keep)
        layers = layers_of(scores)
        scored = dict(zip(layers.paths, layers.scores, strict=True))
        before = self._masks_among(scores, among)
        groups = self._scored(scored)
        ranked = [_group_scores(group, scored, _channels_left(group, before), self.reduce) for group in groups.groups]
        removed = _split(self._removed(groups, ranked, amount), groups.groups)
        masks = dict.fromkeys([member.path for group in self.groups for member in group.members])
        masks |= {path: jnp.ones_like(score, dtype=bool) for path, score in scored.items()} | before
        return masks_without(self.graph, scores, list(zip(groups.groups, removed, strict=True)), masks)

    def _masks_among(self, scores: PyTree, among: PyTree) -> dict[str, Array]:
        """Return the masks of ``among`` by path; check that both trees fit the graph."""
        needed = {member.path for group in self.groups for member in group.members}
        check_leaves(self.graph, scores, name="scores", needed=needed)
        if among is None:
            return {}
        paths, leaves, _ = flatten(among)
        check_leaves(self.graph, among, name="among", needed=())
        for path, leaf in zip(paths, leaves, strict=True):
            if leaf is not None and not is_mask(leaf):
                raise TypeError(f"among has {describe(leaf)} at '{path}'; it must be a bool array or None")
        return {path: leaf for path, leaf in zip(paths, leaves, strict=True) if leaf is not None}

    def _scored(self, scored: Collection[str]) -> "_Choice":
        """Return the groups with a score, and how they lose channels."""
        places = [i for i, g in enumerate(self.groups) if any(member.path in scored for member in g.members)]
        if not places:
            some = self.groups[0].members[0].path
            raise ValueError(f"scores has no score for any group of channels; give one to '{some}', for example")
        groups = tuple(self.groups[i] for i in places)
        blocks = tuple(_blocks(groups[k].size, self.steps[i], self.floors[i]) for k, i in enumerate(places))
        return _Choice(groups, blocks)

    def _removed(self, choice: "_Choice", scores: Sequence[Array], amount: Amount) -> Bool[Array, " channels"]:
        amounts = amount.amounts if isinstance(amount, Scheduled) else (amount,)
        dropped = amount.dropped if isinstance(amount, Scheduled) else (0.0,)
        plain = [without(a, part) if part else a for a, part in zip(amounts, dropped, strict=True)]
        by_group = [a for a in plain if isinstance(a, Mapping)]
        if by_group:
            if len(plain) > 1:
                raise TypeError("amounts by regular expression cannot be looked up at run time")
            return choice.by_group(scores, self._limits_by_group(choice, by_group[0]))
        cost = cost_of(self.graph, choice.groups, self.budget)
        limits = uint64.count_of([self._limit(choice, cost, single(a)) for a in plain])
        index = amount.index if isinstance(amount, Scheduled) else 0
        limit = Count(*(jnp.asarray(limb)[index] for limb in limits))
        return choice.up_to(scores, cost, limit, per_group=self.per_group)

    def _limit(self, choice: "_Choice", cost: Cost, amount: float | Keep) -> int:
        """Return the largest cost that meets an amount.

        Raises:
          ValueError: no choice of channels meets the amount.
        """
        total = cost.after(np.zeros(len(cost.classes), bool))
        if isinstance(amount, Keep):
            if amount.count > total:
                raise ValueError(
                    f"keep={amount.count} is more than the total of {total} {_words(self.budget)}; keep fewer"
                )
            limit, asked = amount.count, f"keep={amount.count} of {total} {_words(self.budget)}"
        else:
            limit = math.floor(total - part_of(total, amount))
            asked = f"a sparsity of {amount:.12g} in {_words(self.budget)}"
        least = cost.after(choice.removable())
        if least > limit:
            raise ValueError(
                f"{asked} cannot be reached: at most {_fraction(total - least, total)} can be removed"
                f"{self._stopped_by(choice, cost, total)}"
            )
        return limit

    def _limits_by_group(self, choice: "_Choice", amount: PerLayer) -> list[int]:
        """Return the maximum number of channels that each group keeps."""
        if self.budget != "channels":
            raise ValueError(
                f"amounts by regular expression are fractions of the channels of a group; they cannot be combined "
                f"with budget={self.budget!r}: use budget='channels', or one amount with min_channels={{regex: number}}"
            )
        limits = []
        first = _first_matches("sparsity", list(amount), choice.groups, self.graph)
        for group, blocks, pattern in zip(choice.groups, choice.blocks, first, strict=True):
            asked = 0.0 if pattern is None else amount[pattern]
            limit = asked.count if isinstance(asked, Keep) else math.floor(group.size - part_of(group.size, asked))
            least = group.size - sum(blocks)
            if limit > group.size:
                raise ValueError(
                    f"{asked!r} is more than the {group.size} channels of the group of '{group.members[0].path}'; keep "
                    "fewer"
                )
            if least > limit:
                raise ValueError(
                    f"a sparsity of {asked} cannot be reached in the group of '{group.members[0].path}': of "
                    f"{group.size} channels at least {least} stay (min_channels, round_to)"
                )
            limits.append(limit)
        return limits

    def _stopped_by(self, choice: "_Choice", cost: Cost, total: int) -> str:
        """Name the minimums that limit the amount removed, with the amount that could be reached without each."""
        reasons = []
        for name, steps, floors in (
            ("min_channels", self.steps, (1,) * len(self.groups)),
            ("round_to", (1,) * len(self.groups), self.floors),
        ):
            freed = _Choice(
                choice.groups,
                tuple(
                    _blocks(group.size, steps[i], floors[i])
                    for i, group in enumerate(self.groups)
                    if group in choice.groups
                ),
            )
            if freed.removable().sum() > choice.removable().sum():
                changed = [
                    group
                    for group, now, then in zip(choice.groups, choice.blocks, freed.blocks, strict=True)
                    if sum(then) > sum(now)
                ]
                reached = _fraction(total - cost.after(freed.removable()), total)
                reasons.append(f"{name} stops {_some(changed)} (without it: {reached})")
        coupled = [g for g, sizes in zip(choice.groups, choice.blocks, strict=True) if g.size == 1 and not sizes]
        if coupled:
            reasons.append(f"{_some(coupled)} stays whole, because all its channels can only be removed together")
        text = "; " + "; ".join(reasons) if reasons else "; every group is down to one channel"
        unscored = len(self.groups) - len(choice.groups)
        text += f"; {unscored} groups have no score and stay whole" if unscored else ""
        inexact = [group for group in self.graph.channels if not group.exact and group not in self.groups]
        if inexact:
            text += f"; {_some(inexact)} stays whole, because it is not exact (inexact=True prunes it too)"
        return text + "; the rest cannot be removed, for the reasons that print(graph) shows"


class _Choice(NamedTuple):
    """Groups of channels and the blocks in which they are removed, lowest scores first.

    Attributes:
      groups: the groups.
      blocks: for each group the sizes of the blocks, in the order of removal.
    """

    groups: tuple[ChannelGroup, ...]
    blocks: tuple[tuple[int, ...], ...]

    def removable(self) -> Bool[np.ndarray, " channels"]:
        """A mask with the maximum number of removed channels in each group; which ones does not change the cost."""
        return np.concatenate(
            [np.arange(group.size) < sum(sizes) for group, sizes in zip(self.groups, self.blocks, strict=True)]
        )

    def up_to(self, scores: Sequence[Array], cost: Cost, limit: Count, *, per_group: bool) -> Bool[Array, " channels"]:
        """Remove block after block until the cost is within the limit."""
        priorities, block_of_channel, first = [], [], 0
        count = sum(map(len, self.blocks))
        for group, sizes, score in zip(self.groups, self.blocks, scores, strict=True):
            order = jnp.argsort(score, stable=True)
            last = np.cumsum(sizes, dtype=int) - 1
            lowest = score[order][last]
            if per_group:  # channels that are already masked, with a score of -inf, still go first
                lowest = jnp.where(lowest == -jnp.inf, -jnp.inf, jnp.asarray((last + 1) / group.size, jnp.float32))
            priorities.append(lowest)
            number = np.concatenate(
                [np.repeat(np.arange(len(sizes)) + first, sizes), np.full(group.size - sum(sizes), count)]
            )
            block_of_channel.append(jnp.zeros(group.size, jnp.int32).at[order].set(jnp.asarray(number, jnp.int32)))
            first += len(sizes)
        order = jnp.argsort(jnp.concatenate(priorities), stable=True)
        turn = jnp.full(count + 1, count, jnp.int32).at[order].set(jnp.arange(count, dtype=jnp.int32))
        turn_of_channel = turn[jnp.concatenate(block_of_channel)]

        def halve(_: ArrayLike, between: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = between
            middle = (low + high) // 2
            enough = uint64.not_below(limit, cost.limbs_after(turn_of_channel < middle))
            return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

        bounds = (jnp.int32(0), jnp.int32(count))
        _, blocks = lax.fori_loop(0, count.bit_length(), halve, bounds)
        removed: Array = turn_of_channel < blocks
        return removed

    def by_group(self, scores: Sequence[Array], limits: Sequence[int]) -> Bool[Array, " channels"]:
        """Remove the lowest blocks of each group separately, until it is within its limit."""
        removed = []
        for group, sizes, score, limit in zip(self.groups, self.blocks, scores, limits, strict=True):
            lost = 0
            for size in sizes:
                if group.size - lost <= limit:
                    break
                lost += size
            worst = jnp.asarray(np.arange(group.size) < lost)
            removed.append(jnp.zeros(group.size, bool).at[jnp.argsort(score, stable=True)].set(worst))
        return jnp.concatenate(removed)


def masks_without(
    graph: Graph,
    tree: PyTree,
    removed: Sequence[tuple[ChannelGroup, Array]],
    masks: Mapping[str, Array | None],
) -> PyTree:
    """Return masks without some channels.

    Args:
      graph: graph of the model.
      tree: a tree like the parameters, for its structure.
      removed: groups, each with a bool array (channels,) of the channels to mask.
      masks: initial masks by path, or None for all True; other leaves have masks only if they lose channels.
    """
    lost: dict[str, dict[int, list[tuple[np.ndarray, Array]]]] = {path: {} for path in masks}
    for group, gone in removed:
        for member in group.members:
            lost.setdefault(member.path, {}).setdefault(member.axis, []).append((member.indices, gone))
    paths, _, treedef = flatten(tree)
    out: list[Array | None] = []
    for path in paths:
        if path not in lost:
            out.append(None)
            continue
        shape = graph.shapes[path]
        given = masks.get(path)
        mask = jnp.ones(shape, bool) if given is None else given
        for axis, parts in lost[path].items():
            kept = jnp.ones(shape[axis], bool)
            for index, gone in parts:
                kept = kept.at[index].set(jnp.broadcast_to(~gone[:, None], index.shape))
            kept = jnp.broadcast_to(kept.reshape([-1 if a == axis else 1 for a in range(len(shape))]), shape)
            sharding = _explicit_sharding(mask)
            mask = mask & (kept if sharding is None else _reshard(kept, sharding))
        out.append(mask)
    return jax.tree.unflatten(treedef, out)


def refuse_no_graph(graph: object) -> None:
    """Raise a ``TypeError`` that says how to make a graph if the argument is not one."""
    if not isinstance(graph, Graph):
        raise TypeError(
            f"graph is of type {type(graph).__name__}; it must be made by jprune.trace_model(apply, params, *inputs)"
        )


def check_leaves(graph: Graph, tree: PyTree, *, name: str, needed: Collection[str] | None = None) -> None:
    """Raise if a tree does not belong to the graph's model.

    Args:
      graph: graph of the model.
      tree: a tree like the parameters.
      name: the caller's name for the tree, for the error.
      needed: paths that the tree must have; None for all paths of the graph.

    Raises:
      TypeError: ``graph`` is not a graph.
      ValueError: a leaf is missing, has another shape or is not in the graph; the message names the first.
    """
    refuse_no_graph(graph)
    paths, leaves, _ = flatten(tree)
    found = dict(zip(paths, leaves, strict=True))
    why = "the graph is of another model"
    for path, shape in graph.shapes.items():
        if path not in found:
            if needed is not None and path in needed:
                raise ValueError(
                    f"{name} has no leaf '{path}', which loses channels with others: channels are masked in every leaf "
                    "that has them, so apply prune to all parameters, after optax.masked or optax.multi_transform: "
                    "optax.chain(optax.multi_transform(...), jprune.prune(...)); or the graph is of another model"
                )
            if needed is None:
                raise ValueError(f"{why}: {name} has no leaf '{path}'; trace this model with jprune.trace_model")
            continue
        given = tuple(getattr(found[path], "shape", shape))
        if given != tuple(shape):
            raise ValueError(
                f"{why}: its leaf '{path}' has shape {tuple(shape)}, but {given} in {name}; trace this model with "
                "jprune.trace_model"
            )
    for path, leaf in found.items():
        if path not in graph.shapes and hasattr(leaf, "shape"):
            raise ValueError(
                f"{why}: it has no leaf '{path}', which {name} has; trace this model with jprune.trace_model"
            )


def _step(group: ChannelGroup, round_to: int) -> int:
    """Return how many channels to remove at a time so that every axis keeps a multiple of ``round_to`` indices."""
    return math.lcm(*(round_to // math.gcd(round_to, member.indices.shape[1]) for member in group.members))


def _blocks(size: int, step: int, floor: int) -> tuple[int, ...]:
    """Return the sizes of blocks to remove so that a group keeps multiples of ``step``, at least ``floor``."""
    allowed = [kept for kept in range(size - 1, floor - 1, -1) if kept % step == 0]
    return tuple(before - after for before, after in zip([size, *allowed], allowed, strict=False))


def _per_group(name: str, given: PerGroup, groups: Sequence[ChannelGroup], graph: Graph, *, least: int) -> list[int]:
    values = given if isinstance(given, Mapping) else {"": given}
    for value in values.values():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={given!r} must be an integer of {least} or more, or {{regex: integer}}")
    return [1 if pattern is None else values[pattern] for pattern in _first_matches(name, list(values), groups, graph)]


def _first_matches(
    name: str, patterns: Sequence[str], groups: Sequence[ChannelGroup], graph: Graph
) -> list[str | None]:
    """Return for each group the first expression that matches one of its members; see ``first_matches``."""
    for pattern in patterns:
        check_pattern(f"{name} has the key {pattern!r}, which", pattern)
        matched = [group for group in graph.channels if _matches(pattern, group)]
        if matched and not any(_matches(pattern, group) for group in groups):
            raise ValueError(
                f"{name} has the key {pattern!r}, which matches only {_some(matched)}, and this stays whole: it is not "
                "exact (inexact=True prunes it too), groups= does not match it, or it has no score"
            )
    members = {
        f"{group.members[0].path}[{group.members[0].axis}] (group {i})": _names(group) for i, group in enumerate(groups)
    }
    return list(first_matches(patterns, members, name=name, of="group of channels").values())


def _matches(pattern: str, group: ChannelGroup) -> bool:
    """Whether a regular expression matches a member, as its path or as ``path[axis]``."""
    return any(re.search(pattern, name) for name in _names(group))


def _names(group: ChannelGroup) -> list[str]:
    return [name for member in group.members for name in (member.path, f"{member.path}[{member.axis}]")]


def _group_scores(
    group: ChannelGroup, scores: Mapping[str, Array], left: Bool[Array, " channels"] | None, reduce: str
) -> Float[Array, " channels"]:
    """Return one score for each channel: -inf if none of its weights is left or its score is NaN."""
    total: Array | float = 0.0
    weights = 0
    for member in group.members:
        if member.path not in scores:
            continue
        score = scores[member.path].astype(working_dtype(scores[member.path]))
        others = tuple(axis for axis in range(score.ndim) if axis != member.axis)
        along = jnp.sum(score * score if reduce == "l2" else score, axis=others)
        total = total + jnp.sum(replicated(along.astype(jnp.float32))[member.indices], axis=1)
        weights += score.size // score.shape[member.axis] * member.indices.shape[1]
    if reduce == "l2":
        total = jnp.sqrt(total)
    elif reduce == "mean":
        total = jnp.divide(total, np.float32(weights))
    total = jnp.where(jnp.isnan(total), -jnp.inf, total)
    return total if left is None else jnp.where(left, total, -jnp.inf)


def _channels_left(group: ChannelGroup, masks: Mapping[str, Array]) -> Bool[Array, " channels"] | None:
    """Whether each channel has any weight left; a leaf without any does not show which of its axes has lost them."""
    found = [member for member in group.members if member.path in masks]
    if not found:
        return None
    return jnp.any(jnp.stack([_any_left(member, masks) for member in found]), axis=0)


def _any_left(member: Member, masks: Mapping[str, Array]) -> Bool[Array, " channels"]:
    mask = masks[member.path]
    along = jnp.any(mask, axis=tuple(axis for axis in range(mask.ndim) if axis != member.axis))
    return jnp.any(replicated(along)[member.indices], axis=1)


def replicated(array: Array) -> Array:
    """Replicate an array if its mesh has explicit axes; otherwise the compiler does so when needed."""
    return array if _explicit_sharding(array) is None else _reshard(array, _WHOLE)


def _explicit_sharding(array: Array) -> jax.sharding.NamedSharding | None:
    sharding = jax.typeof(array).sharding
    return sharding if jax.sharding.AxisType.Explicit in sharding.mesh.axis_types else None


def _split(channels: Array, groups: Sequence[ChannelGroup]) -> list[Array]:
    ends = np.cumsum([group.size for group in groups])
    return [channels[end - group.size : end] for end, group in zip(ends, groups, strict=True)]


def _words(budget: str) -> str:
    return budget.replace("multiply_adds", "multiply-adds")


def _fraction(part: int, total: int) -> str:
    return f"{math.floor(10_000 * part / total) / 10_000:g}"


def _some(groups: Sequence[ChannelGroup], most: int = 4) -> str:
    named = ", ".join(f"the group of '{group.members[0].path}'" for group in groups[:most])
    return named + (f" and {len(groups) - most} more" if len(groups) > most else "")
