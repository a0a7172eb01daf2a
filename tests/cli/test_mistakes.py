"""Mistakes in flags and files: the message names the option, the nearest name and all there are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from metadist.cli import COMMANDS
from metadist.cli.names import named
from metadist.cli.suggestions import METHODS
from tests.helpers import words

FLAGS = {
    "--nun_steps 3": "nun_steps is no option of metadist train: did you mean num_steps?\n`meta",
    "--numsteps=3": "numsteps is no option of metadist train: did you mean num_steps?",
    "--NUM-STEPS 3": "NUM-STEPS is no option of metadist train: did you mean num_steps?",
    "--inner_lr 0.1": "inner_lr is no option of metadist train: did you mean algorithm.inner_lr?",
    "--executer.prefetch 2": "did you mean executor.prefetch?",
    "--xyzzy 2": "xyzzy is no option of metadist train. It has config,",
    "--outer_optimizer.lrr 3": "lrr is no option of outer_optimizer: did you mean lr?",
    "--algorithm.inner_step 3": "inner_step is no option of ITD: did you mean inner_steps? "
    "`metadist train --algorithm.help ITD` shows all",
    "--problem.model mlp --problem.model.hiden [3]": "hiden is no option of MLP: did you mean",
    "--executor.workers 2": "executor.workers is no option of LocalExecutor, but of",
    "--sampler glyps": "sampler must be one of `metadist list samplers` or a class path, got "
    "'glyps': did you mean glyphs?",
    "--algorithm.inner_optimizer.lr 0.1": "algorithm.inner_optimizer must be one of adam, adamw, "
    "sgd, got options of it alone: pass --algorithm.inner_optimizer NAME",
    "--sampler xyzzy": f"sampler must be one of {', '.join(named('samplers'))} or a class path, "
    "got 'xyzzy'",
    "--algorithm idt": "metadist list algorithms` or a class path, got 'idt': did you mean itd?",
    "--algorithm=reptil": "did you mean reptile?",
    "--algorithm MAML": "a class path, got 'MAML', which is itd with --problem.adapt all",
    "--problem anil": "a class path, got 'anil', which is itd with --problem.adapt head",
    "--algorithm protonet": "a class path, got 'protonet', which is --problem proto_net",
    "--problem fewshots": "got 'fewshots': did you mean few_shot?",
    "--problem.model resnet": "got 'resnet': did you mean resnet12?",
    "--executor raay": "executor must be one of `metadist list executors` or a class path, got",
    "--executor ray --executor.policy sspp": "policy must be one of `metadist list pol",
    "--executor ray --executor.policy ssp": "executor.policy.staleness must be given: pass --exec",
    "--num_steps many": "num_steps must be an integer, got 'many'",
    "--num_steps 1.5": "num_steps must be an integer, got 1.5",
    "--num_steps": "num_steps must have a value: pass --num_steps VALUE",
    "--algorithm.inner_lr fast": "algorithm.inner_lr must be a number, got 'fast'",
    "--algorithm.engine adjoin": "engine must be one of 'adjoint', 'unrolled', 'higher', got "
    "'adjoin': did you mean 'adjoint'?",
    "--quiet maybe": "quiet must be true or false, got 'maybe'",
    "--batch_size lots": "batch_size must be an integer, got 'lots'",
    "--outer_optimizer.options 3": "outer_optimizer.options must be a mapping, got 3",
    "--sampler.k_shot [1]": "sampler.k_shot must be an integer, got [1]",
    "--callbacks csv.reader": "callbacks must be a list, got 'csv.reader': pass --callbacks "
    "[csv.reader]",
    "--callbacks+ csv.reader": "callbacks must name a class or function whose parameters Python",
    "--loggers math.gcd": "loggers must name a subclass of Logger, got math.gcd",
    "--executor ray --executor.policy math.gcd": "executor.policy must name a subclass of Policy",
    "extra": "arguments must begin with --, got 'extra'",
}
FILES = {
    "nun_steps: 3": "nun_steps is no option of metadist train: did you mean num_steps?",
    "outer_optimizer: {lrr: 3}": "lrr is no option of outer_optimizer: did you mean lr?",
    "outer_optimizer: {lr: [3]}": "outer_optimizer.lr must be a number, got [3]",
    "sampler: {class_path: sinusoid, init_args: {k_shoot: 3}}": "sampler.k_shoot is no option of "
    "Sinusoid: did you mean k_shot?",
    "sampler: {class_path: sinusoid, init_arg: {k_shot: 3}}": "the keys of sampler must be one of "
    "class_path, init_args, got 'init_arg': did you mean init_args?",
    "sampler: {k_shot: 3}": "got 'k_shot': name the class by class_path",
    "sampler: [glyphs]": "sampler must be a short name, a class path, or a mapping with class_path "
    "and init_args, got ['glyphs']",
    "problem: 3": "problem must be a short name, a class path, or a mapping",
    "problem: {class_path: few_shot, init_args: {model: {class_path: mlpp}}}": "problem.model must "
    "be one of `metadist list models` or a class path, got 'mlpp': did you mean mlp?",
    "executor: {class_path: ray, init_args: {policy: {class_path: ssp, init_args: {stale: 2}}}}":
    "executor.policy.stale is no option of SSP: did you mean staleness?",
    "problem: {class_path: few_shot, init_args: {model: csv.reader}}": "problem.model must name a "
    "class or function whose parameters Python can list, got csv.reader: give it an __init__ of",
    "num_steps: [1, 2]": "num_steps must be an integer, got [1, 2]",
    "quiet: maybe": "quiet must be true or false, got 'maybe'",
}  # fmt: skip
NULLS = {
    "num_steps: null": "num_steps must be a value, got null: leave it out for 1000",
    "outer_optimizer: null": "outer_optimizer must be a mapping of its options, got None",
    "algorithm: {class_path: itd, init_args: {inner_steps: null}}": "inner_steps must be a value",
    "sampler: null": "sampler must be given: pass --sampler NAME",
}


def refused(cli, *arguments: str) -> str:
    """The message."""
    code, out, err = cli(*arguments)
    assert (code, out) == (2, ""), err
    assert "Traceback" not in err and len(err.splitlines()) <= 2
    prefix = f"metadist {arguments[0]}: error: "
    assert err.startswith(prefix)
    return str(err.removeprefix(prefix))


@pytest.mark.parametrize(
    ("command", "missing"),
    [
        ("status", "run_dir must be given: pass metadist status RUN_DIR"),
        ("compare", "config and run_dir must be given: pass metadist compare CONFIG"),
    ],
)
def test_what_needs_no_name_is_shown_without_one(cli, command, missing):
    assert missing in refused(cli, command)


def test_options_of_a_training_come_behind_a_mark_in_a_job(cli):
    message = refused(cli, "submit", "--sampler", "sinusoid", "--run_dir", "x")
    assert "sampler is no option of metadist submit. It has address," in message
    assert "; options of `metadist train` come behind --" in message


def test_methods_by_other_names_have_options_that_there_are(cli):
    for said in METHODS.values():
        options = said.removeprefix("itd with ").split()
        model = [] if options[0] == "--problem" else ["--problem", "few_shot"]
        flags = [*model, *options, "--problem.model", "conv4", "--algorithm", "itd"]
        cli.good("train", "--sampler", "glyphs", *flags, "--print_config")


@pytest.mark.parametrize("flags", FLAGS)
def test_in_flags(cli, flags):
    assert FLAGS[flags] in refused(cli, "train", "--sampler", "sinusoid", *words(flags))


@pytest.mark.parametrize("option", ["sampler", "val_sampler", "problem", "problem.model",
                                    "algorithm", "algorithm.inner_optimizer", "executor",
                                    "executor.policy", "loggers"])  # fmt: skip
def test_what_has_no_parameters_that_can_be_listed(cli, option):
    first = "--executor ray" if option == "executor.policy" else ""
    flags = words(f"--sampler sinusoid {first} --{option} csv.reader")
    assert (
        f"{option} must name a class or function whose parameters Python can list, got "
    ) in refused(cli, "train", *flags)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("x = 1\nraise KeyError('width')", "KeyError: 'width' (HERE/mine.py"),
        ("def (", "SyntaxError: invalid syntax (mine.py"),
    ],
)
@pytest.mark.parametrize("option", ["sampler", "problem.model", "callbacks+", "loggers"])
def test_a_module_that_cannot_be_imported(cli, text, what, option):
    Path("mine.py").write_text(text)
    what = what.replace("HERE", str(Path.cwd()))
    message = refused(cli, "train", "--sampler", "sinusoid", f"--{option}", "mine.Thing")
    field = option if option[0] in "sp" else "every class path"
    assert message.startswith(f"{field} must be importable, got ")
    assert f"{what}, line {text.count(chr(10)) + 1})" in message


def test_classes_may_be_named_after_their_options(cli):
    flags = "--executor.policy.staleness 2 --executor.policy ssp --problem.model.hidden [3] "
    flags += "--executor ray --problem.model=mlp --sampler.k_shot=3 --sampler sinusoid"
    shown = yaml.safe_load(cli.good("train", *flags.split(), "--print_config"))
    policy = shown["executor"]["init_args"]["policy"]
    assert policy["class_path"] == "metadist.cluster.SSP"
    assert policy["init_args"]["staleness"] == 2
    assert shown["problem"]["init_args"]["model"]["init_args"]["hidden"] == [3]
    assert shown["sampler"]["init_args"]["k_shot"] == 3
    # A file stays where it is: what follows counts more, and it more than what precedes it.
    Path("mine.yaml").write_text("sampler: {class_path: glyphs, init_args: {n_way: 4}}")
    for flags, sampler in (("--sampler sinusoid FILE", "Glyphs"), ("FILE --sampler.n_way 3", 3)):
        flags = flags.replace("FILE", "--config mine.yaml")
        shown = yaml.safe_load(cli.good("train", *flags.split(), "--print_config"))["sampler"]
        assert sampler in (shown["class_path"].rpartition(".")[2], shown["init_args"]["n_way"])


@pytest.mark.parametrize("text", FILES)
def test_in_a_file_that_is_named(cli, text):
    Path("mine.yaml").write_text(text)
    sampler = [] if "sampler" in text else ["--sampler", "sinusoid"]
    message = refused(cli, "train", *sampler, "--config", "mine.yaml", "--run_dir", "x")
    assert message.startswith("mine.yaml: ") and FILES[text] in message
    # A mistake elsewhere is not one of the file.
    Path("mine.yaml").write_text("num_steps: 3")
    assert not refused(cli, "train", "--config", "mine.yaml", "--nun_steps", "3").startswith("mine")


@pytest.mark.parametrize("text", NULLS)
def test_null_is_no_value(cli, text):
    Path("mine.yaml").write_text(text)
    sampler = [] if "sampler" in text else ["--sampler", "sinusoid"]
    assert NULLS[text] in refused(cli, "train", *sampler, "--config", "mine.yaml", "--run_dir", "x")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("- a\n- b\n", "no mapping of options to values"),
        ("a: [\n", "line 2, column 1"),
        ("a: &x {b: *x}", "it holds itself"),
        ("seed: 1\nnum_steps: 2\nseed: 3\n", "it has seed twice, in lines 1 and 3: remove one"),
        ("a:\n  b: 1\n  b: 1\n", "it has b twice, in lines 2 and 3"),
    ],
)
def test_a_file_that_is_no_config(cli, text, reason):
    Path("mine.yaml").write_text(text)
    for arguments in (["train", "--config", "mine.yaml"], ["compare", "mine.yaml"]):
        message = refused(cli, *arguments, "--run_dir", "x")
        assert "config must be a YAML file of options, got 'mine.yaml': " in message
        assert reason in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluation": 3}, r"mine.yaml: entry ITD: evaluation is .*: did you mean evaluations\?"),
        (
            {"entries": {"ITD": {"algorithm": "idt"}}},
            r"mine.yaml: entry ITD: algorithm must be one .*",
        ),
        (
            {"entries": {"ITD": {"algorithm": {"class_path": "itd", "init_args": {"steps": 1}}}}},
            r"mine.yaml: entry ITD: algorithm.steps is no option of ITD: did you mean inner_",
        ),
        ({"budget": {"step": 3}}, r"mine.yaml: "),
    ],
)
def test_in_a_comparison(cli, changes, message):
    tree: dict[str, Any] = {
        "sampler": "sinusoid",
        "val_split": "val",
        "entries": {"ITD": {}},
        "budget": {"steps": 2},
    }
    Path("mine.yaml").write_text(yaml.safe_dump(tree | changes))
    found = refused(cli, "compare", "mine.yaml", "--run_dir", "out", "--plots", "false")
    assert re.match(message, found), found


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_option_is_refused_without_pages_of_usage(cli, command):
    needed = {"compare": ["x"], "tune": ["x"], "data": ["list"], "submit": ["--", "x"]}
    message = refused(cli, command, "--colour=red", *needed.get(command, []))
    assert f"colour is no option of metadist {command}" in message
    assert message.endswith(f"\n`metadist {command} --help` shows the options\n")


@pytest.mark.parametrize("command", ["data", "list", "status"])
@pytest.mark.parametrize("rest", [["--colour", "red"], ["--colour", "red", "list"], ["--colour"]])
def test_the_value_of_an_unknown_option_is_no_argument(cli, command, rest):
    assert f"colour is no option of metadist {command}" in refused(cli, command, *rest)


def test_in_commands_and_their_arguments(cli):
    code, _, err = cli("trian")
    assert (
        code == 2 and "command must be one of train, resume" in err and "did you mean train?" in err
    )
    assert "kind must be one of algorithms," in refused(cli, "list", "algorithm")
    assert "did you mean algorithms?" in refused(cli, "list", "algorithm")
    assert "stales is no option of metadist status: did you mean stale_s?" in refused(
        cli, "status", "x", "--stales", "3"
    )
    assert "run_dir must be given" in refused(cli, "status")
    assert "run_dir must be given once" in refused(cli, "status", "x", "y")
