"""The fingerprint of a stored checkpoint: every byte counts, shards and casts do not, and the cache is never believed
about a file that has changed."""

import hashlib
import json
import os
import shutil
import struct
import time

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import braidlora.models.stored_weights as stored
from braidlora.errors import ConfigError
from braidlora.models.stored_weights import stored_fingerprint, tensor_digests
from helpers.tiny_base import build_base


def weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "b.weight": torch.randn(300, 70, generator=generator),
        "a.weight": torch.randn(50, generator=generator).to(torch.bfloat16),
        "c.bias": torch.arange(9),
    }


def written(folder, tensors, **options):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", **options)
    return stored_fingerprint(folder)


def by_hand(tensors, dtypes):
    """The definition, written out."""
    lines = []
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        head = json.dumps([name, dtypes[name], list(tensor.shape)]).encode()
        content = bytes(tensor.reshape(-1).view(torch.uint8).tolist())
        lines.append(json.dumps([name, hashlib.sha256(head + content).hexdigest()]) + "\n")
    return "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()


def test_it_is_the_definition(tmp_path):
    expected = by_hand(weights(), {"a.weight": "BF16", "b.weight": "F32", "c.bias": "I64"})
    assert written(tmp_path / "one", weights()) == expected


def test_every_single_bit_counts(tmp_path):
    """The sampled fingerprint of before saw 64 values of a tensor; here each of 21,000 would show."""
    first = written(tmp_path / "base", weights())
    path = tmp_path / "base" / "model.safetensors"
    content = bytearray(path.read_bytes())
    start = 8 + struct.unpack("<Q", content[:8])[0]
    for at in (start, start + 41_234, len(content) - 1):
        changed = bytearray(content)
        changed[at] ^= 1
        path.write_bytes(changed)
        assert stored_fingerprint(tmp_path / "base") != first
    path.write_bytes(content)
    assert stored_fingerprint(tmp_path / "base") == first


@pytest.mark.parametrize(
    "change",
    [
        lambda t: {**t, "b.weight": t["b.weight"].reshape(70, 300)},
        lambda t: {**t, "c.bias": t["c.bias"].to(torch.int32)},
        lambda t: {"B.weight" if name == "b.weight" else name: one for name, one in t.items()},
        lambda t: {**t, "d": torch.zeros(1)},
        lambda t: {name: one for name, one in t.items() if name != "c.bias"},
    ],
    ids=["shape", "dtype", "name", "one more", "one less"],
)
def test_names_shapes_and_dtypes_count(change, tmp_path):
    assert written(tmp_path / "a", weights()) != written(tmp_path / "b", change(weights()))


def test_sharding_order_and_metadata_do_not_count(tmp_path):
    whole = written(tmp_path / "whole", weights())
    assert written(tmp_path / "other", dict(reversed(weights().items())), metadata={"x": "y"}) == whole
    parts = tmp_path / "parts"
    parts.mkdir()
    names = list(weights())
    for file, part in (("m-1.safetensors", names[:1]), ("m-2.safetensors", names[1:])):
        save_file({name: weights()[name] for name in part} | {"unused": torch.ones(2)}, parts / file)
    places = {names[0]: "m-1.safetensors", names[1]: "m-2.safetensors", names[2]: "m-2.safetensors"}
    (parts / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert stored_fingerprint(parts) == whole


def test_a_model_saved_in_shards_is_the_same_base(tiny_base, tmp_path):
    AutoModelForCausalLM.from_pretrained(tiny_base).save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert stored_fingerprint(tmp_path) == stored_fingerprint(tiny_base)


def test_the_file_that_the_configuration_names_is_the_one_that_is_read(tmp_path):
    """`transformers_weights` in config.json, which from_pretrained follows."""
    other = written(tmp_path / "other", weights(1))
    first = written(tmp_path / "base", weights())
    shutil.copy(tmp_path / "other" / "model.safetensors", tmp_path / "base" / "other.safetensors")
    config = tmp_path / "base" / "config.json"
    for named, expected in (("other.safetensors", other), (None, first)):
        config.write_text(json.dumps({"transformers_weights": named}))
        assert stored_fingerprint(tmp_path / "base") == expected
    places = dict.fromkeys(weights(), "other.safetensors")
    (tmp_path / "base" / "o.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    config.write_text(json.dumps({"transformers_weights": "o.safetensors.index.json"}))
    assert stored_fingerprint(tmp_path / "base") == other


def test_no_safetensors_no_fingerprint(tmp_path):
    assert stored_fingerprint(tmp_path) is None


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-10]), "ends within"),
        (lambda path: path.write_bytes(b"\xff" * 100), "not readable as safetensors"),
        (lambda path: path.write_bytes(struct.pack("<Q", 2) + b"[]"), "not readable as safetensors"),
        (lambda path: path.write_bytes(b""), "not readable as safetensors"),
    ],
    ids=["cut", "noise", "list", "empty"],
)
def test_damage_is_told(spoil, message, tmp_path):
    written(tmp_path / "base", weights())
    spoil(tmp_path / "base" / "model.safetensors")
    with pytest.raises(ConfigError, match=message):
        stored_fingerprint(tmp_path / "base")


