"""Any order of writes, losses, damage and killed writers, compared with a dict of the expected contents."""

import itertools
import os
import re
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings, stateful
from hypothesis import strategies as st

from experiments.storage import files, store

SETTINGS = ({"seed": 1}, {"seed": 2, "rate": 0.5})
# Around here the names of folders grow by a digit.
FIRST = 99_997

which = st.integers(0, len(SETTINGS) - 1)
ranges = st.tuples(st.integers(0, 5), st.integers(1, 4)).map(lambda pair: range(FIRST + pair[0], FIRST + sum(pair)))
TABLE, WEIGHTS, MANIFEST = "rows.parquet", "weights", "manifest.json"


class Store(stateful.RuleBasedStateMachine):
    """A store on disk compared with a dict: (settings, replicates) -> [value, the parts that are damaged]."""

    def __init__(self):
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.stored = {}
        self.partial = {}  # folder that a killed writer left -> whether it is stale
        self.writes = 0

    def stage(self, which, replicates):
        return store.stage(self.root, "dense", SETTINGS[which], replicates)

    def fill(self, folder, replicates, value):
        numbers = value + np.array(replicates, np.float32)
        files.write_weights(folder / WEIGHTS, {"kernel": numbers[:, None]})
        files.write_table(folder / TABLE, {"replicate": np.array(replicates), "value": numbers})

    def swept(self, which):
        """The first step of a writer: it deletes stale partial folders of its own kind of stage."""
        folder = self.stage(which, range(1)).path.parent
        self.partial = {path: stale for path, stale in self.partial.items() if not (stale and path.parent == folder)}

    @stateful.rule(which=which, replicates=ranges)
    def write(self, which, replicates):
        self.writes += 1
        stage = self.stage(which, replicates)
        with store.writing(stage, SETTINGS[which]) as folder:
            self.fill(folder, replicates, self.writes)
        self.stored.setdefault((which, replicates), [self.writes, set()])
        self.swept(which)
        assert stage.done

    @stateful.rule(which=which, replicates=ranges)
    def fail_while_writing(self, which, replicates):
        stage = self.stage(which, replicates)

        def fail():
            with store.writing(stage, SETTINGS[which]) as folder:
                (folder / "half").write_text("half")
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            fail()
        self.swept(which)
        assert stage.done == ((which, replicates) in self.stored)

    @stateful.rule(which=which, replicates=ranges, stale=st.booleans())
    def be_killed_while_writing(self, which, replicates, stale):
        path = self.stage(which, replicates).path
        path = path.with_name(f"{path.name}{files.PARTIAL}{len(self.partial)}-{self.writes}")
        path.mkdir(parents=True, exist_ok=True)
        (path / TABLE).write_text("half")
        age = 7200 if stale else 60
        os.utime(path, (time.time() - age,) * 2)
        self.partial[path] = stale

    @stateful.precondition(lambda self: self.stored)
    @stateful.rule(data=st.data())
    def lose(self, data):
        key = data.draw(st.sampled_from(list(self.stored)))
        del self.stored[key]
        shutil.rmtree(self.stage(*key).path)

    @stateful.precondition(lambda self: self.stored)
    @stateful.rule(data=st.data(), part=st.sampled_from([TABLE, WEIGHTS, MANIFEST]), how=st.integers(0, 2))
    def damage(self, data, part, how):
        key = data.draw(st.sampled_from(list(self.stored)))
        if part in self.stored[key][1]:
            return
        path = self.stage(*key).path / part
        path = path if path.is_file() else max(path.rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
        content = path.read_bytes()
        if how == 0:
            path.unlink()
        elif how == 1:
            path.write_bytes(content[: len(content) // 2])
        else:
            path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
        self.stored[key][1].add(part)

    @stateful.rule(which=which, replicates=ranges)
    def collect_weights(self, which, replicates):
        stages = [self.stage(which, stored) for stored in self.ranges(which)]
        expected, owners = self.owned(which)
        needed = {owners[r] for r in replicates if r in owners}
        refused = [owner for owner in needed if self.stored[which, owner][1] & {WEIGHTS, MANIFEST}]
        if refused or not all(r in expected for r in replicates):
            with pytest.raises(store.StoreError, match=r"delete .*dense-|the store has no weights for all of"):
                store.collect_weights(stages, replicates)
        else:
            found = store.collect_weights(stages, replicates)["kernel"]
            np.testing.assert_array_equal(found[:, 0], [expected[r] for r in replicates])

    @stateful.rule(which=which)
    def collect_table(self, which):
        stages = [self.stage(which, stored) for stored in self.ranges(which)]
        expected, owners = self.owned(which)
        refused = [owner for owner in set(owners.values()) if self.stored[which, owner][1] & {TABLE, MANIFEST}]
        if not stages:
            return
        if refused:
            named = "|".join(re.escape(str(self.stage(which, owner).path)) for owner in refused)
            with pytest.raises(store.StoreError, match=rf"delete ({named}) and"):
                store.collect_table(stages, TABLE)
        else:
            table = store.collect_table(stages, TABLE)
            assert dict(zip(table["replicate"], table["value"], strict=True)) == expected
            assert table["replicate"].tolist() == sorted(expected)

    def ranges(self, which):
        stored = [replicates for one, replicates in self.stored if one == which]
        return sorted(stored, key=lambda replicates: (replicates.start, replicates.stop))

    def owned(self, which):
        """The value of every replicate, and the stage it comes from: the first that has it."""
        owners = {}
        for replicates in self.ranges(which):
            for r in replicates:
                owners.setdefault(r, replicates)
        return {r: float(np.float32(self.stored[which, owner][0] + r)) for r, owner in owners.items()}, owners

    @stateful.invariant()
    def the_store_finds_what_the_dict_holds(self):
        wanted = range(FIRST - 1, FIRST + 10)
        for one, chosen in enumerate(SETTINGS):
            assert [stage.replicates for stage in store.find(self.root, "dense", chosen)] == self.ranges(one)
            absent = [r for r in wanted if r not in self.owned(one)[0]]
            missing = store.missing(self.root, "dense", chosen, wanted)
            assert [r for part in missing for r in part] == absent
            assert all(a.stop < b.start for a, b in itertools.pairwise(missing))

    @stateful.invariant()
    def nothing_else_lies_about(self):
        wanted = {self.stage(*key).path for key in self.stored} | set(self.partial)
        assert set(self.root.glob("*/*")) == wanted

    def teardown(self):
        shutil.rmtree(self.root, ignore_errors=True)


def run(examples, steps, *, derandomize=True):
    chosen = settings(max_examples=examples, stateful_step_count=steps, derandomize=derandomize)
    stateful.run_state_machine_as_test(Store, settings=chosen)


def test_any_order_of_writes_losses_and_damage_leaves_what_the_dict_says():
    run(examples=5, steps=12)


@pytest.mark.slow
def test_many_orders_of_writes_losses_and_damage_leave_what_the_dict_says():
    run(examples=30, steps=25, derandomize=False)
