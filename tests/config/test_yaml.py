"""The YAML reader: YAML 1.2's scalars, places, and documents that would take for ever or end in a traceback."""

from __future__ import annotations

import math
import random
import subprocess
import sys
import time

import pytest
import yaml as yaml11

from braidlora.config import built_in_recipes, dump_config, load_config, parse_scalar
from braidlora.config._dump import dump_yaml
from braidlora.config._yaml import MOST_BYTES, MOST_VALUES, load_document
from braidlora.errors import ConfigError

TASKS = "tasks:\n  - {name: a, train: a.jsonl}\n"


def document(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return load_document(path)


def refused(tmp_path, text):
    with pytest.raises(ConfigError) as caught:
        document(tmp_path, text)
    return str(caught.value).removeprefix(str(tmp_path / "recipe.yaml"))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10), ("-007", -7), ("+3", 3), ("0o10", 8), ("0x1F", 31), ("08", 8), ("0b11", "0b11"),
        ("1_000", "1_000"), ("1:30", "1:30"), ("190:20:30", "190:20:30"), ("2026-01-02", "2026-01-02"), ("=", "="),
        ("3e-4", 3e-4), ("1E5", 1e5), ("1.", 1.0), (".5", 0.5), ("-.5e1", -5.0), ("1e+3", 1000.0), ("e3", "e3"),
        (".inf", math.inf), ("-.INF", -math.inf), ("+.Inf", math.inf), ("inf", "inf"), ("nan", "nan"),
        ("true", True), ("False", False), ("TRUE", True), ("tRue", "tRue"), ("yes", "yes"), ("no", "no"), ("on", "on"),
        ("null", None), ("~", None), ("", None), ("NULL", None), ("None", "None"), ("'010'", "010"), ('"no"', "no"),
        ("!!str 010", "010"), ("!!int '7'", 7), ("!!float 1", 1.0), ("! 12", "12"),
        ("[1, no, 1:30]", [1, "no", "1:30"]),
        ("{a: 1, b: [x]}", {"a": 1, "b": ["x"]}), ('"a\u2028b\x85c"', "a\u2028b\x85c"),
        ("a\u2029b # c\x85d", "a\u2029b"),
    ],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2_in_files_and_in_overrides(tmp_path, text, value):
    for found in (parse_scalar(text), document(tmp_path, f"key: {text}\n").data["key"]):
        assert found == value
        assert type(found) is type(value)


def test_nan():
    assert math.isnan(parse_scalar(".nan"))


