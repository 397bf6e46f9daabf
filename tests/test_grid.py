"""The grid as jobs: what is missing, processes of this machine, a Slurm cluster that scripts stand in for."""

import os
import pickle
import re
import time
from pathlib import Path

import planted
import pytest
import submitit
import yaml

from ssl_robust import attacks, evaluate, records
from ssl_robust.ops import grid, run
from ssl_robust.settings import BadInput, Sanity
from ssl_robust.show import examples
from ssl_robust.trust import sanity

SECTION = {"datasets": ["scenes"], "n_train": 12, "n_val": 6, "n_test": 4, "epochs": 1, "batch": 6, "lr": 0.01}
PROFILE = {
    "profile": "tiny",
    "device": "cpu",
    "precision": "fp32",
    "encoders": [{"name": "embedded_vit"}],
    "classification": SECTION,
    "attack": {"steps": 1},
    "sanity": {"n": 2, "more_steps": 1, "restarts": 1, "eps": [0.0, 0.25]},
}
FIELDS = {"partition": "gpu", "account": "vision", "gpus": 1, "deacl_gpus": 4, "cpus": 6, "memory": 32, "hours": 1.5}
FIELDS |= {"setup": ["module load cuda"]}
NEEDS = {"deacl a": [], "head 1": [], "cell 1": ["head 1"], "head 2": ["deacl a"], "cell 2": ["head 2"]}


def jobs(*names: str) -> list[dict]:
    """Some of NEEDS, in its order; what is not among them is there already."""
    return [
        {"name": n, "step": n.split()[0], "encoder": "a", "needs": [b for b in needs if b in names]}
        for n, needs in NEEDS.items()
        if n in names
    ]


