"""`metadist status`: a run at a glance, and its exit codes."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

from ray.job_submission import JobStatus

from metadist.cluster.jobs import submit
from metadist.cluster.jobs.submit import job_name


def test_status_shows_a_run_and_exits_with_0_while_it_is_well(cli, run):
    out = cli.good("status", run)
    assert re.search(r"^state +finished, last wrote ", out, re.MULTILINE)
    assert re.search(r"^step +5 of 5 *$", out, re.MULTILINE)
    assert max(map(len, out.splitlines())) <= 80
    events = run / "events.jsonl"
    began, *_ = events.read_text().splitlines()
    failed = json.dumps(json.loads(began) | {"event": "run_failed", "error": "OSError: full"})
    for more, state in (([], "running"), ([failed], "failed"), ([failed, began], "running")):
        events.write_text("\n".join([began, *more]) + "\n")
        code, out, _ = cli("status", run, "--stale_s", 1e6)
        assert (code, f"state       {state}" in out) == (int(state == "failed"), True)
    code, out, _ = cli("status", run, "--stale_s", 1e-6)
    assert code == 1 and "state       stale, last wrote " in out


def test_status_refuses_what_is_no_run(cli, here):
    code, out, err = cli("status", "nothing")
    assert code == 2 and out == ""
    assert "metadist status: error: run_dir must be the folder of a run that has begun to" in err
    code, _, err = cli("status", "nothing", "--stale_s", 0)
    assert code == 2 and "stale_s must be > 0, got 0.0" in err


def test_a_job_that_waits_is_not_no_run(cli, here, monkeypatch):
    jobs = [SimpleNamespace(submission_id=f"{job_name('/runs/a')}-2", status=JobStatus.PENDING)]
    jobs[0].message = "waits for \x1b[2J"
    client = SimpleNamespace(list_jobs=lambda: jobs, get_job_info=lambda id: jobs[0])
    monkeypatch.setattr(submit, "JobSubmissionClient", lambda address: client)
    address = ("--address", "http://head:8265")
    code, out, _ = cli("status", "/runs/a/", *address)
    assert code == 0 and f"{jobs[0].submission_id}: PENDING: waits for \\x1b[2J; it has" in out
    jobs[0].status = JobStatus.FAILED
    assert cli("status", "/runs/a", *address)[0] == 1
    for rest in (("/runs/b", *address), ("/runs/a",)):
        code, _, err = cli("status", *rest)
        assert code == 2 and "`metadist status --address` asks Ray" in err
