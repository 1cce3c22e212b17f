"""`braidlora data` and `data:` sources against a server on the loopback: what is fetched, kept, refused, and said.

The public addresses themselves are not asked: no test reaches the network.
"""

import json
import os
import socket
import subprocess
import sys

import pytest
from catalog_files import PROBLEMS, ROWS, SOLVED

from braidlora.cli import main
from braidlora.config import RunConfig
from braidlora.tasks import load_tasks


def data(capsys, *words):
    """Exit code, stdout and stderr of `braidlora data WORDS`."""
    code = main(["data", *words])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def leftovers(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_good_file_is_fetched_once_and_then_found_in_the_cache(table, server, capsys):
    server.serve("/words.jsonl", ROWS)
    code, out, err = data(capsys, "fetch", "words/say")
    assert (code, server.asked) == (0, ["/words.jsonl"])
    assert f"data:words/say: downloading {server.url}words.jsonl" in err
    place = table / "data" / "words" / "train.jsonl"
    assert place.read_bytes() == ROWS
    assert out.splitlines() == [
        f"words/say train: {place} (rows with {{'part': 'a'}}), from cache",
        f"words/say test: {place} (rows with {{'part': 'b'}}), from cache",
    ]
    assert data(capsys, "fetch", "words/say") == (0, out, "")
    assert len(server.asked) == 1
    assert leftovers(table) == [place]


def test_the_data_folder_comes_before_the_cache_and_the_server(table, server, capsys, tmp_path, monkeypatch):
    folder = tmp_path / "mine"
    (folder / "data" / "words").mkdir(parents=True)
    mine = folder / "data" / "words" / "train.jsonl"
    mine.write_bytes(b'{"instruction": "mine", "output": "1", "part": "a"}\n')
    monkeypatch.setenv("BRAIDLORA_DATA", str(folder))
    code, out, _ = data(capsys, "where", "words/say")
    assert code == 0
    assert f"{mine} (rows with {{'part': 'a'}}), from BRAIDLORA_DATA" in out
    task = {"name": "say", "train": "data:words/say"}
    [loaded] = load_tasks(RunConfig.model_validate({"tasks": [task]}))
    assert [row["instruction"] for row in loaded.train] == ["mine"]
    assert server.asked == []


def test_a_file_with_another_content_is_not_kept(table, server, capsys):
    server.serve("/words.jsonl", ROWS + b"\n")
    code, _, err = data(capsys, "fetch", "words/say")
    assert code == 3
    assert (
        f"{server.url}words.jsonl does not match the file in the catalog: got {len(ROWS) + 1:,} bytes with sha256"
        in err
    )
    assert "It was discarded. If you trust it, save it as FOLDER/data/words/train.jsonl" in err
    assert leftovers(table) == []


def test_a_file_known_by_its_git_blob_is_checked_too(table, server, capsys):
    server.serve("/other.jsonl", ROWS[:-1])
    code, _, err = data(capsys, "fetch", "words/other")
    assert (code, leftovers(table)) == (3, [])
    assert "expected git blob" in err
    server.serve("/other.jsonl", ROWS)
    assert data(capsys, "fetch", "words/other")[0] == 0
    assert (table / "data" / "words" / "other.jsonl").read_bytes() == ROWS


def test_a_missing_file_is_told_with_both_ways(table, server, capsys):
    code, _, err = data(capsys, "fetch", "words/say")
    assert (code, leftovers(table)) == (3, [])
    assert f"data:words/say: no data/words/train.jsonl: {server.url}words.jsonl returned 404." in err
    assert "(BRAIDLORA_DATA is not set) or the cache" in err
    assert (
        "Either run `braidlora data fetch words/say` where there is a network, or set BRAIDLORA_DATA to"
        in err
    )


def test_an_interrupted_download_leaves_nothing_and_works_the_next_time(table, server, capsys):
    server.serve("/words.jsonl", ROWS, cut=100)
    code, _, err = data(capsys, "fetch", "words/say")
    assert (code, leftovers(table)) == (3, [])
    assert f"the download of {server.url}words.jsonl failed: " in err
    assert "100 bytes read" in err
    server.serve("/words.jsonl", ROWS)
    assert data(capsys, "fetch", "words/say")[0] == 0


def test_without_a_network_both_ways_are_named(table, server, capsys, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("BRAIDLORA_DATA_MIRROR", f"http://127.0.0.1:{unused.getsockname()[1]}")
        code, _, err = data(capsys, "fetch", "words/say")
    assert (code, server.asked) == (3, [])
    assert "failed: Connection refused. It is not in the data folder" in err
    assert (
        "Either run `braidlora data fetch words/say` where there is a network, or set BRAIDLORA_DATA to"
        in err
    )


@pytest.mark.parametrize("variable", ["BRAIDLORA_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_mode_asks_no_server(table, server, capsys, monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    code, _, err = data(capsys, "fetch", "words/say")
    assert (code, server.asked) == (3, [])
    assert f"no data/words/train.jsonl: {variable} is set, so nothing is downloaded." in err


def test_a_damaged_file_in_the_cache_is_fetched_again(table, server, capsys):
    server.serve("/words.jsonl", ROWS)
    data(capsys, "fetch", "words/say")
    place = table / "data" / "words" / "train.jsonl"
    place.write_bytes(ROWS[:50])
    _, out, _ = data(capsys, "where", "words/say", "--json")
    assert json.loads(out)["words/say"]["parts"]["train"]["path"] is None
    assert data(capsys, "fetch", "words/say")[0] == 0
    assert place.read_bytes() == ROWS


def test_a_mirror_serves_files_under_their_names(table, server, capsys, monkeypatch):
    monkeypatch.setenv("BRAIDLORA_DATA_MIRROR", server.url)
    server.serve("/data/words/train.jsonl", ROWS)
    assert data(capsys, "fetch", "words/say")[0] == 0
    assert server.asked == ["/data/words/train.jsonl"]


def test_a_derived_file_is_made_from_its_original(table, server, capsys):
    server.serve("/sums.json", PROBLEMS)
    code, out, err = data(capsys, "fetch", "sums")
    assert code == 0
    assert "making data/sums/train.json from data/sums/original.json" in err
    assert (table / "data" / "sums" / "train.json").read_bytes() == SOLVED
    (table / "data" / "sums" / "original.json").unlink()
    assert data(capsys, "fetch", "sums") == (0, out, "")


def test_an_original_that_cannot_be_had_is_named_with_what_is_made_of_it(table, server, capsys):
    code, _, err = data(capsys, "fetch", "sums")
    assert code == 3
    assert "no data/sums/original.json: " in err
    assert (
        "or set BRAIDLORA_DATA to a folder that holds data/sums/original.json. Or set it to a folder that holds"
        in err
    )


def test_a_derived_file_from_another_original_is_not_kept(table, server, capsys, tmp_path, monkeypatch):
    original = tmp_path / "mine" / "data" / "sums" / "original.json"
    original.parent.mkdir(parents=True)
    original.write_bytes(PROBLEMS.replace(b"2.0", b"3.0"))
    monkeypatch.setenv("BRAIDLORA_DATA", str(tmp_path / "mine"))
    code, _, err = data(capsys, "fetch", "sums")
    assert (code, leftovers(table)) == (3, [])
    assert f"was made from {original} and does not match the file in the catalog" in err


def test_a_file_in_no_public_place_is_told_apart(table, capsys):
    code, out, _ = data(capsys, "where", "secret")
    assert code == 0
    assert (
        "secret train: not on this machine and not published; put data/secret.jsonl into BRAIDLORA_DATA"
        in out
    )
    code, _, err = data(capsys, "fetch", "secret")
    assert code == 3
    assert "it is not published anywhere" in err
    assert "Either set" not in err
    assert "Set BRAIDLORA_DATA to a folder that holds data/secret.jsonl." in err


def test_a_cache_that_cannot_be_written_is_named(table, server, capsys, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    code, _, err = data(capsys, "fetch", "words/say")
    assert code == 3
    assert "cannot be written: " in err
    assert "XDG_CACHE_HOME" in err


def test_a_group_of_keys_is_fetched_and_listed_together(table, server, capsys):
    server.serve("/words.jsonl", ROWS)
    server.serve("/other.jsonl", ROWS)
    code, out, _ = data(capsys, "fetch", "words", "--json")
    assert (code, list(json.loads(out))) == (0, ["words/say", "words/other"])
    code, out, _ = data(capsys, "list")
    assert code == 0
    assert [line.split() for line in out.splitlines()] == [
        ["words/say", "train,", "test", "cache", "repeat", "a", "number"],
        ["words/other", "train", "cache", "by", "git"],
        ["sums", "train", "build", "made"],
        ["secret", "train", "local", "local"],
    ]


def test_an_unknown_key_exits_with_2(table, capsys):
    code, _, err = data(capsys, "fetch", "words/sy")
    assert code == 2
    assert "no dataset 'words/sy' in the catalog. Did you mean words/say" in err


def test_a_run_on_a_key_downloads_its_rows_and_trains(table, server, capsys, tmp_path):
    server.serve("/words.jsonl", ROWS)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: {path: embedded}\nprompt: {cutoff: 64, template: '{instruction} ='}\n"
        "tasks:\n  - {name: say, data: words/say, test: {limit: 3}, max_new_tokens: 2}\n"
        "training: {max_steps: 1, batch_size: 4, warmup_steps: 0}\n"
        "adapter: {target_modules: [q_proj]}\n",
        encoding="utf-8",
    )
    code = main(["train", str(recipe), "--json", f"--output={tmp_path / 'run'}"])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert json.loads(printed.out)["tasks"]["say"]["n"] == 3
    counts = json.loads((tmp_path / "run" / "data.json").read_text())["tasks"]["say"]
    assert (counts["train"]["rows"], counts["test"]["rows"], counts["test"]["not_drawn"]) == (10, 3, 7)
    assert server.asked == ["/words.jsonl"]


def test_a_run_without_its_rows_exits_with_3_before_anything_is_written(table, capsys, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("tasks:\n  - {name: say, data: words/say}\n", encoding="utf-8")
    assert main(["train", str(recipe), f"--output={tmp_path / 'run'}"]) == 3
    assert "data:words/say: no data/words/train.jsonl: " in capsys.readouterr().err
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_the_command_itself_without_a_data_folder(tmp_path):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment.pop("BRAIDLORA_DATA", None)
    command = [sys.executable, "-m", "braidlora", "data", "fetch", "flan8/snli"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert done.stderr.startswith(
        "braidlora data: data:flan8/snli: no data/fed/dataset1/8/local_training_1.json: "
    )
