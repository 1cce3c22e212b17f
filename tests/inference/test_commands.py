"""`braidlora predict` and `braidlora generate`."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from braidlora.cli import main


def lines(text):
    return [json.loads(line) for line in text.splitlines()]


def test_rows_of_a_file_keep_their_order_and_bad_ones_are_numbered(classifier, tmp_path, capsys):
    texts = ["a", "abcdefgh", "ab", "abcd"] * 5
    rows = [json.dumps({"sentence": text}) for text in texts]
    rows[3:3] = ["nope", json.dumps({"words": "b"}), json.dumps({"sentence": None})]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    out = tmp_path / "new" / "out.jsonl"
    words = [
        "predict",
        str(classifier),
        "--task=tone",
        f"--file={tmp_path / 'rows.jsonl'}",
        f"--output={out}",
    ]
    assert main([*words, "--batch-size=2"]) == 3
    said = capsys.readouterr()
    assert said.out == ""
    found = lines(out.read_text())
    assert [line["row"] for line in found] == list(range(1, 24))
    assert [line["row"] for line in found if "error" in line] == [4, 5, 6]
    assert "rows.jsonl:5): no column 'sentence' (or `text`); the row has words" in said.err
    assert "3 of 23 rows have no prediction" in said.err
    good = [line for line in found if "error" not in line]
    for text, line in zip(texts, good, strict=True):
        same = [other["prediction"] for of, other in zip(texts, good, strict=True) if of == text]
        assert set(same) == {line["prediction"]}
    assert main(words) == 2
    assert "exists; --overwrite replaces it" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 3


def test_csv_and_texts_and_standard_input(classifier, tmp_path, capsys):
    (tmp_path / "rows.csv").write_text("text\nabc\n")
    base = ["predict", str(classifier / "adapter"), "--task", "tone"]
    assert main([*base, "--file", str(tmp_path / "rows.csv")]) == 0
    from_csv = lines(capsys.readouterr().out)
    assert main([*base, "--text", "abc", "--text", "b"]) == 0
    from_text = lines(capsys.readouterr().out)
    assert from_csv[0]["probabilities"] == pytest.approx(from_text[0]["probabilities"], abs=1e-6)
    assert len(from_text) == 2
    (tmp_path / "rows.txt").write_text("abc\n\nb\n")
    assert main([*base, "--file", str(tmp_path / "rows.txt")]) == 0
    assert lines(capsys.readouterr().out) == from_text
    done = subprocess.run(
        [sys.executable, "-m", "braidlora", *base, "--file", "-"],
        input='{"text": "abc"}\n\n[1]\n', capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    first, second = lines(done.stdout)
    assert first["prediction"] == from_csv[0]["prediction"]
    assert second["error"] == "expected an object with named columns, got [1]"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task=ton", "--text=a"], "has no task 'ton'. Did you mean 'tone'?"),
        (["--text=a"], "has several tasks; choose one of topic, tone"),
        ([], "give the rows with either --file FILE or --text TEXT"),
        (["--task=tone", "--text=a", "--file=b"], "give the rows with either"),
        (["--task=tone", "--text=a", "--batch-size=0"], "--batch-size: got 0; expected 1 to 65536"),
    ],
)
def test_mistakes_are_explained(words, message, classifier, capsys):
    assert main(["predict", str(classifier), *words]) == 2
    assert message in capsys.readouterr().err


def test_what_cannot_be_predicted_with_is_named(classifier, tmp_path, capsys):
    assert main(["predict", str(classifier), "--task=tone", "--file=missing.jsonl"]) == 3
    assert "no such file" in capsys.readouterr().err
    assert main(["predict", str(tmp_path), "--text=a"]) == 2
    assert "contains no run" in capsys.readouterr().err
    (tmp_path / "cells" / "lora-0").mkdir(parents=True)
    assert main(["predict", str(tmp_path), "--text=a"]) == 2
    assert f"a comparison; give one of its runs: {tmp_path}/cells/NAME, where NAME is one of lora-0" in (
        capsys.readouterr().err
    )


def test_ctrl_c_leaves_complete_lines(classifier, tmp_path):
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    rows.write_text('{"text": "abc"}\n' * 200_000)
    process = subprocess.Popen(
        [sys.executable, "-m", "braidlora", "predict", str(classifier), "--task=tone", "--file", str(rows),
         "--output", str(out), "--batch-size=1"],
        stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )  # fmt: skip
    end = time.monotonic() + 120
    while not (out.exists() and out.stat().st_size > 2000) and time.monotonic() < end:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    text = out.read_text()
    assert text.endswith("\n")
    found = lines(text)
    assert [line["row"] for line in found] == list(range(1, len(found) + 1))
    assert 0 < len(found) < 200_000


def test_prompts_of_a_file(writer, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("rising 3 1 2\nrising 9 4 7\n")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "rising 3 1 2"}\n{"instruction": "rising 9 4 7"}\n')
    assert main(["generate", str(writer), "--file", str(tmp_path / "prompts.txt")]) == 0
    plain = capsys.readouterr().out.splitlines()
    assert main(["generate", str(writer), "--file", str(tmp_path / "prompts.jsonl"), "--json"]) == 0
    assert [line["text"] for line in lines(capsys.readouterr().out)] == plain
    (tmp_path / "prompts.jsonl").write_text('{"foo": 1}\n')
    assert main(["generate", str(writer), "--file", str(tmp_path / "prompts.jsonl")]) == 3
    assert "prompts.jsonl:1: expected `prompt`, `instruction` and `input`, or `messages`; got foo" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give one of --prompt TEXT, --file FILE and --chat"),
        (["--prompt=a", "--system=b"], "sets the system message of a chat"),
        (["--prompt=a", "--raw", "--task=mood"], "selects a template, which --raw and --chat do not use"),
        (["--prompt=a", "--top-k=3"], "have no effect at temperature 0"),
    ],
)
def test_mistakes_in_generate_are_explained(words, message, writer, capsys):
    assert main(["generate", str(writer), *words]) == 2
    assert message in capsys.readouterr().err


def test_a_target_that_is_not_there_is_told_before_its_tasks(classifier, tmp_path, monkeypatch, capsys):
    import shutil

    monkeypatch.chdir(tmp_path)
    shutil.copytree(classifier, tmp_path / "runs" / "tickets")
    assert main(["predict", "runs/tickts", "--text=a"]) == 2
    said = capsys.readouterr().err
    assert (
        f"runs/tickts: no such run, adapter or model in {tmp_path}/runs. Did you mean runs/tickets?" in said
    )
    assert main(["predict", "runs/zzz", "--text=a"]) == 2
    assert "The runs there are tickets." in capsys.readouterr().err
    shutil.rmtree("runs")
    assert main(["generate", "runs/zzz", "--prompt=a"]) == 2
    assert f"there is no folder {tmp_path}/runs" in capsys.readouterr().err


def test_a_gguf_base_has_no_tasks_but_can_generate(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some.gguf").write_bytes(b"GGUF")
    assert main(["predict", "some.gguf", "--text=a"]) == 2
    said = capsys.readouterr().err
    assert "some.gguf: a GGUF base model, not an adapter" in said
    assert "braidlora generate some.gguf --prompt TEXT" in said
    assert main(["predict", "other.gguf", "--text=a"]) == 2
    assert f"other.gguf: no such file in {tmp_path}" in capsys.readouterr().err


def test_an_adapter_whose_base_is_elsewhere_says_how_to_name_it(classifier, tmp_path, monkeypatch, capsys):
    """As on another machine: the recorded path does not exist there."""
    import json
    import shutil

    recorded = json.loads((classifier / "adapter" / "braidlora.json").read_text())["base"]["path"]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(classifier / "adapter", tmp_path / "adapter")
    card = tmp_path / "adapter" / "braidlora.json"
    card.write_text(card.read_text().replace(recorded, "/not/on/this/machine"))
    (tmp_path / "adapter" / "manifest.json").unlink()
    words = ["predict", "adapter", "--task=topic", "--text=abc"]
    assert main(words) == 2
    assert (
        "adapter: was trained on the base model /not/on/this/machine, which is not on this machine (looked for "
        "/not/on/this/machine). Say where it is with --base PATH"
    ) in capsys.readouterr().err
    assert main([*words, f"--base={recorded}"]) == 0
    assert main(["export", "adapter", "--merge", "--static-weights=uniform", "--no-scores"]) == 2
    assert "Say where it is with --base PATH" in capsys.readouterr().err
