"""`braidlora serve`: what it checks and prints. Engines themselves are in test_vllm_server.py and others."""

import json
import shlex
import shutil

import pytest

from braidlora.models.location import resolve_path


@pytest.fixture
def shown(command):
    """`shown(TARGET, …)`: what a dry run prints as JSON."""

    def run(*words):
        code, out, err = command("serve", *words, "--dry-run", "--json")
        assert code == 0, err
        return json.loads(out)

    return run


@pytest.fixture
def every_engine_is_here(monkeypatch):
    """Both engines seem to be installed, in a version that is not among the tested ones."""
    from braidlora.serving import installation

    monkeypatch.setattr(
        installation, "check", lambda engine: installation.Installation(engine, "9.9.9", ("0.32.0",), ())
    )


def after(words, option):
    return words[words.index(option) + 1]


def test_the_command_for_vllm(shown, runs):
    found = shown(runs["alora"], f"plain={runs['lora'] / 'adapter'}")
    words = found["command"]
    assert words[1:3] == ["-m", "vllm.entrypoints.openai.api_server"]
    assert after(words, "--model") == found["base"] == resolve_path("embedded")
    assert (after(words, "--host"), after(words, "--port")) == ("127.0.0.1", "8000")
    assert after(words, "--max-lora-rank") == "16"  # 3 · 2 + 3 = 9
    assert after(words, "--max-loras") == "2"
    modules = words[words.index("--lora-modules") + 1 :][:2]
    assert modules == [f"alora={runs['alora']}/adapter", f"plain={runs['lora']}/adapter"]
    assert {name: one["rank"] for name, one in found["adapters"].items()} == {"alora": 9, "plain": 2}
    assert found["environment"] == {"VLLM_NO_USAGE_STATS": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}


def test_the_printed_command_is_the_one_that_runs(command, shown, runs):
    code, out, _ = command("serve", runs["alora"], "--dry-run", "--engine-args", "--max-model-len 64")
    assert code == 0
    found = shown(runs["alora"], "--engine-args", "--max-model-len 64")
    line = next(line for line in out.splitlines() if "vllm.entrypoints" in line)
    assert line == found["shown"]
    words = shlex.split(line)
    assert words[2:] == found["command"]
    assert found["command"][-2:] == ["--max-model-len", "64"]
    curls = [line for line in out.splitlines() if line.startswith("curl ")]
    assert curls == list(found["curl"].values())
    body = json.loads(shlex.split(found["curl"]["alora"])[-1])
    assert body["model"] == "alora"
    assert body["prompt"] == "The capital of France is ="  # the template of its tasks


def test_a_federation_is_served_by_its_clients_names(shown, federation):
    found = shown(federation)
    assert len(found["adapters"]) == 3
    some = next(iter(found["adapters"]))
    assert list(shown(f"{federation}/clients/{some}")["adapters"]) == [some]
    assert list(shown(f"bank={federation}")["adapters"]) == [f"bank-{name}" for name in found["adapters"]]


def test_default_names(shown, runs, tmp_path):
    assert list(shown(runs["alora"] / "adapter")["adapters"]) == ["alora"]
    copy = tmp_path / "winner-lora"
    shutil.copytree(runs["lora"] / "adapter", copy)
    assert list(shown(copy)["adapters"]) == ["winner-lora"]
    step = next((runs["alora"] / "checkpoints").iterdir())
    assert list(shown(step)["adapters"]) == [f"alora-{step.name}"]


@pytest.mark.parametrize("engine", ["vllm", "transformers"])
def test_the_dtype_is_the_recipes_or_the_one_given(shown, runs, engine):
    def dtype(*words):
        found = shown(runs["alora"], "--engine", engine, *words)["command"]
        return after(found, "--dtype") if "--dtype" in found else "auto"

    assert dtype() == dtype("--dtype", "auto")
    assert dtype("--dtype", "bfloat16") == "bfloat16"


