"""``asynctrain train``, and what can be done with the model file it writes."""

from __future__ import annotations

import shlex
import shutil
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import asynctrain as at

Asynctrain = Callable[..., Any]


@pytest.fixture
def trained(asynctrain: Asynctrain, image_folder: Path, tmp_path: Path) -> Path:
    """Return the run folder of a short training."""
    called = asynctrain("train", image_folder, "--model", "linear", "--epochs", 20, "--out", tmp_path / "run")
    assert called.code == 0, called.stderr
    return tmp_path / "run"


def test_train_alone_gives_a_good_classifier_in_a_folder_named_after_the_data(
    asynctrain: Asynctrain, image_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    called = asynctrain("train", "flowers")
    assert called.code == 0, called.stderr
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("flowers-")
    assert "100.00 % of the test images" in called.stderr
    assert called.stdout == ""


def test_train_json_tells_what_was_reached(asynctrain: Asynctrain, image_folder: Path, tmp_path: Path) -> None:
    options = ["--model", "mlp", "--epochs", 2, "--executor", "inline", "--seed", 3]
    result = asynctrain("train", image_folder, *options, "--out", tmp_path / "a", "--json").json
    assert set(result) == {"test_accuracy", "digest", "seconds", "images_per_second", "run_dir"}
    assert 0 <= result["test_accuracy"] <= 1
    assert result["run_dir"] == str(tmp_path / "a")
    assert len(result["digest"]) == 64


def test_the_same_seed_gives_the_same_digest_from_every_executor(
    asynctrain: Asynctrain, image_folder: Path, tmp_path: Path
) -> None:
    def digest(name: str, *options: object) -> str:
        fixed = ["--epochs", 2, "--batch-size", 16, "--microbatch", 4, "--out", tmp_path / name, "--json"]
        return str(asynctrain("train", image_folder, *fixed, *options).json["digest"])

    executors = ["inline", "threads:3", "processes:2"]
    assert len({digest(executor, "--executor", executor) for executor in executors}) == 1
    assert digest("c", "--seed", 1) != digest("d", "--seed", 2)


def test_every_tenth_can_be_held_out_and_none_of_it_is_trained_on(
    asynctrain: Asynctrain, image_folder: Path, tmp_path: Path
) -> None:
    asynctrain("train", image_folder, "--model", "linear", "--epochs", 1, "--holdout", 0.1, "--out", tmp_path / "run")
    config = tomllib.loads((tmp_path / "run" / "config.toml").read_text())
    assert config["data"]["samples"] == 36


@pytest.mark.parametrize("name", ["test", "val"])
def test_train_and_test_folders_are_taken_when_they_are_there(
    asynctrain: Asynctrain, image_folder: Path, tmp_path: Path, name: str
) -> None:
    shutil.copytree(image_folder, tmp_path / "data" / "train")
    shutil.copytree(image_folder, tmp_path / "data" / name)
    called = asynctrain("train", tmp_path / "data", "--model", "linear", "--epochs", 1, "--out", tmp_path / "run")
    assert "40 training images" in called.stderr


def test_a_test_folder_with_other_classes_is_refused(
    asynctrain: Asynctrain, image_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(image_folder, tmp_path / "data" / "train")
    shutil.copytree(image_folder / "rose", tmp_path / "data" / "test" / "daisy")
    called = asynctrain("train", tmp_path / "data")
    assert called.code == 1
    assert "must have the class folders rose, tulip; it has daisy" in called.sentence


def test_grey_images_make_a_model_of_one_channel_and_of_their_size(
    asynctrain: Asynctrain, image_folder: Path, tmp_path: Path
) -> None:
    for path in image_folder.rglob("*.png"):
        with Image.open(path) as image:
            image.convert("L").resize((10, 10)).save(path)
    asynctrain("train", image_folder, "--model", "linear", "--epochs", 1, "--out", tmp_path / "run")
    assert at.Classifier.load(tmp_path / "run" / "model.safetensors").image_shape == (10, 10, 1)


def test_large_images_are_brought_to_64_pixels_or_to_what_was_asked_for(
    asynctrain: Asynctrain, image_folder: Path, tmp_path: Path
) -> None:
    for path in image_folder.rglob("*.png"):
        with Image.open(path) as image:
            image.resize((90, 120)).save(path)
    fixed = ["train", image_folder, "--model", "linear", "--epochs", 1]
    asynctrain(*fixed, "--out", tmp_path / "a")
    asynctrain(*fixed, "--out", tmp_path / "b", "--image-size", 20)
    assert at.Classifier.load(tmp_path / "a" / "model.safetensors").image_shape == (64, 64, 3)
    assert at.Classifier.load(tmp_path / "b" / "model.safetensors").image_shape == (20, 20, 3)


def test_predict_names_the_class_of_each_image(asynctrain: Asynctrain, image_folder: Path, trained: Path) -> None:
    images = [image_folder / "rose" / "00.png", image_folder / "tulip" / "01.png"]
    called = asynctrain("predict", trained / "model.safetensors", *images, "--json")
    assert [found["label"] for found in called.json["predictions"]] == ["rose", "tulip"]
    assert [found["image"] for found in called.json["predictions"]] == [str(path) for path in images]
    assert f"{images[0]}: rose" in called.stderr


def test_predict_lists_as_many_classes_as_asked_for(asynctrain: Asynctrain, image_folder: Path, trained: Path) -> None:
    image = image_folder / "rose" / "00.png"
    (found,) = asynctrain("predict", trained / "model.safetensors", image, "--top", 1, "--json").json["predictions"]
    assert [name for name, _ in found["top"]] == ["rose"]


def test_evaluate_measures_a_folder(asynctrain: Asynctrain, image_folder: Path, trained: Path) -> None:
    result = asynctrain("evaluate", trained / "model.safetensors", image_folder, "--json").json
    assert result["samples"] == 40
    assert result["accuracy"] == 1.0


def test_evaluate_refuses_other_classes(asynctrain: Asynctrain, image_folder: Path, trained: Path) -> None:
    (image_folder / "rose").rename(image_folder / "daisy")
    called = asynctrain("evaluate", trained / "model.safetensors", image_folder)
    assert called.code == 1
    assert "must have the class folders rose, tulip; it has daisy, tulip" in called.sentence


def test_the_suggested_command_works(asynctrain: Asynctrain, image_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "a run"
    called = asynctrain("train", image_folder, "--model", "linear", "--epochs", 1, "--out", out)
    (suggested,) = (line for line in called.stderr.splitlines() if " predict " in line)
    assert asynctrain(*shlex.split(suggested)[1:]).code == 0


def empty(folder: Path) -> None:
    for child in folder.iterdir():
        shutil.rmtree(child)


def all_but_one(folder: Path) -> None:
    for path in folder.glob("*/*"):
        if path.stem != "00":
            path.unlink()


@pytest.mark.parametrize(
    ("broken", "sentence"),
    [
        (shutil.rmtree, "no such folder"),
        (empty, "is empty"),
        (lambda folder: [path.unlink() for path in folder.glob("rose/*")], "holds no image"),
        (lambda folder: (folder / "rose" / "00.png").write_bytes(b"no image"), "00.png"),
        (lambda folder: shutil.rmtree(folder / "rose"), "holds images of one class, tulip"),
        (all_but_one, "none are left to test with"),
    ],
)
def test_bad_folders_end_in_one_sentence_and_code_1(
    asynctrain: Asynctrain, image_folder: Path, tmp_path: Path, broken: Callable[[Path], object], sentence: str
) -> None:
    broken(image_folder)
    called = asynctrain("train", image_folder, "--model", "linear", "--epochs", 1, "--out", tmp_path / "run")
    assert called.code == 1
    assert called.stdout == ""
    last = called.stderr.splitlines()[-1]
    assert last.startswith("asynctrain: ")
    assert sentence in last
    assert "Traceback" not in called.stderr


def test_a_run_folder_is_not_overwritten(asynctrain: Asynctrain, image_folder: Path, trained: Path) -> None:
    before = (trained / "model.safetensors").read_bytes()
    called = asynctrain("train", image_folder, "--out", trained)
    assert called.code == 1
    assert f"holds one; --resume {trained} goes on" in called.sentence
    assert (trained / "model.safetensors").read_bytes() == before


def test_a_missing_or_foreign_model_file_is_told_in_one_sentence(
    asynctrain: Asynctrain, image_folder: Path, tmp_path: Path
) -> None:
    image = image_folder / "rose" / "00.png"
    assert "no such model file" in asynctrain("predict", tmp_path / "none.safetensors", image).sentence
    foreign = asynctrain("predict", image, image)
    assert foreign.code == 1
    assert str(image) in foreign.sentence


def test_the_folder_of_a_run_stands_for_its_model(asynctrain: Asynctrain, image_folder: Path, trained: Path) -> None:
    image = image_folder / "rose" / "00.png"
    assert asynctrain("predict", trained, image, "--json").json["predictions"][0]["label"] == "rose"
    assert asynctrain("evaluate", trained, image_folder, "--json").json["accuracy"] == 1.0


def test_a_broken_image_ends_the_training_or_is_left_out_and_told_as_the_user_wants(
    asynctrain: Asynctrain, image_folder: Path, tmp_path: Path
) -> None:
    for part in ("train", "test"):
        shutil.copytree(image_folder, tmp_path / "data" / part)
    broken = [tmp_path / "data" / part / "rose" / "00.png" for part in ("train", "test")]
    for file in broken:
        file.write_bytes(b"no image")
    options = ["train", tmp_path / "data", "--model", "linear", "--epochs", 2]
    ended = asynctrain(*options, "--out", tmp_path / "a")
    assert ended.code == 1
    assert "failed; no step is done yet; when the cause is mended, begin anew with:" in ended.stderr
    told = asynctrain(*options, "--errors", "skip", "--out", tmp_path / "b")
    assert told.code == 0, told.stderr
    assert [told.stderr.count(f"left out {file}: is no JPEG") for file in broken] == [1, 1]


def test_augmented_images_train_other_weights_and_a_configuration_says_so(
    asynctrain: Asynctrain, image_folder: Path, tmp_path: Path
) -> None:
    options = ["train", image_folder, "--model", "linear", "--epochs", 2, "--json"]
    plain = asynctrain(*options, "--out", tmp_path / "plain").json["digest"]
    varied = asynctrain(*options, "--augment", "--out", tmp_path / "varied").json["digest"]
    assert varied != plain
    config = tmp_path / "varied" / "config.toml"
    assert asynctrain("train", "--config", config, "--out", tmp_path / "again", "--json").json["digest"] == varied


@pytest.mark.parametrize(
    ("module", "executor", "extra"),
    [("asynctrain.executors.dask", "dask", "asynctrain[dask]"), ("asynctrain.rpc", "grpc://localhost:1", "grpc]")],
)
def test_an_executor_whose_extra_is_missing_is_wrong_usage_and_the_extra_is_told(
    asynctrain: Asynctrain, image_folder: Path, monkeypatch: pytest.MonkeyPatch, module: str, executor: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    called = asynctrain("train", image_folder, "--executor", executor)
    assert called.code == 2
    assert extra in called.stderr
    assert "Traceback" not in called.stderr


def test_a_diverging_training_is_told_in_one_sentence(
    asynctrain: Asynctrain, image_folder: Path, tmp_path: Path
) -> None:
    options = ["--optimizer", "sgd", "--lr", 1e30, "--epochs", 3, "--batch-size", 8]
    called = asynctrain("train", image_folder, "--out", tmp_path / "run", *options)
    assert called.code == 1
    assert "diverged" in called.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "options",
    [
        ["--batch-size", 0],
        ["--epochs", 0],
        ["--microbatch", 0],
        ["--image-size", 0],
        ["--holdout", 1],
        ["--model", "gpt"],
        ["--optimizer", "magic"],
        ["--executor", "threads:none"],
        ["--executor", "threads:0"],
        ["--executor", "processes:"],
        ["--executor", "inline:2"],
        ["--executor", "dask:2"],
        ["--executor", "abacus"],
        ["--errors", "ignore"],
        ["--seed", -1],
        ["--no-such-option"],
    ],
    ids=str,
)
def test_wrong_usage_ends_in_code_2_before_anything_is_written(
    asynctrain: Asynctrain, image_folder: Path, tmp_path: Path, options: list[object]
) -> None:
    called = asynctrain("train", image_folder, "--out", tmp_path / "run", *options)
    assert called.code == 2
    assert str(options[0]) in called.stderr
    assert "Traceback" not in called.stderr
    assert not (tmp_path / "run").exists()


def test_images_of_mixed_modes_and_sizes_train_together(
    asynctrain: Asynctrain, image_folder: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(1)
    for number, mode in enumerate(["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"]):
        pixels = rng.integers(0, 255, (5 + number, 9, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).convert("I" if mode == "I;16" else mode)
        image = image.convert(mode) if mode == "I;16" else image
        image.save(image_folder / "rose" / f"{mode.replace(';', '')}.{'tiff' if mode == 'CMYK' else 'png'}")
    called = asynctrain("train", image_folder, "--model", "linear", "--epochs", 1, "--out", tmp_path / "run", "--json")
    assert called.code == 0, called.stderr
