"""What is on the service's disk is whole, whatever has cut its writing off."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asynctrain.serve.records import Outcome, Record, Records
from asynctrain.serve.samples import Samples
from asynctrain.serve.spool import Contents, Spool

SHAPE = (2, 3, 1)


def samples(count: int, first: int = 0) -> Samples:
    images = np.arange(first * 6, (first + count) * 6, dtype=np.uint8).reshape(count, *SHAPE)
    return Samples(images, np.arange(first, first + count))


def test_what_was_stored_is_there_when_the_spool_is_opened_again(tmp_path: Path) -> None:
    spool = Spool(tmp_path, SHAPE)
    spool.append(samples(3), last=False)
    spool.append(samples(0), last=False)
    spool.append(samples(4, first=3), last=True)
    again = Spool(tmp_path, SHAPE)
    assert again.contents == Contents(3, 7, complete=True)
    assert np.array_equal(again.arrays().images, samples(7).images)
    assert np.array_equal(again.arrays().labels, samples(7).labels)


@pytest.mark.parametrize("name", ["images", "labels", "index"])
@pytest.mark.parametrize("torn", [1, 7, 40])
def test_a_message_that_a_crash_has_torn_is_cut_off(tmp_path: Path, name: str, torn: int) -> None:
    spool = Spool(tmp_path, SHAPE)
    spool.append(samples(3), last=False)
    with (tmp_path / name).open("ab") as file:
        file.write(bytes(torn if name != "index" else torn % 16))
    again = Spool(tmp_path, SHAPE)
    assert again.contents == Contents(1, 3)
    again.append(samples(4, first=3), last=True)
    assert np.array_equal(Spool(tmp_path, SHAPE).arrays().images, samples(7).images)


def test_a_disk_that_fails_in_the_middle_of_a_message_leaves_the_messages_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = Spool(tmp_path, SHAPE)
    spool.append(samples(3), last=False)
    write = Spool._write

    def failing(self: Spool, name: str, content: Any) -> None:
        if name == "labels":
            raise OSError(28, "No space left on device")
        write(self, name, content)

    monkeypatch.setattr(Spool, "_write", failing)
    with pytest.raises(OSError, match="No space"):
        spool.append(samples(4, first=3), last=True)
    assert spool.contents == Spool(tmp_path, SHAPE).contents == Contents(1, 3)
    assert (tmp_path / "images").stat().st_size == 3 * 6


def record(run_id: str, **fields: Any) -> Record:
    return Record(run_id, "alice", "key", b"start \xff", "digest", 3, created=1.5, **fields)


def test_a_record_comes_back_as_it_was(tmp_path: Path) -> None:
    ended = record("b", phase="ended", outcome=Outcome("finished", 3, 1.5, "digest", {"loss": 0.5}))
    records = Records(tmp_path)
    for one in (record("a"), ended):
        records.save(one)
    assert list(records.load()) == [record("a"), ended]
    records.remove("a")
    assert list(records.load()) == [ended]
    records.close()


def test_folders_without_a_record_are_removed_and_records_that_cannot_be_read_are_left_alone(tmp_path: Path) -> None:
    records = Records(tmp_path)
    records.save(record("a"))
    (tmp_path / "runs" / "half" / "data").mkdir(parents=True)
    (tmp_path / "runs" / "torn").mkdir()
    (tmp_path / "runs" / "torn" / "record.json").write_text(json.dumps({"run_id": "torn"}))
    assert list(records.load()) == [record("a")]
    assert not (tmp_path / "runs" / "half").exists()
    assert (tmp_path / "runs" / "torn").exists()
    records.close()


def test_what_a_crash_has_left_half_written_beside_a_record_is_removed(tmp_path: Path) -> None:
    records = Records(tmp_path)
    records.save(record("a"))
    (tmp_path / "runs" / "a" / "run").mkdir()
    for name in (".record.json.x1", "run/.model.safetensors.x2", "run/.config.toml.x3"):
        (tmp_path / "runs" / "a" / name).write_bytes(b"half")
    assert list(records.load()) == [record("a")]
    left = [path.name for path in (tmp_path / "runs" / "a").rglob("*") if path.is_file()]
    assert left == ["record.json"]
    records.close()


def test_a_folder_has_one_server_at_a_time(tmp_path: Path) -> None:
    records = Records(tmp_path)
    with pytest.raises(BlockingIOError, match="another server"):
        Records(tmp_path)
    records.close()
    Records(tmp_path).close()
