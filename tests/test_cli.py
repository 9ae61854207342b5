"""``jprune audit``: every format gives the same answer, every mistake a clear error and exit status 2."""

import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

import jprune
from jprune import recall
from jprune.cli import main

EXAMPLES, CLASSES, MODELS = 60, 3, 4
NAMES = ("cat", "dog", "elk")


def predictions(seed, labels, rate):
    rng = np.random.default_rng(seed)
    wrong = rng.random((MODELS, labels.size)) < rate * (1 + labels)
    return np.where(wrong, (labels + rng.integers(1, CLASSES, wrong.shape)) % CLASSES, labels)


LABELS = np.repeat(np.arange(CLASSES), EXAMPLES // CLASSES)
DENSE, TWO, TEN = (predictions(seed, LABELS, rate) for seed, rate in ((0, 0.05), (1, 0.08), (2, 0.2)))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory of the test, a folder with the data in many formats."""
    monkeypatch.chdir(tmp_path)
    np.save("labels.npy", LABELS)
    pd.DataFrame({"label": LABELS}).to_csv("labels.csv", index=False)
    pd.DataFrame({"id": np.arange(EXAMPLES) + 7, "label": LABELS}).to_parquet("labels.parquet")
    np.savez("dense.npz", DENSE)
    np.save("two.npy", TWO)
    np.savez("two.npz", classes=TWO, logits=np.eye(CLASSES)[TWO] * 3.5)
    np.save("ten.npy", np.eye(CLASSES, dtype=np.float16)[TEN])
    columns = [f"m{m}" for m in range(MODELS)]
    pd.DataFrame(TWO.T, columns=columns).to_csv("two.csv")
    pd.DataFrame(TEN.T, columns=columns).to_parquet("ten.parquet")
    pd.DataFrame(TEN.T).to_csv("numbered.csv", index=False)
    np.savetxt("bare.csv", TWO.T, fmt="%d", delimiter=",")
    pd.DataFrame(np.array(NAMES)[TWO.T], columns=columns).to_csv("named.csv", index=False)
    pd.DataFrame(np.random.default_rng(3).normal(size=(EXAMPLES, CLASSES))).to_csv(
        "one_logits.csv", index=False, header=False
    )
    return tmp_path


def audit_json(capsys, *arguments):
    """The output of --json, after a check that nothing else is printed."""
    assert main(["audit", *arguments, "--json", "--resamples", "0"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    return json.loads(printed.out)


def failure(capsys, *arguments):
    """The error for invalid arguments, after a check that standard output is empty."""
    assert main(["audit", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err.strip()


BASE = ("--labels", "labels.npy", "--dense", "dense.npz")


@pytest.mark.parametrize(
    ("labels", "two", "ten"),
    [
        ("labels.npy", "two.npy", "ten.npy"),
        ("labels.csv", "two.npz:classes", "ten.parquet"),
        ("labels.parquet", "two.npz:logits", "numbered.csv"),
        ("labels.parquet:label", "two.csv", "ten.npy"),
        ("labels.csv:label", "bare.csv", "ten.parquet"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_every_format_gives_the_audit_of_the_arrays(capsys, labels, two, ten):
    found = audit_json(
        capsys, "--labels", labels, "--dense", "dense.npz", "--pruned", f"10={ten}", "--pruned", f"2={two}"
    )
    wanted = recall.audit(LABELS, DENSE, {2: TWO, 10: TEN})
    assert found["tables"]["alphas"] == json.loads(wanted.to_json())["tables"]["alphas"]


@pytest.mark.usefixtures("folder")
def test_class_names_are_converted_to_classes(capsys):
    found = audit_json(capsys, *BASE, "--pruned", "2=named.csv", "--class-names", "cat,dog,elk")
    assert [row["alpha"] for row in found["tables"]["alphas"]] == recall.audit(LABELS, DENSE, {2: TWO}).alphas[
        "alpha"
    ].tolist()
    assert found["class_names"] == list(NAMES)


@pytest.mark.parametrize("output", ["--json", "--resamples=0"])
def test_a_name_that_the_terminal_cannot_print_is_escaped(folder, output):
    np.save("named.npy", np.array(["日本", "elk", "😀"])[np.load("labels.npy") % 3])
    command = [sys.executable, "-m", "jprune", "audit", "--labels", "named.npy", "--dense", "named.npy"]
    done = subprocess.run(
        [*command, "--compare", "int8=named.npy", output],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        check=True,
    )
    if output == "--json":
        assert json.loads(done.stdout.decode())["class_names"] == ["elk", "日本", "😀"]
    else:
        assert r"\u65e5" in done.stdout.decode()


def test_class_names_may_come_from_a_file(folder, capsys):
    (folder / "names.txt").write_text("cat\n\ndog\nelk\n")
    found = audit_json(capsys, *BASE, "--pruned", "2=two.npy", "--class-names", "names.txt")
    assert found["class_names"] == list(NAMES)


@pytest.mark.usefixtures("folder")
def test_naming_a_ratio_again_adds_models(capsys):
    np.save("a.npy", TWO[:1])
    np.save("b.npy", TWO[1:])
    found = audit_json(capsys, *BASE, "--pruned", "2=a.npy", "--pruned", "2.0=b.npy")
    assert found["tables"] == json.loads(recall.audit(LABELS, DENSE, {2: TWO}).to_json())["tables"]


@pytest.mark.usefixtures("folder")
def test_scores_with_separate_dense_models_and_unpaired(capsys):
    np.save("three.npy", DENSE[:3])
    found = audit_json(
        capsys, "--labels", "labels.npy", "--dense", "magnitude=dense.npz", "--dense", "a:b=three.npy",
        "--pruned", "magnitude:2=two.npy", "--pruned", "a:b:10=ten.npy", "--unpaired", "--level", "0.9",
    )  # fmt: skip
    wanted = recall.audit(
        LABELS,
        {"magnitude": DENSE, "a:b": DENSE[:3]},
        {"magnitude": {2: TWO}, "a:b": {10: TEN}},
        paired=False,
        level=0.9,
    )
    assert found["tables"] == json.loads(wanted.to_json())["tables"]


@pytest.mark.usefixtures("folder")
def test_one_model_of_logits_in_a_table(capsys):
    logits = np.loadtxt("one_logits.csv", delimiter=",")
    found = audit_json(capsys, "--labels", "labels.npy", "--dense", "one_logits.csv", "--pruned", "2=one_logits.csv")
    assert found["tables"]["dense"][0]["accuracy"] == pytest.approx((logits.argmax(1) == LABELS).mean())


def test_everything_is_written_and_printed(folder, capsys):
    np.save("images.npy", np.random.default_rng(0).random((EXAMPLES, 4, 4)))
    pd.DataFrame({"sex": ["m", "f"] * (EXAMPLES // 2)}).to_csv("sex.csv", index=False)
    status = main([
        "audit", *BASE, "--pruned", "1=dense.npz", "--pruned", "10=ten.npy", "--out", "report.html", "--csv", "tables",
        "--images", "images.npy", "--groups", "sex.csv", "--class-names", "[bold]cat,dog,elk", "--resamples", "50",
        "--title", "A <title>", "--date", "today",
    ])  # fmt: skip
    assert status == 0
    printed = capsys.readouterr().out
    assert printed.startswith(("Class ", "No single class is shown"))
    for part in ("Classes that lost most", "Is there enough evidence?", "[bold]cat", "Report: report.html"):
        assert part in printed
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "<title>A &lt;title&gt;</title>" in page
    assert "on today." in page
    assert "data:image/png" in page
    assert len(pd.read_csv(folder / "tables" / "groups.csv")) == 2 * 2 * 4


@pytest.mark.usefixtures("folder")
def test_a_summary_alone_writes_nothing(capsys):
    before = sorted(os.listdir())
    assert main(["audit", *BASE, "--pruned", "10=ten.npy"]) == 0
    assert "alpha" in capsys.readouterr().out
    assert sorted(os.listdir()) == before


CSV = {
    "word.csv": "m0\n1\nx\n2\n",
    "short.csv": "a,b\n0,1\n1\n",
    "long.csv": "a,b\n0,1\n1,2,3\n",
    "empty.csv": "",
    "header.csv": "a,b\n",
    "twice.csv": "a,a\n" + "0,1\n" * EXAMPLES,
    "decimals.csv": "a,b\n" + "0.0,2.0\n" * EXAMPLES,
    "fraction.csv": "label\n" + "0.5\n" * EXAMPLES,
    "bool.csv": "label\n" + "True\n" * EXAMPLES,
    "gap.csv": "a,b\n" + "0,1\n" * 5 + "0,\n" + "0,1\n" * (EXAMPLES - 6),
    "nan.csv": "a,b\n" + "0.1,nan\n" * EXAMPLES,
    "range.csv": "a,b,c\n" + "0,1,2\n" * EXAMPLES,
    "two_labels.csv": "x,y\n" + "0,1\n" * EXAMPLES,
    "labels.txt": "0\n",
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--labels", "none.csv"], "none.csv does not exist; check the path"),
        (["--labels", "."], ". is not a file"),
        (["--labels", "labels.txt"], "labels.txt has the suffix '.txt'"),
        (["--labels", "two_labels.csv"], "two_labels.csv has 2 columns (x, y)"),
        (["--labels", "labels.csv:y"], "labels.csv has no column 'y'; it has label"),
        (["--labels", "fraction.csv"], "fraction.csv contains 0.5 at example 0"),
        (["--labels", "bool.csv"], "dense.npz contains 2 at model 0, example 3; the largest label in bool.csv is 1"),
        (["--labels", "empty.csv"], "empty.csv is not a readable .csv"),
        (["--labels", "header.csv"], "header.csv contains no example"),
        (["--labels", "labels.npy", "--num-classes", "2"], "labels.npy contains 2 at example 40; num_classes is 2"),
        (["--dense", "two.npz"], "two.npz has 2 arrays (classes, logits): pick one as two.npz:NAME; if each array is "),
        (["--dense", "two.npz:none"], "two.npz has no array 'none'"),
        (["--dense", "word.csv"], "word.csv, column 'm0' contains 'x' at example 1, text among numbers"),
        (["--dense", "short.csv"], "short.csv, column 'b' contains '' at example 1; expected a number or a class name"),
        (["--dense", "long.csv"], "long.csv is not a readable .csv"),
        (["--dense", "twice.csv"], "twice.csv has the column 'a' twice"),
        (["--dense", "decimals.csv"], "decimals.csv contains whole numbers as decimals (such as 0.0)"),
        (["--dense", "gap.csv"], "gap.csv, column 'b'"),
        (["--dense", "nan.csv"], "nan.csv"),
        (["--dense", "numbers.csv"], "numbers.csv begins with the row 0, 1, ... 3: a header"),
        (["--dense", "pickle.npy"], "pickle.npy is not a readable .npy"),
        (["--dense", "object.npy"], "object.npy contains Python objects: save names as text"),
        (["--dense", "object.npz"], "object.npz has an unreadable array"),
        (["--dense", "broken.npz"], "broken.npz is not a readable .npz"),
        (["--dense", "named.npz"], "named.npz is not an .npz"),
        (["--dense", "broken.parquet"], "broken.parquet is not a readable .parquet"),
        (["--dense", "range.csv"], "two.npy has 4 models, range.csv has 3"),
        (["--pruned", "2=range.csv"], "range.csv has 3 models, dense.npz has 4"),
        (["--pruned", "2=labels.npy"], "labels.npy has 1 model,"),
        (["--pruned", "two.npy"], "--pruned must be [SCORE:]RATIO=FILE"),
        (["--pruned", "x=two.npy"], "--pruned must be [SCORE:]RATIO=FILE"),
        (["--pruned", "1.2.3=two.npy"], "the ratio '1.2.3' is not a number"),
        (["--pruned", "0.5=two.npy"], "--pruned has the ratio 0.5"),
        (["--pruned", "2=two.npy", "--pruned", "m:3=two.npy"], "name a score for every file"),
        (["--pruned", "m:2=two.npy", "--dense", "m=dense.npz", "--dense", "two.npy"], "--dense: give SCORE=FILE"),
        (["--class-names", "cat,dog"], "labels.npy contains 2 at example 40; 2 class names were given"),
        (["--class-names", "cat,cat,dog"], "class_names[1] repeats 'cat'"),
        (["--class-names", "none.txt"], "none.txt cannot be read"),
        (["--groups", "two.csv"], ""),
        (["--groups", "header.csv"], "header.csv contains no example"),
        (["--images", "two.npy"], "--images are shown only in the report; add --out"),
        (["--images", "two.csv", "--out", "report.html"], "two.csv: images are read from .npy or .npz only"),
        (["--images", "two.npy", "--out", "report.html"], "images must have shape"),
        (["--out", "none/report.html"], "the folder none does not exist; create it"),
        (["--out", "."], "is a folder"),
        (["--csv", "two.csv"], "--csv two.csv is not a folder"),
        (["--level", "99.0"], "--level must lie strictly between 0 and 1"),
        (["--resamples", "-1"], "--resamples"),
        (["--seed", "-1"], "--seed must be 0 or more"),
        (["--margin", "0"], "--margin must lie between 0 and 10 (0.1 for alpha within 0.91 to 1.1), got 0.0"),
        (["--top-k", "0"], "--top-k must be at least 1, got 0"),
        (["--top-k", "9"], "top_k is 9, but there are only 3 classes"),
    ],
)  # fmt: skip
def test_every_mistake_names_the_file_and_value_and_writes_nothing(folder, capsys, change, message):
    for name, text in CSV.items():
        (folder / name).write_text(text)
    pd.DataFrame(TWO.T).to_csv("numbers.csv", index=False)
    (folder / "numbers.csv").write_text("\n".join((folder / "numbers.csv").read_text().split("\n")[:EXAMPLES]))
    (folder / "pickle.npy").write_bytes(pickle.dumps([1, 2]))
    np.save("object.npy", np.array([{}, {}], dtype=object))
    np.savez("object.npz", np.array([{}, {}], dtype=object))
    (folder / "broken.npz").write_bytes((folder / "two.npz").read_bytes()[:100])
    (folder / "named.npz").write_bytes((folder / "two.npy").read_bytes())
    (folder / "broken.parquet").write_bytes((folder / "ten.parquet").read_bytes()[:-20])
    before = sorted(os.listdir())
    given = {"--labels": ["labels.npy"], "--dense": ["dense.npz"], "--pruned": ["2=two.npy"]}
    for option in change[::2]:
        given[option] = []
    for option, value in zip(change[::2], change[1::2], strict=True):
        given[option].append(value)
    arguments = [part for option, values in given.items() for value in values for part in (option, value)]
    if message:
        assert message in failure(capsys, *arguments)
    else:
        assert main(["audit", *arguments, "--json"]) == 0
    assert sorted(os.listdir()) == before


@pytest.mark.usefixtures("folder")
def test_a_report_that_cannot_be_written_leaves_no_tables_behind(capsys, monkeypatch):
    before = sorted(os.listdir())
    arguments = [*BASE, "--pruned", "2=two.npy", "--csv", "tables", "--out"]
    assert "is a device or a pipe" in failure(capsys, *arguments, os.devnull)
    monkeypatch.setattr(os, "access", lambda folder, mode: False)
    assert "no permission to write into the folder ." in failure(capsys, *arguments, "report.html")
    assert sorted(os.listdir()) == before


@pytest.mark.usefixtures("folder")
def test_options_that_have_no_effect_on_these_predictions_are_noted(capsys):
    assert main(["audit", *BASE, "--pruned", "2=two.npy", "--threshold", "0.5", "--top-k", "2", "--json"]) == 0
    notes = json.loads(capsys.readouterr().out)["warnings"]
    assert "threshold=0.5 (--threshold 0.5) has no effect, because no model has one probability per example" in notes
    assert "top_k=2 (--top-k 2) has no effect without logits" in notes
    message = "--pruned must be [SCORE:]RATIO=FILE, for example 10=p10.npz, got 'two.npy'; for models without a ratio"
    assert failure(capsys, *BASE, "--pruned", "two.npy") == f"jprune audit: {message} use --compare NAME=FILE"


@pytest.mark.usefixtures("folder")
def test_one_array_for_each_model_is_read_by_repeating_the_option(capsys):
    np.savez("each.npz", *DENSE)
    np.savez("labels_twice.npz", a=LABELS, b=LABELS)
    message = failure(capsys, *BASE[:2], "--dense", "each.npz", "--pruned", "2=two.npy")
    assert "repeat the option for each of them (each.npz:arr_0, then each.npz:arr_1)" in message
    each = [part for model in range(MODELS) for part in ("--dense", f"each.npz:arr_{model}")]
    found = audit_json(capsys, *BASE[:2], *each, "--pruned", "2=two.npy")
    assert found["tables"] == json.loads(recall.audit(LABELS, DENSE, {2: TWO}).to_json())["tables"]
    message = failure(capsys, "--labels", "labels_twice.npz", "--dense", "two.npy", "--pruned", "2=two.npy")
    assert message.endswith("pick one as labels_twice.npz:NAME")


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    "given",
    [("--dense", "two.npy", "two.npy", "--pruned", "2=two.npy"), ("--dense", "two.npy", "--pruned", "2=a", "4=b")],
)
def test_several_files_after_one_option_are_refused_with_the_way_to_give_them(capsys, given):
    assert main(["audit", *BASE[:2], *given]) == 2
    assert "repeat it for each: --dense a.npy --dense b.npy" in capsys.readouterr().err


@pytest.mark.usefixtures("folder")
def test_an_attribute_in_two_files_of_groups_is_refused(capsys):
    pd.DataFrame({"sex": ["m", "f"] * (EXAMPLES // 2)}).to_csv("one.csv", index=False)
    pd.DataFrame({"sex": ["f", "m"] * (EXAMPLES // 2), "age": range(EXAMPLES)}).to_csv("two_of_them.csv", index=False)
    groups = ("--groups", "one.csv", "--groups", "two_of_them.csv")
    printed = failure(capsys, *BASE, "--pruned", "2=two.npy", *groups)
    assert printed == (
        "jprune audit: --groups two_of_them.csv has the attribute 'sex', which an earlier file has too; rename one of "
        "them"
    )


@pytest.mark.usefixtures("folder")
def test_a_pickle_is_never_run(capsys):
    class Trap:
        def __reduce__(self):
            return os.mkdir, ("sprung",)

    np.save("trap.npy", np.array([Trap()], dtype=object), allow_pickle=True)
    np.savez("trap.npz", np.array([Trap()], dtype=object))
    for name in ("trap.npy", "trap.npz"):
        failure(capsys, "--labels", name, "--dense", "dense.npz", "--pruned", "2=two.npy")
    assert not os.path.exists("sprung")


@pytest.mark.usefixtures("folder")
def test_an_error_says_from_where_examples_are_counted_and_prints_no_control_characters(capsys):
    np.savetxt("wild\x1b[31m.csv", LABELS + 9, fmt="%d")
    printed = failure(capsys, "--labels", "labels.npy", "--dense", "labels.npy", "--pruned", "2=wild\x1b[31m.csv")
    assert printed == (
        "jprune audit: wild\\x1b[31m.csv contains 9 at model 0, example 0; the largest label in labels.npy is "
        "2: allowed 0..2; pass num_classes (--num-classes) if some classes have no examples (models and "
        "examples are counted from 0)"
    )


@pytest.mark.usefixtures("folder")
def test_a_full_disk_leaves_no_report_behind(capsys, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "No space left" in failure(capsys, *BASE, "--pruned", "2=two.npy", "--out", "report.html")
    assert not [name for name in os.listdir() if "report" in name]


def test_usage_errors_and_help(capsys):
    assert main([]) == 2
    assert "measure how compression changes the recall of each class" in capsys.readouterr().err
    assert main(["audit", "--labls", "x"]) == 2
    assert main(["audit", "--labels", "x"]) == 2
    assert "--dense is needed" in capsys.readouterr().err
    assert main(["audit", "--help"]) == 0
    printed = capsys.readouterr().out
    for option in ("--labels", "--dense", "--pruned", "--out", "--json", "--class-names", "--unpaired", "--level"):
        assert option in printed
    assert (
        "jprune audit --labels labels.csv --dense dense.npz \\\n      --pruned 2=p2.npz --pruned 10=p10.npz" in printed
    )


@pytest.mark.parametrize("module", ["rich.console", "jinja2"])
@pytest.mark.usefixtures("folder")
def test_a_missing_extra_is_named(capsys, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    assert "pip install 'jprune[report]'" in failure(capsys, *BASE, "--pruned", "2=two.npy", "--out", "report.html")
    assert not os.path.exists("report.html") or module == "rich.console"


@pytest.mark.usefixtures("folder")
def test_a_separate_process_prints_json_and_nothing_else():
    command = [sys.executable, "-c", "import sys; from jprune.cli import main; sys.exit(main())", "audit", *BASE]
    done = subprocess.run([*command, "--pruned", "2=two.npy", "--json"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert set(json.loads(done.stdout)["tables"]) >= {"summary", "alphas", "classes", "tests"}


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("output", ["--json", pytest.param("--resamples=0", marks=pytest.mark.slow)])
def test_a_closed_pipe_ends_it_quietly(output):
    command = [sys.executable, "-c", "import sys; from jprune.cli import main; sys.exit(main())", "audit", *BASE]
    with subprocess.Popen(
        [*command, "--pruned", "2=two.npy", output], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.close()  # as `| head` does when it has had enough
        assert process.stderr.read() == ""
    assert process.returncode == 1


def test_python_m_jprune_is_the_command():
    done = subprocess.run([sys.executable, "-m", "jprune", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"jprune {jprune.__version__}\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_under_standard_output_is_an_error_in_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "jprune", "--version"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 2
    assert done.stderr.startswith("jprune audit: standard output could not be written: ")
    assert done.stderr.count("\n") == 1


def test_standard_output_may_be_closed(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["--version"]) == 0


@pytest.mark.parametrize("columns", ["1", "2"])
def test_help_fits_the_narrowest_terminal(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    assert main(["audit", "--help"]) == 0
    assert "--labels" in capsys.readouterr().out
