"""The notice that a copy of a hub model is used."""

from braidlora.models import hub_copies


def test_the_notice_is_full_once_and_short_from_then_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for expected in ("the long story", "the short one"):
        hub_copies._note.cache_clear()  # a new process
        hub_copies._note("the long story", "the short one")
        assert capsys.readouterr().err == f"model.path: {expected}.\n"
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    hub_copies._note.cache_clear()
    hub_copies._note("the long story", "the short one")
    assert "the long story" in capsys.readouterr().err
    hub_copies._note.cache_clear()
