"""The runner, the progress lines, the Makefile: bad input in one sentence, failures lose nothing, what is rebuilt."""

import importlib
import io
import os
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import yaml
from nbformat import v4

from ssl_robust import progress, records
from ssl_robust.ops import run
from ssl_robust.settings import BadInput
from ssl_robust.trust import data

PROJECT = Path(__file__).resolve().parents[1]
ATTACK = {"eps": 0.03, "step": 0.01, "steps": 3}
PROFILE = {"profile": "tiny", "seed": 7, "encoders": [{"name": "embedded_vit"}], "attack": ATTACK}
PARAMETERS = "profile = 'demo'  # name=value inside is no matter\nseed = 0  # start\nattack = {'eps': 1.0}  # ball"
LOOP = """from ssl_robust import progress
progress.QUIET_SECONDS = 0
for _ in progress.track(range(20), desc='PGD'): pass"""
LAST = """import os
from pathlib import Path
Path(os.environ['SSL_ROBUST_ROOT'], 'results', profile, '00_try.json').write_text(str([profile, seed, attack]))"""


@pytest.fixture
def project(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the profile 'tiny', no notebooks, and a record and a stage file of earlier runs."""
    (root / "notebooks").mkdir()
    write_profile(root, PROFILE)
    monkeypatch.setattr(run, "NOTEBOOKS", root / "notebooks")
    monkeypatch.setattr(run, "PARAMS", root / "params")
    record = records.record_path("tiny", "depth", "scenes", "embedded_vit", "standard", "clean")
    records.write_json({"key": "0"}, record)
    records.write_json({"old": True}, records.stage_path("tiny", "00_try"))
    return root


def write_profile(root: Path, parameters: dict, name: str = "tiny") -> None:
    (root / "params").mkdir(exist_ok=True)
    (root / "params" / f"{name}.yaml").write_text(yaml.safe_dump(parameters))


def write_notebook(root: Path, *sources: str, name: str = "00_try", parameters: str = PARAMETERS) -> None:
    cells = [v4.new_code_cell(source) for source in (parameters, *sources)]
    cells[0].metadata["tags"] = ["parameters"]
    spec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(v4.new_notebook(cells=cells, metadata={"kernelspec": spec}), root / "notebooks" / f"{name}.ipynb")


def outcome(capfd: pytest.CaptureFixture, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the runner."""
    code = run.main([*arguments])
    printed = capfd.readouterr()
    return code, printed.out, printed.err


def test_notebook_gets_its_parameters_and_its_lines_are_shown(project: Path, capfd: pytest.CaptureFixture) -> None:
    write_notebook(project, LOOP, LAST)
    code, out, err = outcome(capfd, "00_try", "--profile", "tiny")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "00_try | profile tiny: started" and lines[-1].startswith("00_try | profile tiny: done in ")
    log = (project / "runs" / "tiny" / "paper.log").read_text().splitlines()
    assert [line[20:] for line in log] == lines and all(line[:19].count(":") == 2 for line in log)
    tenths = [f"00_try | PGD {n}/20 ({5 * n} %)" for n in range(2, 21, 2)]
    assert [line.partition(",")[0] for line in lines[1:-1]] == tenths
    stored = records.stage_path("tiny", "00_try").read_text()
    assert stored == str(["tiny", 7, ATTACK | {"best": False, "stop_when_broken": True}])
    assert records.read_json(project / "runs" / "tiny" / "00_try.time.json")["seconds"] > 0
    executed = nbformat.read(project / "runs" / "tiny" / "00_try.ipynb", as_version=4)
    assert "PGD 20/20" in "".join(output.text for output in executed.cells[2].outputs)


FAILURES = {
    "bad input": (
        "from ssl_robust.settings import BadInput; raise BadInput('No such mask; add it.')",
        2,
        "No such mask; add it.",
    ),
    "crash": (
        "1 / 0",
        1,
        "Notebook 00_try failed by ZeroDivisionError: division by zero; "
        "the full traceback is in runs/tiny/00_try.ipynb.",
    ),
    "full GPU": (
        "class OutOfMemoryError(RuntimeError): ...\nraise OutOfMemoryError('CUDA out of memory. Tried ...')",
        1,
        "There is too little memory for notebook 00_try (CUDA out of memory. Tried ); "
        "lower attack_batch, which changes no result, or batch in params/tiny.yaml and repeat.",
    ),
    "killed": (
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        138,
        "The kernel of notebook 00_try died, as where memory lacks; lower attack_batch, which changes no result, "
        "or batch in params/tiny.yaml and repeat, what was computed before is kept.",
    ),
    "no memory": (
        "raise MemoryError('Unable to allocate 4 TiB')",
        1,
        "There is too little memory for notebook 00_try (Unable to allocate 4 TiB); "
        "lower attack_batch, which changes no result, or batch in params/tiny.yaml and repeat.",
    ),
    "no words": (
        "raise KeyError",
        1,
        "Notebook 00_try failed by KeyError: no message; the full traceback is in runs/tiny/00_try.ipynb.",
    ),
    "no stage file": (
        "pass",
        2,
        "Notebook 00_try did not write results/tiny/00_try.json; let its last cell call records.finish.",
    ),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_failure_is_one_sentence_and_keeps_records(failure: str, project: Path, capfd: pytest.CaptureFixture) -> None:
    source, expected, sentence = FAILURES[failure]
    write_notebook(project, source)
    code, _, err = outcome(capfd, "00_try", "--profile", "tiny")
    assert (code, err) == (expected, sentence + "\n")
    assert not records.stage_path("tiny", "00_try").exists()
    assert len(records.read_records(records.results_dir("tiny"))) == 1
    assert (project / "runs" / "tiny" / "00_try.ipynb").is_file()


@pytest.mark.parametrize(
    ("change", "arguments", "words"),
    [
        ({"epsilon": 0.1}, (), ["Unknown parameter 'epsilon'"]),
        ({"attack": {"eps": "8/0"}}, (), ["attack.eps", "text '8/0'", "as a plain decimal"]),
        ({}, ("--profile", "nope"), ["no profile 'nope'", "choose one of: tiny"]),
        ({}, ("--data", "not/there"), ["data folder 'not/there' does not exist", "DATA=FOLDER"]),
        ({"data_root": "not/there"}, (), ["data folder 'not/there' does not exist"]),
        ({"attack": None}, (), ["needs the section 'attack'", "params/tiny.yaml"]),
    ],
)
def test_bad_profile_is_refused_before_anything_is_touched(
    change: dict, arguments: tuple[str, ...], words: list[str], project: Path, capfd: pytest.CaptureFixture
) -> None:
    write_notebook(project, "raise SystemExit")
    write_profile(project, PROFILE | change)
    code, _, err = outcome(capfd, "00_try", "--profile", "tiny", *arguments)
    assert code == 2 and err.count("\n") == 1 and err.endswith(".\n")
    assert [word for word in words if word not in err] == [], err
    assert records.read_json(records.stage_path("tiny", "00_try")) == {"old": True}
    assert not (project / "runs").exists()


def test_unknown_or_damaged_notebook_is_refused(project: Path) -> None:
    write_notebook(project)
    with pytest.raises(BadInput, match="no notebook '01_no'.*choose one of: 00_try"):
        run.declared(run.NOTEBOOKS / "01_no.ipynb")
    (run.NOTEBOOKS / "02_cut.ipynb").write_text('{"cells": [')
    with pytest.raises(BadInput, match="02_cut.ipynb is damaged"):
        run.declared(run.NOTEBOOKS / "02_cut.ipynb")
    nbformat.write(v4.new_notebook(), run.NOTEBOOKS / "03_bare.ipynb")
    with pytest.raises(BadInput, match="0 cells tagged"):
        run.declared(run.NOTEBOOKS / "03_bare.ipynb")


@pytest.mark.parametrize(
    ("cell", "names"),
    [
        ("seed = 0\nattack = {'eps': 1.0}", ["seed", "attack"]),
        ("seed: int = 0\nattack: dict[str, float] = {'eps': 1.0}\ndata_root: str", ["seed", "attack", "data_root"]),
        ("seed, attack = 0, {'eps': 1.0}\n(strong, device) = True, 'cpu'", ["seed", "attack", "strong", "device"]),
        ("seed = zero = 0", ["seed", "zero"]),
        ("'What they are.'\n# seed = 1\nseed = -1  # = 2\nattack = {'eps': 8 / 255}", ["seed", "attack"]),
        ("", []),
    ],
)
def test_names_of_a_parameters_cell(cell: str, names: list[str], project: Path) -> None:
    write_notebook(project, parameters=cell)
    assert run.declared(run.NOTEBOOKS / "00_try.ipynb") == names


@pytest.mark.parametrize(
    ("cell", "line"),
    [
        ("import os", 1), ("seed = 0\nprint(seed)", 2), ("seed = 0\nif seed:\n    attack = {}", 2),
        ("attack = {}\nattack['eps'] = 1.0", 2), ("seed = 0\nseed += 1", 2), ("eps = 0.1\nstep = eps / 4", 2),
        ("seed = int(0)", 1), ("def f():\n    pass", 1), ("seed = 0\n%matplotlib inline", 2), ("seed = ", 1),
    ],
)  # fmt: skip
def test_a_parameters_cell_that_does_more_is_refused(
    cell: str, line: int, project: Path, capfd: pytest.CaptureFixture
) -> None:
    write_notebook(project, parameters=cell)
    code, _, err = outcome(capfd, "00_try", "--profile", "tiny")
    assert code == 2 and err.startswith("The parameters cell of notebooks/00_try.ipynb ") and f"line {line};" in err
    assert err.count("\n") == 1


def test_annotated_parameters_reach_the_notebook(project: Path, capfd: pytest.CaptureFixture) -> None:
    cell = "profile: str = 'demo'\nseed: int = 0\nattack: dict = {'eps': 1.0, 'steps': 1}"
    write_notebook(project, LAST, parameters=cell)
    assert outcome(capfd, "00_try", "--profile", "tiny")[0] == 0
    stored = records.stage_path("tiny", "00_try").read_text()
    assert stored == str(["tiny", 7, ATTACK | {"best": False, "stop_when_broken": True}])


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_a_terminal_that_lacks_signs_does_not_end_the_run(encoding: str, project: Path) -> None:
    write_notebook(project, "print('0.84 ± 0.05 †')", LAST)
    program = (
        "import pathlib, sys; from ssl_robust.ops import run; here = pathlib.Path(sys.argv[1])\n"
        "run.NOTEBOOKS, run.PARAMS = here / 'notebooks', here / 'params'\n"
        "sys.exit(run.main(['00_try', '--profile', 'tiny']))"
    )
    environment = os.environ | {"PYTHONIOENCODING": encoding, "LC_ALL": "C"}
    done = subprocess.run([sys.executable, "-c", program, project], env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    written = "0.84 ± 0.05 †".encode(encoding, errors="backslashreplace")
    assert b"00_try | " + written + b"\n" in done.stdout and not done.stderr


@pytest.mark.parametrize("module", ["ops.run", "ops.grid", "ops.fetch", "ops.launch", "ops.explain"])
def test_every_command_prints_what_the_terminal_lacks_in_another_way(
    module: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    monkeypatch.setattr(sys, "stdout", stream)
    command = importlib.import_module(f"ssl_robust.{module}")
    arguments = {"ops.run": ["--check"], "ops.grid": ["--executor", "local"], "ops.explain": ["table1/a/b/c/d"]}.get(
        module, []
    )
    command.main(["--profile", "nope", *arguments])
    assert stream.errors == "backslashreplace"


def test_what_cannot_be_loaded_is_one_sentence(
    project: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error in (ImportError("libtorch.so: failed to map segment from shared object"), MemoryError()):
        monkeypatch.setattr(run, "everything_wrong", lambda settings, error=error: (_ for _ in ()).throw(error))
        code, _, err = outcome(capfd, "--check", "--profile", "tiny")
        assert code == 1 and "; give it more memory, or delete .venv" in err and err.count("\n") == 1


def test_data_folder_is_made_absolute(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "images").mkdir()
    monkeypatch.chdir(project / "notebooks")
    assert run.read_profile("tiny", "../images").data_root == str(project / "images")
    write_profile(project, PROFILE | {"data_root": "images"})
    assert run.read_profile("tiny").data_root == str(project / "images")


def test_check_lists_all_missing_things(
    project: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ssl_robust import encoders

    monkeypatch.setattr(data, "check", lambda settings: ["No cifar10.", "No voc."])
    monkeypatch.setattr(encoders, "check", lambda settings: [f"No weights of {settings.encoders[0].name}."])
    said = "No cifar10.\nNo voc.\nNo weights of embedded_vit.\n"
    assert outcome(capfd, "--check", "--profile", "tiny")[::2] == (2, said)
    monkeypatch.setattr(data, "check", lambda settings: [])
    monkeypatch.setattr(encoders, "check", lambda settings: [])
    assert outcome(capfd, "--check", "--profile", "tiny")[::2] == (0, "")


def test_check_lists_parameters_of_every_section(project: Path, capfd: pytest.CaptureFixture) -> None:
    wrong = {"attack": {"eps": "300/255"}, "seed": -1, "epsilon": 0.1, "encoders": [{"name": "a/b"}]}
    write_profile(project, PROFILE | wrong)
    for flag in ("--check", "--plan"):
        code, out, err = outcome(capfd, flag, "--profile", "tiny")
        assert (code, out) == (2, "") and err.count("\n") == 4
        assert all(word in err for word in ("attack.eps", "'seed'", "'epsilon'", "'encoders.0.name'"))
    assert outcome(capfd, "--plan", "--profile", "nope")[2].startswith("There is no profile 'nope'")


def test_check_lists_folder_sections_and_data_together_and_skipped_ones_as_warnings(
    project: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:

    monkeypatch.setattr(data, "check", lambda settings: [f"No cifar10 in {settings.data_root}."])
    write_notebook(project)
    write_profile(project, PROFILE | {"attack": None})
    code, out, err = outcome(capfd, "--check", "--profile", "tiny", "--data", "not/there")
    assert (code, out) == (2, "") and [line.split(";")[0] for line in err.splitlines()] == [
        "The data folder 'not/there' does not exist",
        "Notebook 00_try needs the section 'attack'",
        "No cifar10 in not/there.",
    ]
    write_profile(project, PROFILE | {"missing": "skip"})
    code, out, err = outcome(capfd, "--check", "--profile", "tiny")
    assert (code, err) == (0, "") and out.startswith("Warning: No cifar10 in .\n")


def test_plan_is_printed_and_nothing_is_run(
    project: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:

    monkeypatch.setattr(data, "check", lambda settings: ["No cifar10; get it."])
    write_notebook(project, "raise SystemExit")
    code, out, err = outcome(capfd, "--plan", "--profile", "tiny")
    assert (code, err) == (0, "") and out.startswith("Plan of profile tiny; nothing is run.")
    assert out.endswith("Missing:\n- No cifar10; get it.\n") and not (project / "runs" / "tiny").exists()


@pytest.mark.parametrize("arguments", [(), ("00_try", "--check"), ("--plan", "--check")])
def test_one_thing_is_asked_for(arguments: tuple[str, ...], capfd: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        run.main([*arguments])
    assert "name a notebook, or give --check or --plan" in capfd.readouterr().err


def test_progress_estimates_and_keeps_quiet_when_short(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(progress.track(range(50), desc="quick")) == list(range(50))
    assert capsys.readouterr().out == ""
    clock = iter(range(0, 10_000, 2))  # every item takes two seconds
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    assert len(list(progress.track((i for i in range(100)), total=100, desc="slow"))) == 100
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "slow 10/100 (10 %), about 3 min left"
    assert lines[8:] == ["slow 90/100 (90 %), about 20 s left", "slow 100/100 (100 %), took 3 min"]
    assert len(list(progress.track(i for i in range(100)))) == 100 and capsys.readouterr().out == ""


# ---- Makefile: a copy of the tree with empty files, where a script stands in for Python ----

ATTACKS = ["03_attack_classification", "04_attack_segmentation", "05_attack_depth"]
STAGES = ["00_data", "01_heads", "02_deacl", *ATTACKS, "06_figures", "07_sanity"]
FAKE_PYTHON = """#!/bin/sh
for last; do :; done
case "$*" in *ssl_robust.ops.stages*)
  for stage in STAGES; do [ -e results/demo/$stage.json ] || printf '%s ' $stage; done; exit 0 ;; esac
case $last in 0*) ;; *) exit 0 ;; esac
echo "start $last" >> log; sleep 0.2
if [ -e "fail_$last" ]; then exit 1; fi
echo '{}' > "results/demo/$last.json"; echo "end $last" >> log
""".replace("STAGES", " ".join(STAGES))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Everything made; the stand-in for Python says that a stage is done if its file in results/demo is there."""
    package = [f"ssl_robust/{p.name}" for p in (PROJECT / "ssl_robust").iterdir() if p.is_file()]
    sources = ["requirements.lock", "params/demo.yaml", *package, *(f"notebooks/{s}.ipynb" for s in STAGES)]
    for name in [*sources, ".venv/.ready", "figures/demo/table1.csv", *(f"results/demo/{s}.json" for s in STAGES)]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n")
    (tmp_path / "Makefile").write_text((PROJECT / "Makefile").read_text())
    (tmp_path / "python").write_text(FAKE_PYTHON)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def make(tree: Path, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess:
    command = ["make", "PY=./python", "STAMP=.venv/.ready", *arguments]
    outer = ("MAKEFLAGS", "MAKELEVEL", "PROFILE", "DATA", "CLUSTER", "NAME", "CELL", "LAB")  # of `make test` itself
    environment = {k: v for k, v in os.environ.items() if k not in outer}
    return subprocess.run(command, cwd=tree, env=environment, input=stdin, capture_output=True, text=True, check=False)


def would_run(tree: Path, *arguments: str) -> list[str]:
    """Numbers of the notebooks that make would execute."""
    done = make(tree, "-n", *arguments)
    assert done.returncode == 0, done.stderr
    last_words = [line.split()[-1] for line in done.stdout.splitlines() if "ssl_robust.ops.run" in line]
    return sorted(word[:2] for word in last_words if word != "--check")


@pytest.mark.parametrize(
    "touched", ["notebooks/04_attack_segmentation.ipynb", "params/demo.yaml", "ssl_robust/attacks.py", ".venv/.ready"]
)
@pytest.mark.parametrize("hours", [-2, 0, 2])
def test_times_of_files_do_not_matter(touched: str, hours: int, tree: Path) -> None:
    now = time.time() + 3600 * hours
    os.utime(tree / touched, (now, now))
    assert would_run(tree, "paper") == []


@pytest.mark.parametrize("target", ["paper", "table1", "table2", "table3", "fig1"])
def test_make_runs_those_stages_of_a_target_that_are_not_done(target: str, tree: Path) -> None:
    needed = {"table1": "03", "table2": "04", "table3": "05"}.get(target)
    for undone in (["00_data"], ["02_deacl", "05_attack_depth"], ["04_attack_segmentation", "06_figures"], STAGES):
        for stage in STAGES:
            path = tree / f"results/demo/{stage}.json"
            path.unlink(missing_ok=True) if stage in undone else path.write_text("")
        last = {"paper": "07", "fig1": "07"}.get(target)  # whose checks decide what has a dagger
        expected = [s[:2] for s in undone if (s[:2] <= last if last else s[:2] in ("00", "01", "02", needed))]
        assert would_run(tree, target) == expected, undone
        assert not (tree / "log").exists()


ODD = ["my  data", "it's mine", 'a"b', "a;touch F", "50% off", "däta", "a$b", "$(shell touch F)", "`touch F`", "a,b)(c",
       "a#b", "';touch F;'", '";touch F;"', "a|b", "a&b", "*", "~"]  # fmt: skip


@pytest.mark.parametrize("data", ODD)
def test_data_with_any_name_is_passed_on_letter_by_letter(data: str, tree: Path) -> None:
    (tree / "python").write_text(
        '#!/bin/sh\nfor word; do printf "%s|" "$word" >> said; done; echo >> said\n'
        'case "$*" in *ssl_robust.ops.stages*) echo 03_attack_classification ;; esac\n'
    )
    for given in (data, f"{data}/"):
        for words, told in ((("plan",), 1), (("-n", "paper"), 1), (("paper",), 3)):
            (tree / "said").unlink(missing_ok=True)
            before = set(tree.iterdir())
            assert make(tree, *words, f"DATA={given}").returncode == 0
            said = (tree / "said").read_text().splitlines()
            assert len(said) == told, words
            assert all(f"|--data|{data}|" in line for line in said if "ssl_robust.show.report" not in line), said
            assert set(tree.iterdir()) - before == {tree / "said"} and not (tree / "runs").exists()


def test_other_words_are_passed_on_letter_by_letter(tree: Path) -> None:
    (tree / "python").write_text('#!/bin/sh\nprintf "%s|" "$@"\n')
    odd = "a'b\"c;touch F$(touch F)"
    assert make(tree, "explain", f"CELL={odd}").stdout.endswith(f"|demo|{odd}|")
    assert make(tree, "notebook", f"NAME={odd}").stdout.endswith(f"||{odd}|")
    assert f"|--cluster|{odd}|" in make(tree, "paper", "EXECUTOR=local", f"CLUSTER={odd}", f"DATA={odd}").stdout
    assert not (tree / "F").exists()


def test_make_in_parallel_and_after_a_failure(tree: Path) -> None:
    for stage in STAGES:
        (tree / f"results/demo/{stage}.json").unlink()
    (tree / "fail_04_attack_segmentation").touch()
    assert make(tree, "-j2", "paper").returncode == 2
    assert not (tree / "results/demo/04_attack_segmentation.json").exists()
    log = (tree / "log").read_text().splitlines()
    assert log[:2] == ["start 00_data", "end 00_data"] and set(log[2:4]) == {"start 01_heads", "start 02_deacl"}
    assert set(log[6:8]) == {"start 05_attack_depth", "start 04_attack_segmentation"}
    (tree / "fail_04_attack_segmentation").unlink()
    (tree / "log").unlink()
    assert make(tree, "-j2", "paper").returncode == 0
    log = (tree / "log").read_text().splitlines()
    assert "start 04_attack_segmentation" in log and "start 05_attack_depth" not in log
    assert {line.split()[1] for line in log[-4:]} == {"06_figures", "07_sanity"}


def side_by_side(tree: Path, *arguments: str) -> int:
    """How many notebooks ran at the same time at most."""
    for stage in STAGES:
        (tree / f"results/demo/{stage}.json").unlink(missing_ok=True)
    (tree / "log").unlink(missing_ok=True)
    assert make(tree, *arguments).returncode == 0
    running = [0]
    for line in (tree / "log").read_text().splitlines():
        running.append(running[-1] + (1 if line.startswith("start") else -1))
    return max(running)


def test_two_notebooks_run_side_by_side_unless_a_number_says_otherwise(tree: Path) -> None:
    assert side_by_side(tree, "paper", "AT_ONCE=2") == 2
    assert side_by_side(tree, "table1", "table3", "AT_ONCE=2") == 2
    assert side_by_side(tree, "paper", "AT_ONCE=1") == 1
    assert side_by_side(tree, "-j3", "paper", "AT_ONCE=1") == 3  # make's own option comes first
    for wrong in ("x", "0", "00", "-1", "1 2", "", '"; touch F; "', "$(shell touch F)"):
        refused = make(tree, "paper", f"AT_ONCE={wrong}")
        assert refused.returncode == 2 and "AT_ONCE must be a number of notebooks" in refused.stderr
    assert not (tree / "F").exists()


JOBS = """case "$*" in *ssl_robust.ops.grid*) echo "$@" >> log; exit $(cat code) ;; esac
case $last in 0*)"""


def test_make_paper_by_jobs_goes_on_to_the_notebooks_when_all_are_there(tree: Path) -> None:
    (tree / "python").write_text(FAKE_PYTHON.replace("case $last in 0*)", JOBS, 1))
    (tree / "results/demo/05_attack_depth.json").unlink()
    log = tree / "log"
    for code, expected in (("3", 0), ("1", 2), ("2", 2)):
        (tree / "code").write_text(code)
        done = make(tree, "paper", "EXECUTOR=slurm", "CLUSTER=mine", "DATA=my $images")
        assert done.returncode == expected and "attack_depth" not in log.read_text()
    asked = "-m ssl_robust.ops.grid --profile demo --data my $images --executor slurm --cluster mine"
    assert log.read_text().splitlines()[-1] == asked
    (tree / "code").write_text("0")
    assert make(tree, "paper", "EXECUTOR=local", "DATA=my $images", "AT_ONCE=1").returncode == 0
    lines = log.read_text().splitlines()
    at = lines.index(f"{asked.partition(' slurm')[0]} local --cluster local")
    assert lines[at + 1 :] == ["start 05_attack_depth", "end 05_attack_depth"]
    refused = make(tree, "paper", "EXECUTOR=slrum")
    assert refused.returncode == 2 and "EXECUTOR must be local or slurm" in refused.stderr


def test_make_explain_wants_a_cell(tree: Path) -> None:
    (tree / "python").write_text('#!/bin/sh\necho "$@"\n')
    refused = make(tree, "explain")
    assert refused.returncode == 2 and refused.stderr.startswith("CELL is empty; write for example: make explain CELL=")
    said = make(tree, "explain", "CELL=table1/a/b/deacl/task").stdout
    assert said == "-m ssl_robust.ops.explain --profile demo table1/a/b/deacl/task\n"
    assert make(tree, "bench").stdout == "benchmarks/contenders.py\n"


def test_make_clean_asks_and_says_what_goes(tree: Path) -> None:
    (tree / "runs/demo/cells").mkdir(parents=True)
    assert "Nothing deleted" in make(tree, "clean", stdin="n\n").stdout and (tree / "results/demo").is_dir()
    assert "Nothing deleted" in make(tree, "clean").stdout and (tree / "results/demo").is_dir()
    (tree / "results/other").mkdir()
    done = make(tree, "clean", "YES=1")
    assert done.returncode == 0 and "runs/demo/cells\n" in done.stdout and "Deleted results/demo" in done.stdout
    assert not (tree / "results/demo").exists() and not (tree / "runs/demo").exists()
    assert (tree / "results/other").is_dir() and (tree / "figures/demo").is_dir()
    assert make(tree, "clean", "YES=1").returncode == 0


@pytest.mark.parametrize(
    "profile", ["", "a b", "../params", "demo/..", "-n", "%", "te*", "~", "a;b", "$(shell touch F)"]
)
def test_make_refuses_a_profile_that_is_no_name(profile: str, tree: Path) -> None:
    done = make(tree, "clean", "YES=1", f"PROFILE={profile}")
    assert done.returncode == 2 and "PROFILE must be one name" in done.stderr
    assert (tree / "results/demo").is_dir() and not (tree / "F").exists()


def test_make_works_in_its_own_folder(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    done = make(elsewhere, "-f", str(tree / "Makefile"), "paper")
    assert done.returncode == 2 and "works in its own folder; write for example make -C FOLDER paper" in done.stderr
    assert make(elsewhere, "-C", str(tree), "-n", "paper").returncode == 0 and not [*elsewhere.iterdir()]


def test_make_help_is_the_default_and_lists_every_target(tree: Path) -> None:
    listed = make(tree).stdout
    asked = {
        "help",
        "env",
        "plan",
        "data",
        "notebook",
        "paper",
        "table1",
        "table2",
        "table3",
        "fig1",
        "fig2",
        "lab",
        "test",
        "clean",
        "encoder",
        "explain",
        "keep",
        "bench",
    }
    assert asked - set(listed.split()) == set()


def test_make_passes_profile_and_data_on(tree: Path) -> None:
    (tree / "python").write_text('#!/bin/sh\necho "$@"\n')
    (tree / "params/other.yaml").touch()
    where = ["PROFILE=other", "DATA=my images"]
    assert make(tree, "plan", *where).stdout == "-m ssl_robust.ops.run --profile other --data my images --plan\n"
    assert make(tree, "data", *where).stdout == "-m ssl_robust.ops.fetch --profile other --data my images\n"
    said = make(tree, "notebook", "NAME=appendix_protocols", *where).stdout.splitlines()
    ask = "-m ssl_robust.ops.run --profile other --data my images "
    assert said == [ask + "--check", ask + "appendix_protocols"]
    refused = make(tree, "notebook", *where)
    assert refused.returncode == 2 and refused.stderr.startswith(
        "NAME is empty; write for example: make notebook NAME="
    )


def test_make_stops_before_any_notebook_where_something_is_wrong(tree: Path) -> None:
    (tree / "python").write_text('#!/bin/sh\necho "$@" >> log\ncase "$*" in *ssl_robust.ops.stages*) exit 2 ;; esac\n')
    for words in (("-j2", "paper"), ("-n", "table1")):
        assert make(tree, *words).returncode == 2
        assert set((tree / "log").read_text().splitlines()) == {"-m ssl_robust.ops.stages --profile demo --data "}


def test_make_wants_a_recent_python(tree: Path) -> None:
    (tree / ".venv/.ready").unlink()
    (tree / "requirements.lock").touch()
    for wrong in ("python-that-is-not-there", "false"):
        done = make(tree, "env", f"PYTHON={wrong}")
        assert done.returncode == 2 and done.stderr.startswith(f"{wrong} is not Python 3.11 or later")
        assert not (tree / ".venv/bin").exists()


def test_without_a_gpu_torch_for_cpus_is_installed_where_it_can_be_had(tree: Path) -> None:
    fake, lock = tree / ".venv/bin/python", tree / "requirements.lock"
    lock.write_text("nvidia-nccl-cu13==2 ; x\ncuda-toolkit==1\ntorch==2.15.0\ntriton==3\ntqdm==4\n")
    fake.parent.mkdir(parents=True)

    def installed(reached: bool, torch: str) -> tuple[list[str], str]:
        (tree / ".venv/.ready").unlink(missing_ok=True)
        (tree / "log").unlink(missing_ok=True)
        fails = "" if reached else 'case "$*" in *torch-backend*) exit 1 ;; esac\n'
        fake.write_text(f'#!/bin/sh\necho "$@" >> log\n{fails}')
        fake.chmod(0o755)
        done = make(tree, "env", f"TORCH={torch}", f"PYTHON={sys.executable}")
        assert done.returncode == 0 and (tree / ".venv/.ready").is_file(), done.stderr
        lines = [line for line in (tree / "log").read_text().splitlines() if "-r " in line]
        return [line.partition("--python .venv/bin/python ")[2] for line in lines], done.stdout

    cpu, full = "--torch-backend cpu -r .venv/cpu.lock", "-r requirements.lock"
    assert installed(True, "cpu")[0] == [cpu] and "torch for CPUs" in installed(True, "cpu")[1]
    assert (tree / ".venv/cpu.lock").read_text() == "torch==2.15.0\ntqdm==4\n"
    assert installed(False, "cpu")[0] == [cpu, full] and "cannot be had" in installed(False, "cpu")[1]
    assert installed(True, "cuda")[0] == [full] and "cannot be had" not in installed(True, "cuda")[1]
    for wrong in ("", "gpu", "cpu cuda"):
        refused = make(tree, "env", f"TORCH={wrong}")
        assert refused.returncode == 2 and "TORCH must be cpu or cuda" in refused.stderr


def test_make_paper_says_that_a_profile_does_not_exist() -> None:
    """With the real runner, in the real tree."""
    done = make(PROJECT, f"PY={sys.executable}", "STAMP=", "paper", "PROFILE=nope")
    assert done.returncode == 2 and done.stderr.startswith("There is no profile 'nope'"), done.stderr
    assert "Traceback" not in done.stderr and "No rule" not in done.stderr
    assert not (PROJECT / "runs" / "nope").exists()


def test_progress_counts_what_the_items_hold(monkeypatch, capsys):
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0)
    assert list(progress.track(["ab", "c"], total=3, desc="letters", size=len)) == ["ab", "c"]
    assert [line.split(",")[0] for line in capsys.readouterr().out.splitlines()] == [
        "letters 2/3 (66 %)",
        "letters 3/3 (100 %)",
    ]