def test_a_base_alone(shown):
    found = shown("embedded", "--no-loading")
    assert found["adapters"] == {}
    assert "--enable-lora" not in found["command"]
    assert list(found["curl"]) == ["base"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("{alora}", "alora={lora}"), "the name 'alora' is taken by"),
        (("base={alora}",), "'base' is the name of the base model"),
        (("a b={alora}",), "'a b' is not a name"),
        (("{alora}", "--max-lora-rank", "8"), "alora needs rank 9 (3 experts of rank 2 and 3 router logits"),
        (("{alora}", "--max-lora-rank", "20"), "vLLM allows 1, 8, 16, 32, 64"),
        (("{alora}", "--port", "0"), "--port: got 0"),
        (("{alora}", "--max-loras", "0"), "--max-loras: got 0"),
        (
            ("{alora}", "--engine-args", "--api-key secret"),
            "sets --api-key itself; use --api-key-file, or the variable",
        ),
        (("{alora}", "--engine-args=--dtype=float32"), "sets --dtype itself; use the option of that name"),
        (
            ("{alora}", "--engine-args", "--lora_modules x=y"),
            "sets --lora_modules itself; it follows from the targets",
        ),
        (("{alora}", "--engine-args", "'open"), "--engine-args"),
        (("{alora}", "--load-from", "/no/such/folder"), "is not a folder"),
        (("{alora}", "--load-from", "/tmp", "--no-loading"), "and --load-from cannot be combined"),
        (("{alora}", "--engine", "transformers", "--max-loras", "2"), "--max-loras: is for the engine vllm"),
        (("/no/such/run",), "no such"),
        ((), "give at least one run"),
    ],
)
def test_refusals(command, runs, words, message):
    code, _, err = command("serve", *(word.format(**runs) for word in words), "--dry-run")
    assert code == 2
    assert message in err


def test_adapters_of_two_bases_are_refused(command, runs, federation):
    code, _, err = command("serve", runs["alora"], federation, "--dry-run")
    assert code == 2
    assert "a server hosts one base" in err


def test_the_base_is_compared_with_the_one_of_the_training(command, runs, federation, tmp_path):
    other = json.loads((runs["alora"] / "adapter" / "braidlora.json").read_text())
    copy = tmp_path / "copy"
    shutil.copytree(runs["alora"] / "adapter", copy)
    (copy / "manifest.json").unlink(missing_ok=True)
    other["base"]["fingerprint"] = "sha256:" + "0" * 64
    (copy / "braidlora.json").write_text(json.dumps(other))
    code, _, err = command("serve", copy, "--dry-run")
    assert code == 5
    assert "trained on a different base model" in err


def test_a_classifier_is_refused_with_what_works(command, classifier):
    code, _, err = command("serve", classifier, "--dry-run")
    assert code == 2
    assert "modules_to_save: classifier, score" in err
    assert "braidlora predict" in err
    assert "--engine transformers" in err
    code, _, err = command("serve", classifier, "--engine", "transformers", "--dry-run")
    assert code == 2
    assert "use `braidlora predict`" in err


def changed(run, folder, **settings):
    """A copy of a run's adapter with other settings in its configuration."""
    shutil.copytree(run / "adapter", folder)
    (folder / "manifest.json").unlink(missing_ok=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))
    return folder


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("alora", {"bias": "all"}, "trained biases"),
        ("lora", {"use_dora": True}, "a variant of LoRA (use_dora)"),
        ("lora", {"lora_bias": True, "use_qalora": True}, "a variant of LoRA (lora_bias, use_qalora)"),
        ("lora", {"layer_replication": [[0, 2], [1, 3]]}, "a variant of LoRA (layer_replication)"),
    ],
)
def test_what_vllm_alone_does_not_load(
    command, runs, tmp_path, every_engine_is_here, method, settings, message
):
    copy = changed(runs[method], tmp_path / "copy", **settings)
    for option in ("--dry-run", "--check"):
        code, _, err = command("serve", copy, option)
        assert code == 2
        assert message in err
        assert "use --engine transformers, or `braidlora predict`" in err
        assert command("serve", copy, "--engine", "transformers", option)[0] == 0


