"""Settings recorded in a folder, found again by the study that they are of."""

from experiments.storage import settings


def test_a_study_is_found_after_options_were_added(tmp_path):
    settings.record(tmp_path, "demo", {"model": "mine:A", "lr": [0.1]}, {}, model={"source": "a"}, note=False)
    changed = settings.record(tmp_path, "demo", {"model": "mine:B", "lr": [0.1]}, {}, model={"source": "b"}, note=False)
    assert changed == ["model: mine:A -> mine:B"]
    found = settings.of_study(tmp_path, {"model": "mine:A", "lr": [0.1], "added_later": 0})
    assert found["model"] == {"source": "a"}
    assert settings.of_study(tmp_path, {"model": "mine:C", "lr": [0.1]})["model"] == {"source": "b"}, "the last run"
    assert settings.of_study(tmp_path / "empty", {"model": "mine:A"}) is None


def test_a_changed_class_of_the_same_name_is_noticed(tmp_path):
    record = lambda source: settings.record(
        tmp_path, "demo", {"lr": [0.1]}, {}, model={"source": source, "shapes": {"kernel": (2, 3)}}, note=False
    )
    assert record("a") == record("a") == []
    assert record("b") == ["the model's code or the shapes of its parameters"]