def test_a_seed_with_a_leading_zero_is_decimal(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(TASKS + "seed: 010\n")
    assert load_config(path).seed == 10
    assert load_config(path, ["seed=011"]).seed == 11


def test_lines_count_line_feeds_alone(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"# one\u2028line\x85still\n{TASKS}nonsense: 1\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"recipe\.yaml:4: nonsense: unknown key"):
        load_config(path)


def test_a_byte_order_mark_and_windows_line_ends(tmp_path):
    assert document(tmp_path, b"\xef\xbb\xbfa: 1\r\nb: |\r\n  x\r\n  y\r\n").data == {"a": 1, "b": "x\ny\n"}


def test_aliases_are_copies_and_merges_give_way_to_what_is_given(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "tasks:\n  - {name: a, train: &rows {source: a.jsonl, limit: 5}}\n  - {name: b, train: *rows}\n"
        "  - {name: c, train: {<<: *rows, limit: 7}}\n  - {name: d, train: {<<: [{limit: 8}, *rows]}}\n"
    )
    config = load_config(path, ["tasks.a.train.limit=2"])
    assert [task.train.limit for task in config.tasks] == [2, 5, 7, 8]
    assert {task.train.source for task in config.tasks} == {"a.jsonl"}
    path.write_text(path.read_text().replace("limit: 5", "limit: 0"))
    with pytest.raises(ConfigError, match=r"recipe\.yaml:3: tasks\.1\.train\.limit: got 0"):
        load_config(path)


LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, rf":5: not valid YAML: more than {MOST_VALUES:,} values"),
        ("a: &a [*a]", ":1: not valid YAML: *a is inside &a"),
        ("x: 1\na: &a {b: {c: *a}}", ":2: not valid YAML: *a is inside &a"),
        ("a: *b", ":1: not valid YAML: *b: no &b before it"),
        ("? [a, b]\n: c", ":1: not valid YAML: a list as a key"),
        ("x: 1\n? {a: b}\n: c", ":2: not valid YAML: a mapping as a key"),
        ("a: &a [1]\n*a : 2", ":2: not valid YAML: a mapping or list as a key"),
        (f"seed: {'9' * 5000}", ":1: not valid YAML: a number of 5000 characters; at most 40"),
        (f"seed: 0x{'f' * 5000}", "a number of 5002 characters"),
        (f"{'9' * 5000}: 1", "a number of 5000 characters"),
        ("a: " + "[" * 100_000, ":1: not valid YAML: nested more than 50 levels deep"),
        ("a: " + "{a: " * 60, "nested more than 50 levels deep"),
        ("".join(f"{' ' * depth}a:\n" for depth in range(60)), ":51: not valid YAML: nested more than 50 levels deep"),
        ("a: 1\n---\nb: 2\n", ":2: not valid YAML: a second document starts here"),
        ("%YAML 1.1\n---\na: 1\n", "declares a different version; expected 1.2"),
        ("a:\n\tb: 1\n", "Use spaces instead of tabs"),
        ("a: 1\nb: [1\n", "not valid YAML"),
        ("a: b: c\n", ":1: not valid YAML: a value with a colon and a space in it must be quoted"),
        ("a: 1\nb: \x00\n", ":2: not valid YAML: special characters are not allowed"),
        ("a: !!python/object/apply:os.system [ls]", "Python tags could run code"),
        ("a: !!set {b}", "unknown tag !!set"),
        ("a: !mine b", "unknown tag !mine"),
        ("a: !!int b", ":1: not valid YAML: 'b' is not of type int"),
        ("<<: 3\n", "`<<` needs a mapping"),
        ("- a\n", ": expected a recipe, which is a mapping of sections"),
        (b"a: \xff\n", "not UTF-8 text (byte 3)"),
        (b'{"a": 1}\n{"a": 2}\n', "but found '{' (column 1)"),
        ("# " + "x" * MOST_BYTES, "larger than"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_recipe_is_refused_at_once_with_its_line(tmp_path, text, message):
    start = time.monotonic()
    assert message in refused(tmp_path, text)
    assert time.monotonic() - start < 5  # a machine under load; each takes a fraction of a second


@pytest.mark.parametrize("key", ["a.", "a"])
def test_odd_overrides_are_refused(tmp_path, key):
    path = tmp_path / "recipe.yaml"
    path.write_text(TASKS)
    for override, message in (
        (".".join([key] * 2000) + "=1", "at most 50 are allowed"),
        ("seed=" + "9" * 5000, "a number of 5000 characters"),
        ("seed=&a [*a]", "which would be infinite"),
        ("mixing={strategy: uniform, strategy: weights}", "duplicate key"),
        ("output={a", "not readable as YAML"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(path, [override])


TEXTS = [
    "no", "010", "1e5", "0o10", "0x1f", "1_000", "1:30", "~", "", " ", "null", ".inf", "TRUE", "2026-01-02", "<<", "=",
    "a: b", "a #b", "- a", "[x", "{instruction} =", "*a", "&a", "!a", "%a", "@a", "`a", "|", ">", "'", '"', "\\", "\t",
    "a\nb", "\na", "a\n", "a\n\n", " a", "a ", "a\u2028b", "a\u2029", "\x85", "a\r\nb", "\x07", "\x1b[31m",
    "é", "红", "🙂", "\ufeffa", "x " * 200, "---", "...", "? a", ": a", "a:", "\x7f", "\u202e", "\u200b",
]  # fmt: skip


def test_what_is_dumped_is_read_back_the_same_by_this_reader_and_by_a_yaml_1_1_reader():
    draw = random.Random(0)
    values = TEXTS + ["".join(draw.choices("".join(TEXTS), k=draw.randrange(12))) for _ in range(400)]
    data = {
        "texts": values,
        **{f"k{index}": text for index, text in enumerate(values)},
        "numbers": [1e-5, 3, -0.5, 1e300],
    }
    data |= {"none": None, "true": True, "empty": {}, "list": [], "nested": [[1, [2]], {"a": [{"b": None}]}]}
    text = dump_yaml(data)
    assert parse_scalar(text) == data
    assert yaml11.safe_load(text) == data


@pytest.mark.parametrize("name", built_in_recipes())
def test_a_run_of_an_earlier_version_is_read_the_same(tmp_path, name):
    from braidlora.config import schema_of

    config = load_config(name, [], schema_of(name))
    old = tmp_path / "config.yaml"
    old.write_text(yaml11.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True))
    assert load_config(old, [], schema_of(name)) == config
    new = tmp_path / "new.yaml"
    new.write_text(dump_config(config), encoding="utf-8")
    assert load_config(new, [], schema_of(name)) == config


def test_help_imports_no_yaml_reader():
    code = (
        "import sys, braidlora.cli; braidlora.cli.build_parser().format_help(); "
        "sys.exit(any('yaml' in name for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