class TestQuantizedBases:
    """The adapters' recipes quantize the base."""

    @pytest.fixture
    def trained_on(self, runs, tmp_path):
        """`trained_on("4bit", …)`: adapter folders that record these quantizations of their base."""

        def make(*quantizations):
            folders = []
            for quantization in quantizations:
                folder = changed(runs["lora"], tmp_path / f"of-{quantization}")
                card = json.loads((folder / "braidlora.json").read_text())
                card["base"]["quantization"] = quantization
                (folder / "braidlora.json").write_text(json.dumps(card))
                folders.append(folder)
            return folders

        return make

    @pytest.mark.parametrize("option", ["--dry-run", "--check"])
    @pytest.mark.parametrize("output", [[], ["--json"]])
    def test_vllm_warns(self, command, trained_on, every_engine_is_here, option, output):
        code, out, err = command("serve", "embedded", *trained_on("4bit", "none"), option, *output)
        assert code == 0, err
        assert "vLLM loads the base unquantized" in err
        assert "of-4bit (4bit), of-none (none)" in err
        assert "warning" not in out

    def test_vllm_does_not_warn_if_it_quantizes(self, command, trained_on):
        (folder,) = trained_on("4bit")
        for words in ("--quantization bitsandbytes", "--quantization=bitsandbytes"):
            code, _, err = command("serve", folder, "--dry-run", f"--engine-args={words}")
            assert (code, err) == (0, "")

    @pytest.mark.parametrize("output", [[], ["--json"]])
    def test_transformers_loads_base_and_adapters_alike(self, command, trained_on, output):
        engine = ("--engine", "transformers", "--dry-run", *output)
        (folder,) = trained_on("4bit")
        code, out, err = command("serve", folder, *engine)
        assert (code, err) == (0, "")
        assert "--quantization" in out
        code, _, err = command("serve", folder, *trained_on("8bit"), *engine)
        assert code == 0
        assert "different quantization: of-4bit (4bit), of-8bit (8bit)" in err
        assert "`base` with that of the first" in err

    def test_nothing_is_said_without_quantization(self, command, runs):
        for engine in ("vllm", "transformers"):
            code, out, err = command("serve", runs["lora"], "--engine", engine, "--dry-run")
            assert (code, err) == (0, "")
            assert "--quantization" not in out


@pytest.mark.parametrize("settings", [{"init_lora_weights": "pissa_niter_4"}, {"kasa_config": {"beta": 1.0}}])
def test_an_adapter_of_an_edited_base_is_refused_by_every_engine(
    command, runs, tmp_path, every_engine_is_here, settings
):
    copy = changed(runs["lora"], tmp_path / "copy", **settings)
    for engine in ("vllm", "transformers"):
        code, out, err = command("serve", copy, "--engine", engine, "--check")
        assert (code, "Can serve  no" in out) == (2, True)
        assert "path_initial_model_for_weight_conversion" in err