def test_an_index_leads_to_no_other_folder(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "../x.safetensors"}})
    )
    with pytest.raises(ConfigError, match="is not a file name"):
        stored_fingerprint(tmp_path)


# ---- the cache


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A file that is large enough and old enough to be cached, and how often its bytes are read."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(stored, "_SMALL", 0)
    written(tmp_path / "base", weights())
    path = tmp_path / "base" / "model.safetensors"
    monkeypatch.setattr(stored, "_FRESH", 0)
    reads = []
    hash_tensor = stored._hash_tensor
    monkeypatch.setattr(stored, "_hash_tensor", lambda *args: reads.append(args[1]) or hash_tensor(*args))
    first = tensor_digests(path)
    assert len(reads) in (0, 3)
    reads.clear()
    return path, first, reads


def test_an_unchanged_file_is_not_read_again(cached):
    path, first, reads = cached
    assert tensor_digests(path) == first
    assert reads == []


def test_a_changed_file_is_read_again_though_its_size_and_time_are_put_back(cached):
    path, first, reads = cached
    times = os.stat(path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert os.stat(path).st_mtime_ns == times.st_mtime_ns
    assert tensor_digests(path) != first
    assert len(reads) == 3


def test_another_file_in_its_place_is_read(cached):
    path, first, _ = cached
    other = path.with_name("other.safetensors")
    save_file(weights(1), other)
    os.utime(other, ns=(0, os.stat(path).st_mtime_ns))
    os.replace(other, path)
    assert tensor_digests(path) != first


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: text.replace('"tensors": {', '"tensors": {"x": "y", '),
        lambda text: text.replace('"version": 1', '"version": 2'),
        lambda text: json.dumps(json.loads(text) | {"tensors": dict.fromkeys(weights(), "0" * 64)}),
        lambda text: json.dumps(json.loads(text) | {"tensors": None}),
        lambda text: json.dumps(json.loads(text) | {"path": "/elsewhere"}),
    ],
    ids=["cut", "empty", "list", "one more", "version", "digests", "null", "path"],
)
def test_a_damaged_cache_is_not_believed(cached, spoil, tmp_path):
    path, first, reads = cached
    [file] = (tmp_path / "cache" / "braidlora" / "fingerprints").iterdir()
    file.write_text(spoil(file.read_text()))
    assert tensor_digests(path) == first
    assert len(reads) == 3
    reads.clear()
    assert tensor_digests(path) == first  # and it has been written anew
    assert reads == []


def test_a_cache_that_cannot_be_written_costs_time_alone(cached, tmp_path, monkeypatch):
    path, first, reads = cached
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert tensor_digests(path) == first
    assert len(reads) == 3


def test_a_file_that_was_just_written_is_not_cached(cached, monkeypatch):
    """It may be written again within the resolution of its times."""
    path, first, reads = cached
    monkeypatch.setattr(stored, "_FRESH", 10**12)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    second = tensor_digests(path)
    assert second != first
    assert tensor_digests(path) == second
    assert len(reads) == 6


def test_a_file_that_changes_while_it_is_read_is_refused(cached, monkeypatch):
    path, _, _ = cached
    path.write_bytes(path.read_bytes())
    hash_tensor = stored._hash_tensor

    def meanwhile(*args):
        with open(path, "ab") as file:
            file.write(b"x")
        return hash_tensor(*args)

    monkeypatch.setattr(stored, "_hash_tensor", meanwhile)
    with pytest.raises(ConfigError, match="changed while it was read"):
        tensor_digests(path)


def test_a_link_and_its_file_are_one(cached):
    """As in the hub's cache, where names are links to blobs."""
    path, first, reads = cached
    link = path.with_name("link.safetensors")
    link.symlink_to(path)
    assert tensor_digests(link) == first
    assert reads == []


def test_hashing_a_small_base_takes_no_longer_than_loading_it(tmp_path):
    folder = build_base(tmp_path, hidden=256, layers=6)

    def fastest(step):
        times = []
        for _ in range(5):
            start = time.perf_counter()
            step(folder)
            times.append(time.perf_counter() - start)
        return min(times)

    # Twice: on a busy machine even the fastest of five is not exact; what this guards against is many times slower.
    assert fastest(stored_fingerprint) < 2 * fastest(AutoModelForCausalLM.from_pretrained)
