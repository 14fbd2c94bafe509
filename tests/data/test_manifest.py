from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from asynctrain.data.manifest import ImageManifest
from asynctrain.errors import DataError, ReadError


def written(folder: Path, name: str, *lines: str) -> Path:
    path = folder / name
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def pairs(manifest: ImageManifest) -> list[tuple[str, str]]:
    records = [manifest[i] for i in range(len(manifest))]
    return [(str(record.source), manifest.classes[record.label]) for record in records]


def test_a_csv_file_names_its_columns_in_any_order_and_among_others(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", "size,Label, path", "1,tulip,b.jpg", '2,rose,"in, here/ä.jpg"')
    manifest = ImageManifest(path)
    assert manifest.classes == ("rose", "tulip")
    assert pairs(manifest) == [(f"{tmp_path}/b.jpg", "tulip"), (f"{tmp_path}/in, here/ä.jpg", "rose")]
    assert manifest.labels.tolist() == [1, 0]
    assert manifest.labels.dtype == np.int64


def test_without_a_header_the_first_two_columns_count(tmp_path: Path) -> None:
    manifest = ImageManifest(written(tmp_path, "a.csv", "a.jpg,10,x", "", "b.jpg,9"))
    assert manifest.classes == ("9", "10")
    assert pairs(manifest) == [(f"{tmp_path}/a.jpg", "10"), (f"{tmp_path}/b.jpg", "9")]


def test_a_file_of_json_lines_is_the_same_dataset(tmp_path: Path) -> None:
    lines = [{"path": "a.jpg", "label": 1}, {"label": "0", "path": "../b", "more": [1]}]
    manifest = ImageManifest(written(tmp_path, "a.JSONL", *map(json.dumps, lines), ""))
    assert manifest.classes == ("0", "1")
    assert pairs(manifest) == [(f"{tmp_path}/a.jpg", "1"), (f"{tmp_path}/../b", "0")]


def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbfpath,label\r\na.jpg,rose\r\n")
    assert pairs(ImageManifest(tmp_path / "a.csv")) == [(f"{tmp_path}/a.jpg", "rose")]


def test_paths_are_relative_to_the_manifest_or_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "a.jpg").write_bytes(b"here")
    (tmp_path / "b.jpg").write_bytes(b"there")
    written(tmp_path, "list/a.csv", "a.jpg,0", f"{tmp_path}/b.jpg,0")
    monkeypatch.chdir(tmp_path)
    manifest = ImageManifest("list/a.csv")
    assert [manifest[i].source.read() for i in range(2)] == [b"here", b"there"]


def test_a_missing_image_is_told_when_it_is_read(tmp_path: Path) -> None:
    manifest = ImageManifest(written(tmp_path, "a.csv", "gone.jpg,0"))
    with pytest.raises(ReadError, match=r"gone\.jpg: cannot be read: No such file"):
        manifest[0].source.read()


def test_a_path_that_no_file_can_have_is_told_when_it_is_read(tmp_path: Path) -> None:
    manifest = ImageManifest(written(tmp_path, "a.jsonl", '{"path": "a\\u0000b", "label": 0}'))
    with pytest.raises(ReadError, match="null"):
        manifest[0].source.read()


def test_given_classes_are_kept_and_others_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", "path,label", "a.jpg,rose", "b.jpg,tulip")
    assert ImageManifest(path, classes=["tulip", "rose", "aster"]).labels.tolist() == [1, 0]
    with pytest.raises(DataError, match=r"a\.csv: line 3: the label must be one of rose, got tulip"):
        ImageManifest(path, classes=["rose"])


@pytest.mark.parametrize(
    ("name", "lines", "reason"),
    [
        ("a.csv", ["path,label", "a.jpg,rose", ",rose"], "line 3: has no path"),
        ("a.csv", ["path,label", "a.jpg,rose", "b.jpg, "], "line 3: has no label"),
        ("a.csv", ["path,label", '"a\nb.jpg",0', "c.jpg"], "line 4: has no label"),
        ("a.csv", ["path,label"], "lists no images"),
        ("a.csv", ["filename,class", "a.jpg,rose"], "line 1: is neither a header with the columns path and label, nor"),
        ("a.csv", ["path,label", 'a.jpg,"rose'], "line 2: is no CSV"),
        ("a.jsonl", ['{"path": "a.jpg", "label": 0}', "", '{"path": "a.jpg"}'], "line 3: has no label"),
        ("a.jsonl", ['{"path": 3, "label": 0}'], "line 1: has no path"),
        ("a.jsonl", ['{"path": "a.jpg", "label": 0.5}'], "line 1: the label must be a name or an integer, got 0.5"),
        ("a.jsonl", ['{"path": "a.jpg", "label": '], "line 1: is no JSON"),
        ("a.jsonl", ["[1]"], "line 1: is no JSON object such as"),
        ("a.jsonl", ["[" * 100_000], "line 1: is no JSON"),
        ("a.jsonl", [""], "lists no images"),
    ],
)
def test_what_is_wrong_is_told_with_file_and_line(tmp_path: Path, name: str, lines: list[str], reason: str) -> None:
    path = written(tmp_path, name, *lines)
    with pytest.raises(DataError) as caught:
        ImageManifest(path)
    assert str(caught.value).startswith(f"{path}: {reason}")
    assert caught.value.path == str(path)


def test_a_manifest_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.csv: no such file"):
        ImageManifest(tmp_path / "gone.csv")
    (tmp_path / "latin.csv").write_bytes(b"path,label\na.jpg,\xe4\n")
    with pytest.raises(DataError, match=r"latin\.csv: is not in UTF-8"):
        ImageManifest(tmp_path / "latin.csv")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(DataError, match=r"folder\.csv: cannot be read"):
        ImageManifest(tmp_path / "folder.csv")
    with pytest.raises(ValueError, match=r"path must end in \.csv or \.jsonl, got .*a\.txt"):
        ImageManifest(tmp_path / "a.txt")