def test_without_vllm_the_command_says_how_to_install_it(command, runs, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = command("serve", runs["alora"])
    assert code == 2
    assert "pip install 'braidlora[vllm]'" in err
    code, out, err = command("serve", runs["alora"], "--check")
    assert code == 2
    assert "Can serve  no" in out
    assert "vLLM is not installed" in err


def test_check_lists_adapters_and_the_rank(command, runs, every_engine_is_here):
    code, out, _ = command("serve", runs["alora"], "--check")
    assert code == 0
    assert "tested with 0.32.0; 9.9.9 has the functions that are needed" in out
    assert "--max-lora-rank 16" in out
    assert "Can serve  yes" in out
    code, out, _ = command("serve", "--check", "--json")
    assert json.loads(out)["problems"] == []


class TestKeys:
    """The API key: required beyond the loopback, and never shown."""

    SECRET = "sk-very-secret-0123456789"

    def test_required_where_others_reach_the_address(self, command, runs):
        for host in ("0.0.0.0", "::", "192.168.1.7", "my.host.example"):
            code, _, err = command("serve", runs["alora"], "--host", host, "--dry-run")
            assert code == 2
            assert f"--host: {host} can be reached from other machines" in err
        for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost"):
            assert command("serve", runs["alora"], "--host", host, "--dry-run")[0] == 0

    def test_from_the_environment(self, command, shown, runs, monkeypatch):
        monkeypatch.setenv("BRAIDLORA_API_KEY", self.SECRET)
        for engine in ("vllm", "transformers"):
            words = (runs["alora"], "--host", "0.0.0.0", "--engine", engine)
            code, out, err = command("serve", *words, "--dry-run")
            assert code == 0
            assert self.SECRET not in out + err
            assert '"$BRAIDLORA_API_KEY"' in out
            assert self.SECRET not in json.dumps(shown(*words))

    def test_the_server_gets_it_in_its_environment(self, command, runs, monkeypatch):
        from braidlora.serving import installation

        started = []
        monkeypatch.setenv("BRAIDLORA_API_KEY", self.SECRET)
        monkeypatch.setattr(
            installation, "check", lambda engine: installation.Installation(engine, "0.32.0", ("0.32.0",), ())
        )
        monkeypatch.setattr("os.execve", lambda *given: started.append(given))
        assert command("serve", runs["alora"])[0] == 0
        ((program, words, environment),) = started
        assert program == words[0]
        assert environment["VLLM_API_KEY"] == self.SECRET
        assert not any(self.SECRET in word for word in words)

    def test_from_a_file_of_its_owner_alone(self, command, runs, tmp_path):
        file = tmp_path / "key"
        file.write_text(self.SECRET + "\n")
        words = ("serve", runs["alora"], "--host", "0.0.0.0", "--api-key-file", file, "--dry-run")
        for mode in (0o644, 0o640, 0o604, 0o666):
            file.chmod(mode)
            code, _, err = command(*words)
            assert code == 2
            assert f"has mode {mode:04o}" in err
        for mode in (0o600, 0o400):
            file.chmod(mode)
            code, out, err = command(*words)
            assert code == 0, err
            assert self.SECRET not in out + err
            assert f"$(cat {file})" in out

    @pytest.mark.parametrize("content", ["", "\n", "two words", "two\nlines", "naïve"])
    def test_what_is_no_key(self, command, runs, tmp_path, content):
        file = tmp_path / "key"
        file.write_text(content)
        file.chmod(0o600)
        code, _, err = command("serve", runs["alora"], "--api-key-file", file, "--dry-run")
        assert code == 2
        assert "is not a key" in err

    def test_a_missing_file(self, command, runs, tmp_path):
        code, _, err = command("serve", runs["alora"], "--api-key-file", tmp_path / "none", "--dry-run")
        assert code == 2
        assert "cannot be read: No such file" in err


class TestLoading:
    """Adapters at run time: any on the loopback, from named folders otherwise."""

    def environment(self, shown, *words):
        found = shown(*words)["environment"]
        return found["VLLM_ALLOW_RUNTIME_LORA_UPDATING"], found.get("BRAIDLORA_ADAPTER_FOLDERS")

    def test_on_the_loopback(self, shown, runs, tmp_path):
        assert self.environment(shown, runs["alora"]) == ("1", None)
        assert self.environment(shown, runs["alora"], "--no-loading")[0] == "0"
        folders = f"{runs['alora']}/adapter:{tmp_path}"
        assert self.environment(shown, runs["alora"], "--load-from", tmp_path) == ("1", folders)

    def test_beyond_it(self, shown, runs, tmp_path, monkeypatch):
        monkeypatch.setenv("BRAIDLORA_API_KEY", "key")
        words = (runs["alora"], "--host", "0.0.0.0")
        assert self.environment(shown, *words) == ("0", f"{runs['alora']}/adapter")
        folders = f"{runs['alora']}/adapter:{tmp_path}"
        assert self.environment(shown, *words, "--load-from", tmp_path) == ("1", folders)


def test_folders_are_compared_after_links(tmp_path, monkeypatch):
    from braidlora.serving.vllm import folders

    allowed, other = tmp_path / "allowed", tmp_path / "allowed-not"
    for folder in (allowed / "a", other):
        folder.mkdir(parents=True)
    (allowed / "link").symlink_to(other)
    folders.check(str(other))  # no limit
    monkeypatch.setenv(folders.VARIABLE, str(allowed))
    folders.check(str(allowed / "a"))
    folders.check(str(allowed / "x" / ".." / "a"))
    for path in (other, allowed / "link", allowed / "..", "owner/name", "/", ""):
        with pytest.raises(ValueError, match="not in a folder"):
            folders.check(str(path))
    monkeypatch.setenv(folders.VARIABLE, "")
    with pytest.raises(ValueError, match="not in a folder"):
        folders.check(str(allowed / "a"))
