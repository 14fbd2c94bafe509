"""``config.toml`` reproduces its run; flags override it, and what would give other bits is refused on resuming."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from itertools import count
from math import inf
from pathlib import Path
from typing import Any

import pytest

from asynctrain.train import checkpoint, control

Asynctrain = Callable[..., Any]

OPTIONS = ["--model", "linear", "--epochs", 3, "--batch-size", 8, "--microbatch", 4, "--lr", 0.01, "--seed", 5]


@pytest.fixture
def run(asynctrain: Asynctrain, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of a run that ended after 6 of its 12 steps, as its clock said then that time was over."""
    looks = count()
    with monkeypatch.context() as patched:
        patched.setattr(control, "monotonic", lambda: inf if next(looks) >= 6 else 0.0)
        called = asynctrain("train", image_folder, *OPTIONS, "--seconds", 600, "--out", tmp_path / "run", "--json")
    assert called.code == 0, called.stderr
    assert called.json["test_accuracy"] is None
    return tmp_path / "run"


def test_the_configuration_of_a_run_trains_the_same_again(
    asynctrain: Asynctrain, image_folder: Path, tmp_path: Path
) -> None:
    first = asynctrain("train", image_folder, *OPTIONS, "--out", tmp_path / "a", "--json").json
    again = asynctrain("train", "--config", tmp_path / "a" / "config.toml", "--out", tmp_path / "b", "--json").json
    assert again["digest"] == first["digest"]
    configs = [tomllib.loads((tmp_path / name / "config.toml").read_text()) for name in "ab"]
    assert configs[0] == configs[1]
    assert configs[0]["train"]["folder"] == str(image_folder)


def test_what_a_run_has_chosen_by_itself_is_in_its_configuration(
    asynctrain: Asynctrain, image_folder: Path, tmp_path: Path
) -> None:
    asynctrain("train", image_folder, "--model", "linear", "--batch-size", 1, "--out", tmp_path / "run")
    chosen = tomllib.loads((tmp_path / "run" / "config.toml").read_text())["train"]
    assert (chosen["epochs"], chosen["image_size"], chosen["lr"]) == (40, 12, 3e-3)


