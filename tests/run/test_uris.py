"""URIs with secrets in any position, and other spellings of one folder."""

from __future__ import annotations

import contextlib
import io

import pytest

from metadist.cli import main
from metadist.cluster.jobs.submit import job_name, submit
from metadist.run.storage import Folder, write_json
from metadist.run.uris import check_no_secret, check_no_secrets, tidy

SECRET = "hUsh9"
LEAKY = [
    f"s3://key:{SECRET}@bucket/run",
    f"S3://key:{SECRET}@bucket/run",
    f"s3://key:a/b/{SECRET}@bucket/run",
    f"s3:/key:{SECRET}@bucket/run",
    f"s3://key%3A{SECRET}@bucket",
    f"simplecache::s3://key:{SECRET}@bucket/run",
    f"filecache::zip://a::gs://{SECRET}@bucket/run",
    f"zip://a@b::https://host/x.zip?token={SECRET}",
    f"https://{SECRET}@host/run",
    f"gs://{SECRET}@bucket/run",
    f"memory://x?Password={SECRET}",
    f"https://host/run?AWSAccessKeyId=a&Signature={SECRET}&Expires=1",
    f"https://host/run?X-Amz-Date=1&X-Amz-Signature={SECRET}",
    f"https://account.blob.core.windows.net/run?sv=2024&sig={SECRET}",
    f"https://host/run#access_token={SECRET}",
    f"https://host/run;api_key={SECRET}/more",
    f"s3://bucket/secret={SECRET}/run",
    f"sftp://me:{SECRET}@host/run",
    f"sftp://ghp{SECRET}aaaaaaaaaaaaaaaaaaaaaa@host/run",
]
HARMLESS = [
    "runs/mine",
    "/data/a:b@c?token=x",
    "file:///tmp/a:b@c",
    "s3://bucket/run@2/lr=0.1",
    "s3://bucket/tokenizer=bpe/num_tokens=10",
    "sftp://me@host:22/runs",
    "hdfs://namenode:8020/runs",
    "abfs://container@account.dfs.core.windows.net/runs",
    "simplecache::s3://bucket/run@2",
    "memory://x",
]


@pytest.mark.parametrize("uri", LEAKY)
def test_a_secret_is_refused_wherever_it_stands(uri, capsys):
    for call in (
        lambda: Folder(uri),
        lambda: write_json(f"{uri}/x.json", {}),
        lambda: check_no_secrets(["--sampler.root", f'{{"a": "{uri}"}}']),
        lambda: submit(["train", "--run_dir", uri], "/runs/x", "http://127.0.0.1:1", None),
        lambda: submit(["train"], uri, "http://127.0.0.1:1", None),
    ):
        with pytest.raises(ValueError, match="must not hold a password") as error:
            call()
        assert SECRET not in str(error.value)
    for arguments in (
        ["status", uri, "another"],
        ["train", "--run_dir", uri, "--nonsense", "1"],
        ["submit", "--", f"--run_dir={uri}"],
        ["inspect", f"--run_dir={uri}"],
    ):
        assert main(arguments) == 2
        out, err = capsys.readouterr()
        assert "must not hold a password" in err and SECRET not in out + err


@pytest.mark.parametrize("query", ["", "x", "foo=bar"])
def test_a_folder_has_no_query(query):
    with pytest.raises(ValueError, match="got a query in s3"):
        check_no_secret(f"s3://bucket/run?{query}")


@pytest.mark.parametrize("uri", HARMLESS)
def test_other_uris_and_paths_are_taken(uri):
    check_no_secret(uri)
    check_no_secrets(["--run_dir", uri, "--sampler.url", "https://host/data.zip?download=1"])


def test_a_secret_in_a_config_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "config.yaml"
    config.write_text(f"run_dir: s3://key:{SECRET}@bucket/run\nsampler: sinusoid\n")
    for command in (["train"], ["submit", "--follow", "false", "--"]):
        err = io.StringIO()
        with contextlib.redirect_stderr(err), contextlib.suppress(SystemExit):
            assert main([*command, "--config", str(config)]) == 2
        assert "run_dir must not hold a password" in err.getvalue()
        assert SECRET not in err.getvalue()


@pytest.mark.parametrize(
    ("spellings", "name"),
    [
        (
            ("/shared/a", "/shared/a/", "/shared//a", "/shared/./a", "file:///shared/a/"),
            "/shared/a",
        ),
        (("runs/a", "./runs/a", "runs/./a//"), "runs/a"),
        (("s3://bucket/a", "s3://bucket/a/", "S3://bucket//a", "s3://bucket/./a"), "s3://bucket/a"),
    ],
)
def test_spellings_of_one_folder(spellings, name):
    assert {tidy(path) for path in spellings} == {name}
    assert len({job_name(path) for path in spellings}) == 1
    assert job_name(f"{name}/b") != job_name(f"{name}b") != job_name(name)


def test_spellings_of_one_folder_are_one_folder():
    Folder("memory://same//./folder/").write("x", b"1")
    assert Folder("memory://same/folder").read("x", at_most=1) == b"1"
    Folder("memory://same").remove("folder")