@pytest.fixture
def project(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the profile 'tiny' and the cluster files 'local' and 'slurm'."""
    monkeypatch.setattr(run, "PARAMS", root / "params")
    for name in ("OMP_NUM_THREADS", "SSL_ROBUST_HEADLESS", *run.CHILDREN):  # main sets them; put back afterwards
        monkeypatch.setenv(name, "1")
    (root / "params" / "cluster").mkdir(parents=True)
    (root / "params" / "tiny.yaml").write_text(yaml.safe_dump(PROFILE))
    write_cluster(root, "slurm", FIELDS)
    write_cluster(root, "local", {"at_once": 2})
    return root


def write_cluster(root: Path, name: str, fields: dict) -> None:
    (root / "params" / "cluster" / f"{name}.yaml").write_text(yaml.safe_dump(fields))


@pytest.fixture
def wanted(project: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """The jobs that are missing, changed in place by a test; in a job's process little is done, and noted in a file."""
    listed = jobs(*NEEDS)

    def work(job: dict, settings: object) -> str:  # inside, so that jobs get it by value
        log, start = project / "times", time.time()
        with log.open("a") as file:
            file.write(f"{job['name']},start,{start},{os.environ['OMP_NUM_THREADS']}\n")
        time.sleep(1.0)
        if (project / f"fail {job['name']}").exists():
            raise BadInput(f"No mask for {job['name']}; add it.")
        with log.open("a") as file:
            file.write(f"{job['name']},end,{time.time()},\n")
        return ""

    monkeypatch.setattr(grid, "work", work)
    monkeypatch.setattr(grid, "missing", lambda settings: (listed, 7, []))
    return listed


def outcome(capfd: pytest.CaptureFixture, executor: str, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command line."""
    code = grid.main(["--profile", "tiny", "--executor", executor, *arguments])
    printed = capfd.readouterr()
    return code, printed.out, printed.err


def book() -> dict:
    path = records.ROOT / "runs" / "tiny" / "grid" / "jobs.json"
    return records.read_json(path) if path.is_file() else {}


# ---- processes of this machine ----


def test_two_jobs_run_at_once_and_each_after_what_it_needs(
    project: Path, wanted: list[dict], capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid.torch, "get_num_threads", lambda: 6)
    code, out, err = outcome(capfd, "local")
    assert (code, err) == (0, "") and out.endswith("grid | profile tiny: all 12 results are there\n")
    assert book() == {}
    rows = [line.split(",") for line in (project / "times").read_text().splitlines()]
    times = {(name, word): float(at) for name, word, at, _ in rows}
    assert {threads for *_, threads in rows} == {"3", ""}  # six threads shared by two
    for name, needs in NEEDS.items():
        assert all(times[need, "end"] <= times[name, "start"] for need in needs)
    running = [sum(times[n, "start"] <= at < times[n, "end"] for n in NEEDS) for at in times.values()]
    assert max(running) == 2
    assert times["head 1", "start"] < times["deacl a", "end"]  # it waits for nothing


def test_failed_job_is_listed_and_taken_up_again(
    project: Path, wanted: list[dict], capfd: pytest.CaptureFixture
) -> None:
    wanted[:] = jobs("head 1", "cell 1")
    (project / "fail head 1").touch()
    code, out, err = outcome(capfd, "local")
    log = book()["head 1"]["log"]
    assert code == 1 and err == "2 of 2 jobs made no result; see the logs above, then call again.\n"
    assert f"grid | head 1 | FAILED: No mask for head 1; add it. | {log}\n" in out
    assert "grid | cell 1 | not started, because 'head 1' failed\n" in out
    assert "No mask for head 1" in (project / log).read_text()
    assert "cell 1" not in (project / "times").read_text() and list(book()) == ["head 1"]
    (project / "fail head 1").unlink()
    code, out, _ = outcome(capfd, "local")
    assert code == 0 and f"grid | head 1 | FAILED: No mask for head 1; add it. | {log} | taken up again\n" in out
    assert book() == {} and (project / "times").read_text().count("start") == 3


def test_no_job_is_started_twice_while_its_process_runs(
    project: Path, wanted: list[dict], capfd: pytest.CaptureFixture
) -> None:
    place = grid._new_folder("tiny")
    handle = submitit.LocalExecutor(place).submit(grid.noted, grid.work, wanted[1], None, str(place))
    grid._write_book({"head 1": grid._entry(handle, "local", [])}, "tiny")
    for executor in grid.EXECUTORS:
        code, _, err = outcome(capfd, executor)
        assert code == 2 and err == (
            f"'head 1' of an earlier call still runs or waits (process {handle.job_id}); wait for it or end it first.\n"
        )
    handle.wait()
    assert grid._states(book())["head 1"] == ("COMPLETED", "")


def test_killed_process_is_listed_as_interrupted(wanted: list[dict], project: Path) -> None:
    handle = submitit.LocalExecutor(grid._new_folder("tiny")).submit(grid.work, wanted[1], None)
    handle._process.kill()
    handle._process.wait()
    assert grid._states({"head 1": grid._entry(handle, "local", [])})["head 1"] == ("INTERRUPTED", "")


def test_neighbours_take_different_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(grid.torch.cuda, "device_count", lambda: 4)
    assert [grid._gpus(place, 1, "auto") for place in (0, 1, 5)] == [[0], [1], [1]]
    assert [grid._gpus(place, 2, "cuda") for place in (0, 1, 2)] == [[0, 1], [2, 3], [0, 1]]
    assert grid._gpus(0, 8, "auto") == [0, 1, 2, 3] and grid._gpus(0, 1, "cpu") == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert grid._gpus(1, 1, "auto") == [5]


# ---- a Slurm cluster ----

SCRIPTS = {
    "sbatch": """n=$(($(cat next) + 1)); echo $n > next
if [ -e refuse_$n ]; then echo "invalid partition" >&2; exit 1; fi
cp "$1" $n.sh; echo "Submitted batch job $n"
""",
    "squeue": "cat queue",
    "sacct": 'echo "JobID|State|NodeList"; cat accounts',
    "scancel": 'echo "$@" >> cancelled',
    "srun": "",
}


@pytest.fixture
def slurm(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of commands that note down what they are asked: N.sh is the file of job N."""
    place = project / "slurm"
    place.mkdir()
    for name, lines in SCRIPTS.items():
        (place / name).write_text(f"#!/bin/sh\ncd {place}\n{lines}")
        (place / name).chmod(0o755)
    (place / "next").write_text("100")
    for name in ("queue", "accounts"):
        (place / name).touch()
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
    monkeypatch.setattr(submitit.SlurmJob, "watcher", type(submitit.SlurmJob.watcher)())
    return place


def account(slurm: Path, **states: str) -> None:
    """What sacct says from now on: job100='FAILED'."""
    (slurm / "accounts").write_text("".join(f"{name[3:]}|{state}|node1\n" for name, state in states.items()))


def asked(slurm: Path, number: int) -> dict[str, str]:
    """The #SBATCH lines of a submitted file."""
    return dict(re.findall(r"^#SBATCH --([a-z-]+)=(.*)$", (slurm / f"{number}.sh").read_text(), re.MULTILINE))


def test_one_slurm_job_for_each_missing_result(
    slurm: Path, wanted: list[dict], capfd: pytest.CaptureFixture, project: Path
) -> None:
    code, out, err = outcome(capfd, "slurm")
    assert (code, err) == (3, "") and len(list(slurm.glob("*.sh"))) == 5
    assert "5 jobs wait or run; call again" in out
    ids = {name: entry["id"] for name, entry in book().items()}
    assert ids == {name: str(101 + i) for i, name in enumerate(NEEDS)}
    entry = book()["cell 1"]
    assert f"grid | job 103 | cell 1 | submitted | {entry['log']}\n" in out
    assert entry["executor"] == "slurm" and (project / entry["log"]).parent.is_dir()
    tuning, cell = asked(slurm, 101), asked(slurm, 103)
    assert tuning["gpus-per-node"] == "4" and cell["gpus-per-node"] == "1"
    expected = {"partition": "gpu", "account": "vision", "time": "90", "mem": "32GB", "cpus-per-task": "6"}
    assert expected.items() <= cell.items() and cell["job-name"] == "cell-1"
    depends = [asked(slurm, number).get("dependency") for number in range(101, 106)]
    assert depends == [None, None, "afterok:102", "afterok:101", "afterok:104"]
    assert asked(slurm, 105)["kill-on-invalid-dep"] == "yes"
    text = (slurm / "103.sh").read_text()
    assert "\nmodule load cuda\n" in text and "--cpus-per-task 6" in text and "submitit.core._submit" in text


def test_second_call_submits_only_what_failed(slurm: Path, wanted: list[dict], capfd: pytest.CaptureFixture) -> None:
    outcome(capfd, "slurm")
    log = book()["head 1"]["log"]
    account(slurm, job101="COMPLETED", job102="TIMEOUT", job103="CANCELLED by 0", job104="RUNNING", job105="PENDING")
    wanted[:] = jobs("head 1", "cell 1", "head 2", "cell 2")  # the encoder is made
    code, out, _ = outcome(capfd, "slurm")
    assert code == 3 and sorted(path.stem for path in slurm.glob("1*.sh")) == [str(n) for n in range(101, 108)]
    assert f"grid | job 102 | head 1 | TIMEOUT | {log}\n" in out and "grid | job 103 | cell 1 | CANCELLED | " in out
    assert "grid | job 104 | head 2 | RUNNING | " in out and "grid | job 105 | cell 2 | PENDING | " in out
    assert asked(slurm, 107)["dependency"] == "afterok:106" and not (slurm / "cancelled").exists()
    assert "deacl a" not in book() and book()["head 1"]["id"] == "106"
    wanted[:] = []
    code, out, _ = outcome(capfd, "slurm")
    assert code == 0 and "all 7 results are there" in out and book() == {}


@pytest.mark.parametrize("state", ["FAILED", "PREEMPTED", "OUT_OF_MEMORY", "NODE_FAIL", "CANCELLED by 7", "COMPLETED"])
def test_job_that_ended_without_its_result_is_submitted_again(
    state: str, slurm: Path, wanted: list[dict], capfd: pytest.CaptureFixture
) -> None:
    wanted[:] = jobs("head 1")
    outcome(capfd, "slurm")
    account(slurm, job101=state)
    code, out, _ = outcome(capfd, "slurm")
    assert code == 3 and book()["head 1"]["id"] == "102"
    assert f"job 101 | head 1 | {state.split()[0]}" in out
    assert ("parameters, data or code have changed" in out) == (state == "COMPLETED")


@pytest.mark.parametrize(("accounts", "queued"), [("", True), ("101|PREEMPTED|n\n", True), ("", False)])
def test_queue_is_asked_where_accounting_knows_nothing(
    accounts: str, queued: bool, slurm: Path, wanted: list[dict], capfd: pytest.CaptureFixture
) -> None:
    wanted[:] = jobs("head 1")
    outcome(capfd, "slurm")
    (slurm / "accounts").write_text(accounts)
    (slurm / "queue").write_text("101\n" if queued else "9\n")
    code, out, _ = outcome(capfd, "slurm")
    assert code == 3 and (book()["head 1"]["id"] == "101") == queued
    assert ("LOST" in out) == (not queued)


BUSY = 'echo "slurm_load_jobs error: Socket timed out on send/recv operation" >&2; exit 1'
OLD = "echo \"squeue: unrecognized option '--me'\" >&2; exit 1"


@pytest.mark.parametrize(
    ("squeue", "words"),
    [
        (BUSY, "(slurm_load_jobs error: Socket timed out on send/recv operation)"),
        ("exit 3", "(exit code 3)"),
        ('echo "Welcome to the cluster"', "(Welcome to the cluster)"),
    ],
)
def test_nothing_is_submitted_while_the_queue_is_not_known(
    squeue: str, words: str, slurm: Path, wanted: list[dict], capfd: pytest.CaptureFixture
) -> None:
    outcome(capfd, "slurm")
    before = book()
    (slurm / "sacct").write_text("#!/bin/sh\nexit 1\n")  # no accounting
    (slurm / "squeue").write_text(f"#!/bin/sh\n{squeue}\n")
    for executor in grid.EXECUTORS:
        code, _, err = outcome(capfd, executor)
        assert code == 2 and words in err and err.endswith("; nothing was submitted, repeat when it answers.\n")
        assert err.count("\n") == 1
    assert book() == before and len(list(slurm.glob("*.sh"))) == 5
    (slurm / "squeue").write_text(f"#!/bin/sh\ncase \"$*\" in *--me*) {OLD} ;; esac\nseq 101 105\necho '7_[1-3]'\n")
    code, out, _ = outcome(capfd, "slurm")
    assert code == 3 and out.count("| PENDING |") == 5 and len(list(slurm.glob("*.sh"))) == 5


@pytest.mark.parametrize("sacct", ["echo Hello; echo World", "echo 'accounting storage is disabled' >&2; exit 1", ""])
def test_accounting_that_answers_otherwise_is_none(
    sacct: str, slurm: Path, wanted: list[dict], capfd: pytest.CaptureFixture
) -> None:
    wanted[:] = jobs("head 1", "cell 1")
    outcome(capfd, "slurm")
    (slurm / "sacct").write_text(f"#!/bin/sh\n{sacct}\n")
    (slurm / "queue").write_text("102\n")
    code, out, _ = outcome(capfd, "slurm")
    assert code == 3 and "job 101 | head 1 | LOST | " in out and "job 102 | cell 1 | PENDING | " in out
    assert book()["head 1"]["id"] == "103"


def test_number_of_a_job_is_found_among_other_words(
    slurm: Path, wanted: list[dict], capfd: pytest.CaptureFixture
) -> None:
    wanted[:] = jobs("head 1")
    script = (slurm / "sbatch").read_text()
    (slurm / "sbatch").write_text(script + 'echo "on cluster big; your job 7 of last week is over"\n')
    (slurm / "sbatch").write_text((slurm / "sbatch").read_text().replace("cp ", "echo Last job 9 used 3 hours; cp ", 1))
    assert outcome(capfd, "slurm")[0] == 3 and book()["head 1"]["id"] == "101"
    wanted[:] = jobs("deacl a")
    (slurm / "sbatch").write_text("#!/bin/sh\necho Stapelauftrag 12\n")
    code, _, err = outcome(capfd, "slurm")
    assert code == 2 and err.startswith("sbatch took 'deacl a' but named no job (Stapelauftrag 12); see by squeue")
    for said, remedy in (
        ("Socket timed out on send/recv operation", "repeat when it answers"),
        ("", "correct the cluster file in params/cluster/"),
    ):
        (slurm / "sbatch").write_text(f"#!/bin/sh\necho '{said}' >&2; exit 1\n")
        code, _, err = outcome(capfd, "slurm")
        assert code == 2 and err.startswith("sbatch refused 'deacl a' (") and err.endswith(f"; {remedy}.\n"), err
        assert err.count("\n") == 1


def test_job_that_waits_for_a_failed_one_is_replaced(
    slurm: Path, wanted: list[dict], capfd: pytest.CaptureFixture
) -> None:
    wanted[:] = jobs("head 1", "cell 1")
    outcome(capfd, "slurm")
    account(slurm, job101="FAILED", job102="PENDING")
    outcome(capfd, "slurm")
    assert (slurm / "cancelled").read_text() == "102\n"
    assert asked(slurm, 104)["dependency"] == "afterok:103" and book()["cell 1"]["id"] == "104"


def _ended(handle: submitit.Job, state: str, why: str) -> None:
    records.write_json({"state": state, "why": why}, grid._outcome_path(handle.paths.folder, handle.job_id))


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return open, (self.path, "w")


def test_no_pickle_that_lies_beside_a_log_is_loaded(
    slurm: Path, wanted: list[dict], capfd: pytest.CaptureFixture, project: Path
) -> None:
    wanted[:] = jobs("head 1")
    outcome(capfd, "slurm")
    handle = submitit.SlurmJob(records.ROOT / Path(book()["head 1"]["log"]).parent, "101")
    for path in (handle.paths.result_pickle, grid._outcome_path(handle.paths.folder, "101")):
        path.write_bytes(pickle.dumps(("success", Payload(project / "executed"))))
    account(slurm, job101="COMPLETED")
    assert outcome(capfd, "slurm")[0] == grid.WAITING and outcome(capfd, "local")[0] in (0, 2)
    assert not (project / "executed").exists()


@pytest.mark.parametrize(
    "change", [{"log": "../../elsewhere/1_0_log.out"}, {"log": "/tmp/1_0_log.out"}, {"log": "runs/tiny/grid/log.out"},
               {"log": "runs/other/grid/a/1_0_log.out"}, {"id": "1; touch F"}, {"needs": ["--all"]}, {"executor": "x"},
               {"log": None}, {"id": None}],
    ids=str,
)  # fmt: skip
def test_a_book_that_leads_elsewhere_is_refused(
    change: dict, project: Path, wanted: list[dict], capfd: pytest.CaptureFixture
) -> None:
    entry = {"id": "1", "executor": "local", "log": "runs/tiny/grid/a/1_0_log.out", "submitted": "", "needs": []}
    grid._write_book({"head 1": entry}, "tiny")
    assert grid._read_book("tiny") == {"head 1": entry}
    grid._write_book({"head 1": entry | change}, "tiny")
    code, _, err = outcome(capfd, "local")
    assert code == 2 and "jobs.json is not as it was written; delete it" in err and err.count("\n") == 1


def test_reason_of_a_failure_is_one_sentence(slurm: Path, wanted: list[dict], capfd: pytest.CaptureFixture) -> None:
    wanted[:] = jobs("head 1")
    outcome(capfd, "slurm")
    handle = submitit.SlurmJob(records.ROOT / Path(book()["head 1"]["log"]).parent, "101")
    _ended(handle, "FAILED", "No such mask; add it.")
    account(slurm, job101="FAILED")
    assert "job 101 | head 1 | FAILED: No such mask; add it. | " in outcome(capfd, "slurm")[1]


def test_skipped_row_is_not_submitted_again(slurm: Path, wanted: list[dict], capfd: pytest.CaptureFixture) -> None:
    wanted[:] = jobs("head 1")
    outcome(capfd, "slurm")
    handle = submitit.SlurmJob(records.ROOT / Path(book()["head 1"]["log"]).parent, "101")
    _ended(handle, "COMPLETED", "The images differ in size.")
    account(slurm, job101="COMPLETED")
    code, out, _ = outcome(capfd, "slurm")
    assert code == 0 and "COMPLETED: The images differ in size." in out
    assert not (slurm / "102.sh").exists() and book() == {}


def test_refusals_of_slurm_are_one_sentence_and_lose_no_job(
    slurm: Path, wanted: list[dict], capfd: pytest.CaptureFixture, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (slurm / "refuse_103").touch()
    code, _, err = outcome(capfd, "slurm")
    said = "sbatch refused 'cell 1' (invalid partition); correct the cluster file in params/cluster/.\n"
    assert (code, err) == (2, said)
    assert list(book()) == ["deacl a", "head 1"]
    account(slurm, job101="PENDING", job102="RUNNING")
    code, _, err = outcome(capfd, "local")
    assert code == 2 and err.startswith("'deacl a' of an earlier call still runs or waits (Slurm job 101); wait for it")
    (project / "params" / "tiny.yaml").write_text(yaml.safe_dump(PROFILE | {"precision": "auto"}))
    code, _, err = outcome(capfd, "slurm")
    assert code == 2 and "write precision: bf16 or fp32 in params/tiny.yaml" in err and err.count("\n") == 1
    for name in ("squeue", "sacct"):
        (slurm / name).unlink()
    code, _, err = outcome(capfd, "local")  # what was submitted may still wait
    assert code == 2 and err.startswith("squeue does not say which jobs of earlier calls still wait or run (")
    monkeypatch.setenv("PATH", str(slurm))
    code, _, err = outcome(capfd, "slurm")
    assert code == 2 and err.startswith("EXECUTOR=slurm needs the command squeue, which is not here; call it where")


# ---- cluster files ----


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("partitoin: gpu\n", ["params/cluster/slurm.yaml", "Unknown parameter 'partitoin'"]),
        ("hours: '24'\n", ["params/cluster/slurm.yaml", "'hours' must be a number", "'24'"]),
        ("hours: 0\n", ["'hours' is 0"]),
        ("gpus: 1.5\n", ["'gpus'"]),
        ("setup: module load\n", ["'setup'"]),
        ("a: [\n", ["not valid YAML"]),
        ("- gpus\n", ["is no list of 'name: value' lines"]),
        ("1: gpus\n", ["params/cluster/slurm.yaml, line 1, sets what is no name"]),
        ("gpus: 1\ngpus: 2\n", ["slurm.yaml, line 2, sets 'gpus' a second time"]),
        ("hours: 1:30\n", ["'hours' must be a number but is the text '1:30'"]),
        ("at_once: 1000000000000\n", ["'at_once' is 1000000000000"]),
        (None, ["no cluster file 'slurm'", "choose one of: local"]),
    ],
)
def test_bad_cluster_file_is_one_sentence(
    text: str | None, words: list[str], slurm: Path, wanted: list[dict], capfd: pytest.CaptureFixture, project: Path
) -> None:
    path = project / "params" / "cluster" / "slurm.yaml"
    path.write_text(text) if text else path.unlink()
    code, _, err = outcome(capfd, "slurm")
    assert code == 2 and err.count("\n") == 1 and [word for word in words if word not in err] == [], err
    assert not list(slurm.glob("*.sh"))


def test_committed_cluster_files_are_valid() -> None:
    assert grid.read_cluster("slurm") == grid.Cluster() and grid.read_cluster("local") == grid.Cluster()


# ---- what is missing, and what a job makes ----


@pytest.fixture
def toy(toys: Path) -> dict:
    """Sections of settings with one task on the toys."""
    return {"segmentation": None, "depth": None, "deacl": {"checkpoints": [1], "epochs": 2}}


def toy_settings(**changes: object) -> object:
    nothing = {name: value for name, value in changes.items() if value is None}
    rest = {name: value for name, value in changes.items() if value is not None}
    return planted.settings(**rest).model_copy(update=nothing)


def names(listed: list[dict]) -> list[str]:
    return [job["name"].replace("classification toys planted ", "") for job in listed]


CELLS = [f"cell {d} {kind}" for d in ("deacl-epoch1", "deacl") for kind in attacks.KINDS]
DEACL = ["head deacl-epoch1", "head deacl", *CELLS]
STANDARD = ["head standard", *(f"cell standard {kind}" for kind in attacks.KINDS)]
ROWS = {"b": ["standard"], "a": ["standard", "deacl"]}
CHECKS = Sanity(n=2, more_steps=1, restarts=1, eps=[0.0, 0.25])
PICTURES = ["examples classification"]


def test_missing_follows_what_is_made(toy: dict) -> None:
    settings = toy_settings(**toy)
    listed, there, lost = grid.missing(settings)
    assert names(listed) == ["deacl planted", *STANDARD, *PICTURES, *DEACL] and (there, lost) == (0, [])
    order = [job["name"] for job in listed]
    assert all(order.index(need) < order.index(job["name"]) for job in listed for need in job["needs"])
    by_name = dict(zip(names(listed), listed, strict=True))
    assert by_name["head deacl"]["needs"] == ["deacl planted"] and by_name["head standard"]["needs"] == []
    assert by_name["cell deacl task"]["needs"] == [by_name["head deacl"]["name"]]
    assert not list(records.ROOT.rglob("*.safetensors"))  # looking computes nothing

    for made in ("deacl planted", "head standard", "cell standard task", "cell deacl task"):
        grid.compute(by_name[made], settings)
    gone = {"deacl planted", "head standard", "cell standard task", "head deacl", "cell deacl task"}
    listed = grid.missing(settings)[0]
    assert names(listed) == [n for n in ["deacl planted", *STANDARD, *PICTURES, *DEACL] if n not in gone]
    assert all(job["needs"] == [] for job in listed if "epoch1" not in job["name"])

    for job in listed:
        grid.compute(job, settings)
    assert grid.missing(settings) == ([], 14, [])
    stored = [p for part in ("examples", "cells", "heads") for p in records.runs_dir("toy").glob(f"{part}/*")]
    before = sorted(p for p in stored if "worst" not in p.name)  # which no job makes
    stamps = [path.stat().st_mtime_ns for path in before]
    evaluate.run_task("classification", settings)  # finds every record
    assert len(examples.make("classification", settings)) == 1  # and the images for Figure 1
    assert [path.stat().st_mtime_ns for path in before] == stamps
    changed = settings.model_copy(update={"attack": settings.attack.model_copy(update={"steps": 2})})
    assert len(grid.missing(changed)[0]) == 7  # EmbedAttack and PGD of three variants, and the pictures


def test_checks_of_the_attacks_are_jobs_after_the_cells_that_they_judge(toy: dict) -> None:
    rows = [{"name": name, "timm": "embedded_vit", "defenses": d} for name, d in ROWS.items()]
    settings = toy_settings(**toy | {"encoders": rows}).model_copy(update={"sanity": CHECKS})
    listed = grid.missing(settings)[0]
    checks = {job["name"]: job for job in listed if job["step"] == "checks"}
    assert list(checks) == [f"checks classification toys {row}" for row in ("b standard", "a standard", "a deacl")]
    assert checks["checks classification toys a deacl"]["needs"] == [
        *(f"cell classification toys a deacl {kind}" for kind in ("embed", "task")),
        "head classification toys b standard",  # whose images are transferred
    ]
    order = [job["name"] for job in listed]
    assert all(order.index(need) < order.index(job["name"]) for job in listed for need in job["needs"])
    for job in listed:
        grid.compute(job, settings)
    assert grid.missing(settings)[0] == []
    paths = sorted((records.results_dir("toy") / "sanity").glob("*/*.json"))
    assert [p.stem for p in paths] == ["toys__a__deacl", "toys__a__standard", "toys__b__standard"]
    paths = sorted((records.runs_dir("toy") / "checks").glob("*.json"))
    stamps = [p.stat().st_mtime_ns for p in paths]
    evaluate.run_task("classification", settings)
    assert len(sanity.run_all(settings)) == 3 and [p.stat().st_mtime_ns for p in paths] == stamps  # found
    paths[0].write_text(paths[0].read_text().replace('"n": 2', '"n": 3'))
    assert [job["name"] for job in grid.missing(settings)[0]] == ["checks classification toys a deacl"]
    more = settings.model_copy(update={"sanity": CHECKS.model_copy(update={"restarts": 2})})
    assert [job["step"] for job in grid.missing(more)[0]] == ["checks"] * 3


def test_seeds_repeat_heads_and_cells_but_not_deacl(toy: dict) -> None:
    settings = toy_settings(**toy, seeds=[5], encoders=[{"name": "planted", "timm": "embedded_vit"}])
    listed = grid.missing(settings)[0]
    assert names(listed) == [s for name in STANDARD[:1] for s in (name, f"{name} seed 5")] + [
        *(f"cell standard{seed} {kind}" for seed in ("", " seed 5") for kind in attacks.KINDS),
        *PICTURES,
    ]
    for job in listed:
        grid.compute(job, settings)
    assert grid.missing(settings)[0] == []
    assert len(list((records.results_dir("toy") / "seeds" / "5" / "classification").glob("*__*.json"))) == 3


def test_rows_without_data_or_weights_are_skipped_with_their_reason(toy: dict) -> None:
    section = {"datasets": ["toys", "cifar10"], "attack_batch": 3}
    rows = [
        {"name": "planted", "timm": "embedded_vit"},
        {"name": "gone", "timm": "embedded_vit", "checkpoint": "no.pt"},
    ]
    settings = toy_settings(**toy | {"classification": section, "encoders": rows})
    with pytest.raises(BadInput):
        grid.missing(settings)
    listed, _, lost = grid.missing(settings.model_copy(update={"missing": "skip"}))
    assert names(listed) == [*STANDARD, *PICTURES]
    assert [row["what"] for row in lost] == ["classification cifar10 planted standard", "gone standard"]
    assert all(row["why"].endswith(".") for row in lost)


@pytest.mark.parametrize("section", ["attack", "deacl"])
def test_missing_section_is_said_before_anything_is_submitted(section: str, toy: dict) -> None:
    with pytest.raises(BadInput, match=f"no section '{section}'"):
        grid.missing(toy_settings(**toy).model_copy(update={section: None}))


def test_job_says_in_its_log_what_failed(toy: dict, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    job, settings = {"name": "head x", "step": "head"}, toy_settings(**toy)
    monkeypatch.setattr(grid.os, "register_at_fork", lambda **_: None)

    def fails(*_: object) -> None:
        raise BadInput("No masks; add them.")

    monkeypatch.setattr(grid, "compute", fails)
    with pytest.raises(BadInput):
        grid.work(job, settings)
    assert capsys.readouterr().err == "head x | failed: No masks; add them.\n"
    assert grid.work(job, settings.model_copy(update={"missing": "skip"})) == "No masks; add them."
    monkeypatch.setattr(grid, "compute", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        grid.work(job, settings)
    assert "head x | failed: ZeroDivisionError: division by zero" in capsys.readouterr().err
    monkeypatch.setattr(grid, "compute", lambda *_: None)
    assert grid.work(job, settings) == "" and capsys.readouterr().out.endswith("head x | done\n")


def test_preempted_job_is_taken_up_with_the_same_work(toy: dict) -> None:
    job, settings = {"name": "head x"}, toy_settings(**toy)
    given = grid.work, job, settings, "folder"
    delayed = submitit.core.utils.DelayedSubmission(grid.noted, *given)._checkpoint_function()
    assert (delayed.function, delayed.args) == (grid.noted, given)


def test_grid_of_a_profile_from_nothing_to_its_records(project: Path, capfd: pytest.CaptureFixture) -> None:
    """Real jobs in processes of their own, then the notebooks' functions find everything."""
    code, out, err = outcome(capfd, "local")
    assert (code, err) == (0, ""), out
    assert out.count("COMPLETED") == 6 and "all 6 results are there" in out
    made = [r["attack"] for r in records.read_records(records.results_dir("tiny"))]
    assert sorted(made) == ["clean", "embed", "task", "worst"]  # the last by the checks, which may have found worse
    assert planted.stored("heads/classification__scenes__embedded_vit__standard__*", "tiny").is_file()
    code, out, _ = outcome(capfd, "local")
    assert code == 0 and out == "grid | profile tiny: all 6 results are there\n"
