"""`metadist status`: a run at a glance, and its exit codes."""

from __future__ import annotations

import json
import re


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
