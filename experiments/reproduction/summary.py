"""The first lines of the reproduction page and of the README, written from the tables.

Every sentence with a number is computed, so it cannot contradict the tables. A bullet whose tables are missing is left
out, and what is missing is listed.
"""

import textwrap
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd

import jprune
from experiments.jumpstart_grid.pruned import TRAINED
from experiments.jumpstart_grid.report import largest_ratio
from experiments.reproduction import explanations, hypotheses, jumpstart, references
from experiments.reproduction.hypotheses import CIFAR, PUBLISHED_COUNTS, SAME_DENSE, alphas_by_ratio
from experiments.reproduction.ledger import DENSE, Recalls
from experiments.reproduction.verdicts import wilson
from jprune.recall import Interval, t_interval
from jprune.recall.report.words import listed

_WIDTH = 120
NEW_SEEDS = "moons-pruned-seeds"
_PLANNED = {
    "fashion-published-paper": ("published counts on Fashion-MNIST in the paper's setting", 30),
    "fashion-published-script": ("published counts on Fashion-MNIST in the script's setting", 30),
    "mnist-published-paper": ("published counts on MNIST in the paper's setting", 30),
    "mnist-published-script": ("published counts on MNIST in the script's setting", 30),
    CIFAR: ("CIFAR-10 with ResNet-20", 10),
    explanations.FEW_WEIGHTS: ("LeNets with 60 to 1,200 weights, without a floor (R14)", 30),
    explanations.WITH_FLOOR[0]: ("LeNets with 60 to 1,200 weights, at least 10 in every layer (R14)", 30),
    "mnist-pruned": ("pruning of thin networks on MNIST (J5)", 60),
    NEW_SEEDS: ("pruning of thin networks on moons with new seeds (J6)", 420),
    "moons-seeds-u": ("five seeds of U on moons", 585),
    "mnist-grid-50": ("MNIST grid of 50 epochs", 15),
}  # table: what it answers, planned number of networks
_IN_WORDS = {"relu-bn": "batch normalization", "relu": "relu alone"}
_WELL_ABOVE = 0.2  # difference of kappas, fixed on 2026-11-29 before the seeds of U were seen


class Tables(NamedTuple):
    """Everything that the page is made from.

    Attributes:
      recalls: from name to recall-distortion study, the published networks among them.
      grids: from name to the networks of a jumpstart grid.
      pruned: from name to the networks of a grid after pruning.
      moons: the published moons grid.
      boxes: quartiles of the published alphas.
    """

    recalls: Mapping[str, Recalls]
    grids: Mapping[str, pd.DataFrame]
    pruned: Mapping[str, pd.DataFrame]
    moons: pd.DataFrame
    boxes: pd.DataFrame


def bullets(tables: Tables) -> str:
    """Return the first screen of the page: ten results to quote, each with its interval, and what has not run."""
    parts: tuple[Callable[[Tables], str], ...] = (
        _trains,
        _at_low_ratios,
        _rises,
        _counts,
        _undecayed,
        _collapse,
        _channels,
        _other_changes,
        _pruned_further,
        _own_cifar,
        _missing,
    )
    return "\n".join(_bullet(text) for text in (part(tables) for part in parts) if text)


def short(tables: Tables) -> str:
    """Return three sentences for the README."""
    sentences = [_trains(tables).split("** ")[-1]] if "moons" in tables.grids else []
    nulls = [_null_and_change(tables, name) for name in ("fashion-lenet", "mnist-lenet", "cifar10-published")]
    if None not in nulls:
        fashion, mnist, cifar = (change for _, change in filter(None, nulls))
        only = cifar.high < 0 <= min(fashion.high, mnist.high)
        sentences.append(
            f"At a compression ratio of 2, alpha minus that of another dense seed (gray band) is {_signed(fashion)} on "
            f"Fashion-MNIST, {_signed(mnist)} on MNIST and {_signed(cifar)} on the published CIFAR-10 networks"
            f"{': only there is it shown to be lower' if only else ''}."
        )
    changes = _undecayed_minus_magnitude(tables.recalls.get("fashion-lenet"))
    if changes:
        sentences.append(
            "At a ratio of 20, the alpha of undecayed pruning minus that of magnitude pruning is "
            f"{_signed(changes[20.0])} on Fashion-MNIST LeNets; the paper finds a lower alpha, on CIFAR."
        )
    return textwrap.fill(" ".join(sentences), _WIDTH, break_long_words=False, break_on_hyphens=False)


