"""Prediction files survive a cut at any byte, and are never taken for another model's."""

import json
import logging

import pytest

from braidlora.errors import ConfigError
from braidlora.evaluation.predictions import PredictionFile

SOURCE = {"adapter": "a1", "data": "d1"}


def line(index: int) -> dict:
    text = f"Zeile {index} mit “Umlauten” ä\u2028\n"
    return {
        "index": index,
        "prompt": text,
        "reference": "r",
        "prediction": text,
        "extracted": None,
        "score": 0.5,
    }


def fill(directory, order=(2, 0, 3, 1)):
    file = PredictionFile(directory, "t", SOURCE, 4)
    for index in order:
        file.append(line(index))
    return file


def test_finished_lines_stand_in_the_order_of_the_rows(tmp_path):
    assert fill(tmp_path).finish() == [line(index) for index in range(4)]
    text = (tmp_path / "t.jsonl").read_text(encoding="utf-8")
    assert [json.loads(part) for part in text.rstrip("\n").split("\n")] == [line(index) for index in range(4)]
    assert PredictionFile(tmp_path, "t", SOURCE, 4).missing == []
    assert PredictionFile(tmp_path, "t", SOURCE, 4, resume=False).missing == [0, 1, 2, 3]


def test_a_file_cut_at_any_byte_keeps_its_whole_lines(tmp_path):
    path = fill(tmp_path).path
    whole = path.read_bytes()
    ends = [at + 1 for at, byte in enumerate(whole) if byte == ord("\n")]
    for cut in {
        0,
        len(whole),
        *range(5, len(whole), 31),
        *(end + by for end in ends[:-1] for by in (-2, -1, 0, 1)),
    }:
        path.write_bytes(whole[:cut])
        file = PredictionFile(tmp_path, "t", SOURCE, 4)
        # A line that lacks nothing but its line break is whole as well.
        done = sum(cut >= end - 1 for end in ends)
        assert sorted(file.records) == sorted([2, 0, 3, 1][:done])
        for index in file.missing:
            file.append(line(index))
        assert file.finish() == [line(index) for index in range(4)]


@pytest.mark.parametrize(
    "damage",
    [
        b"\x00\xff\n",
        b"[]\n",
        b'{"index": 9}\n',
        b'{"index": true}\n',
        b"null\n",
        b"\n\n",
        (json.dumps(line(9)) + "\n").encode(),
    ],
)
def test_lines_that_are_no_predictions_are_dropped(tmp_path, damage):
    path = fill(tmp_path, (0, 1)).path
    good = path.read_bytes()
    path.write_bytes(damage + good)
    assert PredictionFile(tmp_path, "t", SOURCE, 4).missing == [2, 3]
    assert path.read_bytes() == good


@pytest.mark.parametrize(
    ("source", "told"),
    [({**SOURCE, "adapter": "a2"}, "different adapter"), ({"adapter": "a2"}, "different adapter, data")],
)
def test_predictions_of_another_source_are_not_used(tmp_path, caplog, source, told):
    fill(tmp_path).finish()
    with caplog.at_level(logging.WARNING):
        assert PredictionFile(tmp_path, "t", source, 4).missing == [0, 1, 2, 3]
    assert told in caplog.text
    assert PredictionFile(tmp_path, "t", source, 4).missing == [0, 1, 2, 3]


@pytest.mark.parametrize("source_text", [None, "", "{", "[]"])
def test_predictions_of_unknown_source_are_not_used(tmp_path, source_text):
    fill(tmp_path).finish()
    path = tmp_path / "t.source.json"
    path.unlink() if source_text is None else path.write_text(source_text)
    assert PredictionFile(tmp_path, "t", SOURCE, 4).missing == [0, 1, 2, 3]


def test_links_are_refused(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("precious")
    inside = tmp_path / "predictions"
    inside.mkdir()
    (inside / "t.jsonl").symlink_to(outside)
    with pytest.raises(ConfigError, match="is a link"):
        PredictionFile(inside, "t", SOURCE, 4)
    (tmp_path / "other").symlink_to(inside)
    with pytest.raises(ConfigError, match="is a link"):
        PredictionFile(tmp_path / "other", "u", SOURCE, 4)
    assert outside.read_text() == "precious"


def remade(index: int, **changed) -> dict:
    return {**line(index), **changed}


def test_stored_scores_are_not_believed(tmp_path, caplog):
    """Only the answers are; prompt and reference have to be today's."""
    path = fill(tmp_path).path
    stored = [
        remade(0, score=900.0), remade(1, prediction=7), remade(2, reference="another"), remade(3, score=float("nan")),
    ]  # fmt: skip
    path.write_text("".join(json.dumps(one) + "\n" for one in stored), encoding="utf-8")
    file = PredictionFile(tmp_path, "t", SOURCE, 4)
    with caplog.at_level(logging.WARNING):
        file.review(lambda old: line(old["index"]))
    assert file.missing == [1, 2]
    assert file.records == {0: line(0), 3: line(3)}
    assert "2 scores did not match their predictions" in caplog.text
    assert "2 rows belong to other prompts" in caplog.text
    again = PredictionFile(tmp_path, "t", SOURCE, 4)
    assert again.records == {0: line(0), 3: line(3)}