def test_flags_override_a_configuration_of_ones_own(asynctrain: Asynctrain, image_folder: Path, tmp_path: Path) -> None:
    config = tmp_path / "own.toml"
    config.write_text(f'[train]\nfolder = "{image_folder}"\nmodel = "linear"\nepochs = 2\nseed = 5\n')
    called = asynctrain("train", "--config", config, "--seed", 6, "--out", tmp_path / "run")
    assert called.code == 0, called.stderr
    made = tomllib.loads((tmp_path / "run" / "config.toml").read_text())["train"]
    assert (made["model"], made["epochs"], made["seed"]) == ("linear", 2, 6)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("[train", "must be a readable TOML file"),
        ("[other]\n", "must have a section [train]"),
        ("[train]\nmodle = 'linear'\n", "got modle"),
        ("[train]\nepochs = 0\n", "epochs"),
        ("[train]\nbatch_size = 'many'\n", "batch"),
        ("[train]\nmodel = 'gpt'\n", "gpt"),
        ("[train]\nmodel = 'linear'\n", "DIR must be given"),
    ],
    ids=str,
)
def test_a_wrong_configuration_is_wrong_usage_and_told(
    asynctrain: Asynctrain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, told: str
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    (tmp_path / "own.toml").write_text(content)
    called = asynctrain("train", "--config", tmp_path / "own.toml", "--out", tmp_path / "run")
    assert called.code == 2
    assert told in called.stderr
    assert "Traceback" not in called.stderr


def test_a_resumed_run_goes_on_in_mid_epoch_to_the_digest_of_one_that_was_never_stopped(
    asynctrain: Asynctrain, image_folder: Path, tmp_path: Path, run: Path
) -> None:
    whole = asynctrain("train", image_folder, *OPTIONS, "--out", tmp_path / "whole", "--json").json
    resumed = asynctrain("train", "--resume", run, "--executor", "inline", "--json")
    assert resumed.code == 0, resumed.stderr
    assert resumed.json["digest"] == whole["digest"]
    assert resumed.json["test_accuracy"] == whole["test_accuracy"]


def test_a_checkpoint_can_be_named_in_place_of_the_run(asynctrain: Asynctrain, run: Path) -> None:
    path = checkpoint.find(run)[0]
    assert path.name == checkpoint.name_of(6)
    assert asynctrain("train", "--resume", path, "--json").json["run_dir"] == str(run)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--batch-size", 9], "batch_size is 8 there and 9 here"),
        (["--microbatch", 5], "microbatch is 4 there and 5 here"),
        (["--seed", 6], "seed is 5 there and 6 here"),
        (["--lr", 0.02], "optimizer.learning_rate.peak is 0.01 there and 0.02 here"),
        (["--model", "mlp"], "architecture."),
    ],
    ids=str,
)
def test_flags_that_would_give_other_bits_are_refused_in_one_sentence(
    asynctrain: Asynctrain, run: Path, flags: list[object], told: str
) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    called = asynctrain("train", "--resume", run, *flags)
    assert called.code == 1
    assert told in called.sentence
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_what_is_no_run_cannot_be_resumed_and_the_runs_in_it_are_told(
    asynctrain: Asynctrain, tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    for path in (run.parent, run.parent / "nowhere", run / "model.safetensors"):
        called = asynctrain("train", "--resume", path)
        assert called.code == 2
        assert f"{path} is neither the folder of a run nor a checkpoint in one" in called.stderr
        assert (f"there are {run}" in called.stderr) == (path == run.parent)


def test_patience_ends_a_training_early_with_the_accuracy_of_its_best_epoch(
    asynctrain: Asynctrain, image_folder: Path, tmp_path: Path
) -> None:
    options = ["--model", "linear", "--optimizer", "sgd", "--lr", 3.0, "--epochs", 30, "--patience", 2]
    called = asynctrain("train", image_folder, *options, "--out", tmp_path / "run", "--json")
    assert called.code == 0, called.stderr
    tested = asynctrain("evaluate", tmp_path / "run" / "model.safetensors", image_folder, "--json")
    assert tested.code == 0
    assert '"reason": "stopped"' in (tmp_path / "run" / "history.jsonl").read_text().splitlines()[-1]
    assert called.json["test_accuracy"] is not None


def test_checkpoints_come_as_often_as_asked(asynctrain: Asynctrain, image_folder: Path, tmp_path: Path) -> None:
    asynctrain("train", image_folder, *OPTIONS, "--checkpoint-every", 5, "--out", tmp_path / "run")
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-0000000010.safetensors", "step-0000000012.safetensors"]


def test_a_resumed_run_shows_where_it_goes_on_and_no_epoch_again(
    asynctrain: Asynctrain, run: Path, image_folder: Path
) -> None:
    called = asynctrain("train", "--resume", run)
    assert called.code == 0, called.stderr
    seen = called.stderr.splitlines()
    assert seen.count("going on after step 6") == 1
    assert not [line for line in seen if line.startswith("epoch 1/")], "it was shown when it was trained"
    assert [line for line in seen if line.startswith("epoch 3/")]


def test_the_help_names_the_section_of_a_configuration_and_puts_brackets_once(
    asynctrain: Asynctrain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    helped = asynctrain("train", "--help").stdout
    assert "options from [train] in" in helped
    assert "[DIR]" in helped
    assert "[[DIR]]" not in helped
    assert "IMAGE......" not in asynctrain("predict", "--help").stdout.replace("}", "")


def test_a_missing_configuration_is_told_without_an_error_number(asynctrain: Asynctrain, tmp_path: Path) -> None:
    called = asynctrain("train", "--config", tmp_path / "none.toml")
    assert called.code == 2
    assert "No such file" in called.stderr
    assert "Errno" not in called.stderr
