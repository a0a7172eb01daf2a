"""What to type where a cluster does not take the token of this machine."""

import pytest

from metadist.cluster.actors.connection import first_sentence, token_advice


@pytest.fixture
def file(monkeypatch, tmp_path):
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / ".ray" / "auth_token"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    return path


def test_without_a_token_the_command_that_brings_one_is_said(file):
    copies = f"`mkdir -p {file.parent} && scp HEAD:.ray/auth_token {file} && export RAY_AUTH_MODE="
    assert copies in token_advice()
    assert "`ray get-auth-token --generate`" in token_advice()


def test_a_token_that_is_not_shown(file, monkeypatch):
    file.parent.mkdir()
    file.write_text("secret")
    assert token_advice().endswith("type `export RAY_AUTH_MODE=token`")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert f"Its token is that of {file}: compare it" in token_advice()
    monkeypatch.setenv("RAY_AUTH_TOKEN", "another")
    assert "that of RAY_AUTH_TOKEN: " in token_advice()
    assert "secret" not in token_advice()


def test_of_what_ray_says_the_first_sentence_is_enough():
    error = RuntimeError("Unauthorized: no token\n\nEnsure that ... For more, see ...")
    assert first_sentence(error) == "Unauthorized: no token"
    assert first_sentence(RuntimeError("No token found. Ensure that")) == "No token found"
    assert first_sentence(OSError()) == "OSError"