def of_seeds(tables: Tables) -> str:
    """Return the bullet on how far single cells of the moons grid depend on the seed."""
    cells = [tables.grids[name] for name in ("moons-seeds", "moons-seeds-u") if name in tables.grids]
    if "moons" not in tables.grids or not cells:
        return ""
    own = {method: kappa for method, (_, kappa) in jumpstart.between_seeds(pd.concat(cells)).items()}
    published = _published_kappas(tables)
    listed = ", ".join(f"{method} {_plain(value, 2)}" for method, value in own.items())
    text = (
        "**Single cells of the moons grid say little.** Agreement on whether a cell reaches .9 (Cohen's kappa) between "
        f"two of our own seeds: {listed}; between our first seed and the published grid: "
        f"{', '.join(f'{method} {_plain(published[method], 2)}' for method in dict.fromkeys([*own, 'U']))}."
    )
    if "U" not in own:
        return _bullet(f"{text} For the method U more seeds are needed.")
    if own["U"] - published["U"] >= _WELL_ABOVE:
        return _bullet(f"{text} Our U differs from the published one.")
    return _bullet(f"{text} Single cells with U depend on the seed.")


def _bullet(text: str) -> str:
    return textwrap.fill(f"* {text}", _WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _trains(tables: Tables) -> str:
    if "moons" not in tables.grids:
        return ""
    cells = tables.grids["moons"]
    cells = cells[cells["replicate"] == 0]
    found = []
    for method in ("UP", "relu"):
        trained, theirs = (each.loc[each["method"] == method, "train_acc"] >= 0.9 for each in (cells, tables.moons))
        interval = _share(int(trained.sum()), len(trained))
        found.append((f"{trained.sum()} of {len(trained)}", interval, int(theirs.sum())))
    (up, of_up, up_published), (relu, of_relu, relu_published) = found
    return (
        f"**Jumpstart trains thin, deep networks where relu does not.** On the moons grid, {up} networks {of_up} reach "
        f"a training accuracy of .9 with the penalty (UP), and {relu} {of_relu} without it; published: {up_published} "
        f"and {relu_published}."
    )


def _null_and_change(tables: Tables, name: str) -> tuple[references.Estimate, references.Estimate] | None:
    """Return the seed null of a study, and mean alpha at t = 2 minus it."""
    study = tables.recalls.get(name)
    replicates = study.complete(["magnitude"]) if study is not None else []
    if study is None or len(replicates) < 3 or 2.0 not in study.ratios("magnitude"):
        return None
    dense, pruned = study.correct(DENSE, 1.0, replicates), study.correct("magnitude", 2.0, replicates)
    null = references.seed_null(dense, study.support)
    return null, references.above_seed_null(dense, pruned, study.support)


def _at_low_ratios(tables: Tables) -> str:
    found = [_null_and_change(tables, name) for name in ("fashion-lenet", "mnist-lenet", "cifar10-published")]
    if None in found:
        return ""
    (fashion, in_fashion), (mnist, in_mnist), (cifar, in_cifar) = (each for each in found if each is not None)
    only = in_cifar.high < 0 <= min(in_fashion.high, in_mnist.high)
    title = (
        "At t = 2, pruning lowers alpha on the published CIFAR-10 networks, and is not shown to on LeNets."
        if only
        else "Alpha at t = 2 has to be compared with that of another dense seed."
    )
    return (
        f"**{title}** Alpha minus that of another dense seed (in parentheses) is {_signed(in_cifar)} on the ResNet-56s "
        f"({_plain(cifar.value, 3)}), {_signed(in_fashion)} on Fashion-MNIST LeNets ({_plain(fashion.value, 3)}) and "
        f"{_signed(in_mnist)} on MNIST LeNets ({_plain(mnist.value, 3)})."
    )


def _rises(tables: Tables) -> str:
    box = tables.boxes[(tables.boxes["dataset"] == "fashion_mnist") & (tables.boxes["score"] == "magnitude")]
    box = box.set_index("ratio").loc[20]
    quartiles = f" (published quartiles {box['q1']:.2f} and {box['q3']:.2f})"
    found = []
    for name, words, known in (
        ("fashion-lenet", "on Fashion-MNIST LeNets", quartiles),
        ("cifar10-published", "on the published CIFAR-10 networks", ""),
    ):
        alphas = alphas_by_ratio(tables.recalls.get(name), ["magnitude"])
        if alphas is not None:
            found.append(f"{_of_mean(t_interval(alphas['magnitude', 20.0]))} {words}{known}")
    if not found:
        return ""
    return f"**Alpha rises above 1 at higher compression.** Mean alpha at t = 20 is {' and '.join(found)}."


def _counts(tables: Tables) -> str:
    matches: dict[str, list[str]] = {}
    collapsed = networks = 0
    for name, words in PUBLISHED_COUNTS.items():
        study = tables.recalls.get(name)
        found = hypotheses.matching_ratios(name, study, tables.boxes)
        if study is None or found is None:
            continue
        replicates = study.complete(["magnitude"])
        collapsed += int(study.collapsed("magnitude", 50.0, replicates).sum())
        networks += len(replicates)
        dataset, setting = words.split(", ")
        matches.setdefault(dataset, []).append(f"{len(found[0])} ({setting})")
    if not matches:
        return ""
    by_dataset = "; ".join(f"on {dataset} at {listed(each)}" for dataset, each in matches.items())
    return (
        f"**The published code keeps 350 weights at t = 50, not 125.** With 350, {collapsed} of {networks} LeNets "
        f"{_share(collapsed, networks)} are at chance. Of 5 ratios, alpha matches the published quartiles {by_dataset}."
    )


def _undecayed_minus_magnitude(study: Recalls | None) -> dict[float, Interval]:
    alphas = alphas_by_ratio(study, ["magnitude", "undecayed"])
    if alphas is None:
        return {}
    return {r: t_interval(alphas["undecayed", r] - alphas["magnitude", r]) for r in (2.0, 4.0, 10.0, 20.0)}


def _undecayed(tables: Tables) -> str:
    study = tables.recalls.get("fashion-lenet")
    changes = _undecayed_minus_magnitude(study)
    if study is None or not changes:
        return ""
    scores = ["magnitude", "undecayed"]
    table = study.working(study.audit(scores, study.complete(scores)).alphas)
    table = table[(table["ratio"] > 1) & (table["ratio"] <= 20) & (table["alpha"] > 0)]
    equal = jprune.recall.compare_at_equal_accuracy(table, *scores)
    named = " and ".join(f"{_signed(changes[r])} at t = {r:g}" for r in (10.0, 20.0))
    words = {"supported": "lowers", hypotheses.ELSEWHERE: "does not lower", "open": "is not shown to lower"}
    does = words[hypotheses.undecayed(study).verdict]
    equal_accuracy = f" At equal accuracy and t <= 20, log alpha differs by {_signed(_of_change(equal))}."
    return (
        f"**Undecayed pruning {does} alpha on LeNet.** On Fashion-MNIST its alpha minus that of magnitude pruning is "
        f"{named}.{'' if equal.reason else equal_accuracy}"
    )


def _collapse(tables: Tables) -> str:
    study = tables.recalls.get("fashion-lenet")
    scores = ["undecayed", "magnitude"]
    if study is None or alphas_by_ratio(study, scores) is None:
        return ""
    replicates = study.complete(scores)
    after = [int(study.collapsed(score, 50.0, replicates).sum()) for score in scores]
    undecayed, magnitude = (f"{count} of {len(replicates)} {_share(count, len(replicates))}" for count in after)
    answer = {
        "supported": "With 125 weights left, fewer networks collapse after undecayed pruning.",
        "contradicted": "With 125 weights left, more networks collapse after undecayed pruning.",
        "open": "Whether fewer networks with 125 weights collapse after undecayed pruning is open.",
    }[hypotheses.collapse(study).verdict]
    text = (
        f"**{answer}** Of Fashion-MNIST LeNets, {undecayed} are at chance after it and {magnitude} after magnitude "
        "pruning"
    )
    free = tables.recalls.get(explanations.FEW_WEIGHTS)
    if free is not None:
        again = explanations.collapse_table(free).set_index("keep")
        if 125 in again.index:
            text += f" ({again.undecayed[125]} and {again.magnitude[125]} on another processor)"
    text += "."
    rows = explanations.with_floor(tables.recalls)
    if rows is not None and 125 in rows["keep"].to_numpy():
        floor = rows.set_index("keep").loc[125]
        low, high = _plain(float(floor.low), 2, signed=True), _plain(float(floor.high), 2, signed=True)
        text += (
            f" With at least 10 weights in every layer, {floor.undecayed:.0f} and {floor.magnitude:.0f} are "
            f"(difference of the shares [{low}, {high}])"
        )
        differ = rows.loc[rows["p"] < explanations.P, "keep"]
        counts = f"{len(rows)} counts from {rows['keep'].min():,} to {rows['keep'].max():,}"
        if len(differ):
            text += f", and the scores differ with {listed([f'{keep:,}' for keep in differ])} weights, of {counts}"
        elif len(rows) > 1:
            text += f", and the scores are not shown to differ at any of {counts} weights"
        text += "."
    return text


def _channels(tables: Tables) -> str:
    channels, main = tables.recalls.get("fashion-channels"), tables.recalls.get("fashion-lenet")
    weights = tables.recalls.get(SAME_DENSE, main)
    if channels is None or weights is None:
        return ""
    result, _ = hypotheses.channels_against(weights, channels)
    if not np.isfinite(result.low):
        return ""
    answer = {
        "yes": "Removing channels raises alpha more than removing single weights does, at equal accuracy.",
        "no larger than 5%": (
            "At equal accuracy, removing channels and removing single weights give the same alpha within 5%."
        ),
        "open": "Whether removing channels raises alpha more than removing single weights, at equal accuracy, is open.",
    }[hypotheses.channels_answer(result)]
    return (
        f"**{answer}** Log alpha differs by {_signed(_of_change(result))} over {result.models} "
        "Fashion-MNIST LeNets; the planned margin is .05."
    )


def _other_changes(tables: Tables) -> str:
    changed = {name: tables.recalls[name] for name in explanations.CHANGES if name in tables.recalls}
    pruned = tables.recalls.get(SAME_DENSE, tables.recalls.get("fashion-lenet"))
    if pruned is None or len(changed) < len(explanations.CHANGES):
        return ""
    results, _ = explanations.compare_changes(pruned, changed)
    worse = all(explanations.answer(each) == "yes" and each.low > 0 for each in results.values())
    listed = ", ".join(f"{_signed(_of_change(each))} ({kind})" for kind, each in results.items() if not each.reason)
    return (
        f"**At equal accuracy, pruning {'changes' if worse else 'is not shown to change'} recalls more than other "
        f"changes do.** Log alpha after magnitude pruning minus that after the other change, jointly at 99%: {listed}."
    )


def _own_cifar(tables: Tables) -> str:
    study = tables.recalls.get(CIFAR)
    alphas = alphas_by_ratio(study, ["magnitude"])
    if study is None or alphas is None:
        return ""
    accuracy = (
        f"dense accuracy {_plain(hypotheses.dense_accuracy(study), 3)} on JPEG copies of the images; published "
        "ResNet-56: .893"
    )
    if len(alphas) < hypotheses.ENOUGH_ON_CIFAR:
        pruned = alphas["magnitude"].mean().drop(1.0)
        means = ", ".join(f"{_plain(alpha, 2)} at t = {t:g}" for t, alpha in pruned.items())
        return (
            f"**On CIFAR-10, {len(alphas)} ResNet-20s of our own have been pruned; an answer needs "
            f"{hypotheses.ENOUGH_ON_CIFAR}.** Mean alpha after magnitude pruning is {means} ({accuracy})."
        )
    changes = _undecayed_minus_magnitude(study)
    answer = {
        "supported": "Undecayed pruning lowers alpha on our CIFAR-10 ResNet-20s.",
        hypotheses.ELSEWHERE: "Undecayed pruning raises alpha on our CIFAR-10 ResNet-20s.",
        "open": "On our CIFAR-10 ResNet-20s, the effect of undecayed pruning on alpha is open.",
        "not run": "Our CIFAR-10 ResNet-20s have been pruned by magnitude only.",
    }[hypotheses.undecayed(study).verdict]
    text = (
        f"**{answer}** Over {len(alphas)} networks ({accuracy}), alpha at t = 2 minus that of the control is "
        f"{_signed(t_interval(_change(alphas)))}"
    )
    if changes:
        text += f", and undecayed minus magnitude at t = 20 is {_signed(changes[20.0])}"
    return text + "."


def _pruned_further(tables: Tables) -> str:
    if NEW_SEEDS not in tables.pruned:
        return ""
    after = jumpstart.new_seeds(tables.pruned[NEW_SEEDS])
    compared = {_IN_WORDS[other]: pairs for other, pairs in jumpstart.pruned_pairs(after).items()}
    words = {
        "supported": "can be pruned further than",
        "contradicted": "cannot be pruned as far as",
        "open": "are not shown to differ from",
    }
    title = ", and ".join(f"{words[pairs.answer]} those with {name}" for name, pairs in compared.items())
    found = [
        f"larger in {further} {_share(further, len(pairs))} and smaller in {less} {_share(less, len(pairs))} of "
        f"{len(pairs)} pairs with {name}"
        for name, (pairs, further, less, _, _) in compared.items()
        if len(pairs)
    ]
    before = after[after["ratio"] == 1]
    trained = (before["train_acc"] >= TRAINED).groupby(before["method"]).sum()
    others = " and ".join(f"{trained[method]} with {name}" for method, name in _IN_WORDS.items())
    return (
        f"**On moons, thin, deep networks trained with jumpstart {title}.** Where both networks of a pair train, the "
        f"largest t that keeps a training accuracy of .9 is {', and '.join(found)}; {trained['UP']} of "
        f"{(before['method'] == 'UP').sum()} networks train with jumpstart, {others}.{_on_mnist(tables)}"
    )


def _on_mnist(tables: Tables) -> str:
    after = jumpstart.planned_to_be_read(tables.pruned).get("mnist-pruned")
    if after is None:
        return ""
    kept = largest_ratio(after)  # of the networks that train
    least = after.loc[after["ratio"] > 1, "ratio"].min()
    many = int((kept >= least).sum()) or "none"
    return f" On MNIST, {many} of {len(kept)} networks that train keep it at t = {least:g}."


def _change(alphas: pd.DataFrame) -> pd.Series:
    return alphas["magnitude", 2.0] - alphas["magnitude", 1.0]


def _missing(tables: Tables) -> str:
    absent, partial = [], []
    for name, (words, planned) in _PLANNED.items():
        networks = _networks(tables, name)
        if not networks:
            absent.append(words)
        elif networks < planned:
            partial.append(_with_note(words, f"{networks} of {planned} networks"))
        elif (counts := _weights_run(tables, name)) is not None and len(counts) < explanations.COUNTS:
            partial.append(_with_note(words, f"{len(counts)} of {explanations.COUNTS} counts"))
    parts = [f"**Not run**: {'; '.join(absent)}."] if absent else []
    parts += [f"**Run in part**: {'; '.join(partial)}."] if partial else []
    return " ".join(parts)


def _with_note(words: str, note: str) -> str:
    """Add a note in brackets, to those that end the words if there are any.

    >>> _with_note("pruning on MNIST (J5)", "10 of 60 networks")
    'pruning on MNIST (J5, 10 of 60 networks)'
    """
    return f"{words[:-1]}, {note})" if words.endswith(")") else f"{words} ({note})"


def _weights_run(tables: Tables, name: str) -> pd.DataFrame | None:
    """The numbers of weights that have run, for the tables of R14."""
    if name == explanations.FEW_WEIGHTS:
        return explanations.collapse_table(tables.recalls[name])
    return explanations.with_floor(tables.recalls) if name == explanations.WITH_FLOOR[0] else None


def _networks(tables: Tables, name: str) -> int:
    if name in tables.recalls:
        return len(tables.recalls[name].complete(["magnitude"]))
    if name in tables.grids:
        return len(tables.grids[name])
    if name in tables.pruned:
        return int((tables.pruned[name]["ratio"] == 1).sum())
    return 0


def _published_kappas(tables: Tables) -> dict[str, float]:
    """Return, by method, kappa between our first seed and the published grid."""
    cells = tables.grids["moons"]
    both = cells[cells["replicate"] == 0].merge(
        tables.moons, on=["method", "width", "depth"], suffixes=("", "_published")
    )
    return {
        str(method): jumpstart.kappa(rows["train_acc"] >= 0.9, rows["train_acc_published"] >= 0.9)
        for method, rows in both.groupby("method", sort=False)
    }


def _share(hits: int, trials: int) -> str:
    low, high = wilson(hits, trials)
    return f"[{_plain(low, 2)}, {_plain(high, 2)}]"


def _plain(value: float, digits: int, *, signed: bool = False) -> str:
    """Format a number without the zero before the point.

    >>> _plain(0.966, 3), _plain(-0.0041, 3, signed=True), _plain(1.1, 2)
    ('.966', '-.004', '1.10')
    """
    text = f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"
    return text.replace("0.", ".", 1) if text.lstrip("+-").startswith("0.") else text


def _signed(change: references.Estimate | Interval) -> str:
    value, low, high = _ends(change)
    return f"{_plain(value, 3, signed=True)} [{_plain(low, 3, signed=True)}, {_plain(high, 3, signed=True)}]"


def _unsigned(estimate: references.Estimate) -> str:
    return f"{_plain(estimate.value, 3)} [{_plain(estimate.low, 3)}, {_plain(estimate.high, 3)}]"


def _of_mean(interval: Interval) -> str:
    value, low, high = _ends(interval)
    return f"{_plain(value, 2)} [{_plain(low, 2)}, {_plain(high, 2)}]"


def _of_change(result: jprune.recall.EqualAccuracy) -> references.Estimate:
    return references.Estimate(result.difference, result.low, result.high)


def _ends(interval: references.Estimate | Interval) -> tuple[float, float, float]:
    value = interval.value if isinstance(interval, references.Estimate) else interval.mean
    return float(value), float(interval.low), float(interval.high)
