"""The grid as jobs: what is missing, processes of this machine, a Slurm cluster that scripts stand in for."""

import os
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
        monkeypatch.setenv(name, run.CHILDREN.get(name, "1"))
    (root / "params" / "cluster").mkdir(parents=True)
    (root / "params" / "tiny.yaml").write_text(yaml.safe_dump(PROFILE))
    write_cluster(root, "slurm", FIELDS)
    write_cluster(root, "local", {"at_once": 2})
    return root


def write_cluster(root: Path, name: str, fields: dict) -> None:
    (root / "params" / "cluster" / f"{name}.yaml").write_text(yaml.safe_dump(fields))


@pytest.fixture
def wanted(project: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """The jobs that are missing, changed in place by a test; in place of its process a job is noted in a file."""
    listed = jobs(*NEEDS)

    def process(job: dict, settings: object, gpus: list[int], log: Path) -> int:
        fails = (project / f"fail {job['name']}").exists()
        with (project / "times").open("a") as file:
            file.write(f"{job['name']},start,{time.time()},{os.environ['OMP_NUM_THREADS']}\n")
            file.flush()
            time.sleep(0.5)
            file.write(f"{job['name']},end,{time.time()},\n")
        log.write_text(f"started\n{job['name']} | failed: No mask for {job['name']}; add it.\n" if fails else "done\n")
        return int(fails)

    monkeypatch.setattr(grid, "_process", process)
    monkeypatch.setattr(grid, "missing", lambda settings: (listed, 7, []))
    return listed


def outcome(capfd: pytest.CaptureFixture, executor: str, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command line."""
    code = grid.main(["--profile", "tiny", "--executor", executor, *arguments])
    printed = capfd.readouterr()
    return code, printed.out, printed.err


# ---- processes of this machine ----


def test_two_jobs_run_at_once_and_each_after_what_it_needs(
    project: Path, wanted: list[dict], capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid.torch, "get_num_threads", lambda: 6)
    code, out, err = outcome(capfd, "local")
    assert (code, err) == (0, "") and out.endswith("grid | profile tiny: all 12 results are there\n")
    rows = [line.split(",") for line in (project / "times").read_text().splitlines()]
    times = {(name, word): float(at) for name, word, at, _ in rows}
    assert {threads for *_, threads in rows} == {"3", ""}  # six threads shared by two
    for name, needs in NEEDS.items():
        assert all(times[need, "end"] <= times[name, "start"] for need in needs)
    running = [sum(times[n, "start"] <= at < times[n, "end"] for n in NEEDS) for at in times.values()]
    assert max(running) == 2
    assert times["head 1", "start"] < times["deacl a", "end"]  # it waits for nothing


def test_failed_job_says_why_and_stops_what_needs_it(
    project: Path, wanted: list[dict], capfd: pytest.CaptureFixture
) -> None:
    wanted[:] = jobs("head 1", "cell 1")
    (project / "fail head 1").touch()
    code, out, err = outcome(capfd, "local")
    assert code == 1 and err == "2 of 2 jobs made no result; see the logs above, then call again.\n"
    (log,) = project.glob("runs/tiny/grid/*/head-1.log")
    shown = log.relative_to(project).as_posix()
    assert f"grid | head 1 | failed: No mask for head 1; add it. | {shown}\n" in out
    assert "grid | cell 1 | not started, because 'head 1' failed\n" in out
    assert "cell 1" not in (project / "times").read_text()
    (project / "fail head 1").unlink()
    assert outcome(capfd, "local")[0] == 0 and (project / "times").read_text().count("start") == 3


def test_killed_job_is_a_failed_one_and_jobs_end_with_their_caller(project: Path, monkeypatch) -> None:
    started = []

    class Killed(grid.subprocess.Popen):
        def __init__(self, *given: object, **named: object) -> None:
            super().__init__(*given, **named)
            started.append(self)
            self.kill()

    settings = run.read_profile("tiny", "")
    monkeypatch.setattr(grid.subprocess, "Popen", Killed)
    assert grid._process(jobs("head 1")[0], settings, [], project / "log") == -9
    assert grid.RUNNING == []

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(grid, "_in_turn", interrupted)
    monkeypatch.setattr(grid, "RUNNING", [started[0]])
    monkeypatch.setattr(started[0], "terminate", lambda: started.clear(), raising=False)
    with pytest.raises(KeyboardInterrupt):
        grid.run_here(jobs("head 1"), settings, grid.Cluster())
    assert started == []


@pytest.mark.parametrize(
    ("gpus", "given", "seen"),
    [
        (0, "", {""}), (1, "", {"0"}), (4, "", {"0,1", "2,3"}), (2, "2,5", {"2,5"}),
        (2, "GPU-7,GPU-9,MIG-1,MIG-2", {"GPU-7,GPU-9", "MIG-1,MIG-2"}),
    ],
)  # fmt: skip
def test_no_gpu_is_given_to_two_jobs(gpus, given, seen, project, wanted, capfd, monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    monkeypatch.setattr(grid.torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(records, "pick_device", lambda device: "cuda" if gpus else "cpu")
    process, used, running = grid._process, [], []

    def seeing(job: dict, settings: object, own: list[str], log: Path) -> int:
        assert not {*own} & {gpu for other in running for gpu in other}
        running.append(own)
        used.append(",".join(own))
        code = process(job, settings, own, log)
        running.remove(own)
        return code

    monkeypatch.setattr(grid, "_process", seeing)
    settings = run.read_profile("tiny", "").model_copy(update={"device": "auto"})
    assert grid.run_here(wanted, settings, grid.Cluster(gpus=2, deacl_gpus=2, at_once=2)) == 0
    assert {*used} == seen


# ---- a Slurm cluster ----

SCRIPTS = {
    "sbatch": """n=$(($(cat next) + 1)); echo $n > next
if [ -e refuse_$n ]; then echo "invalid partition" >&2; exit 1; fi
cp "$1" $n.sh; echo "Submitted batch job $n"
""",
    "squeue": "cat queue",
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
    (place / "queue").touch()
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
    return place


def asked(slurm: Path, number: int) -> dict[str, str]:
    """The #SBATCH lines of a submitted file."""
    return dict(re.findall(r"^#SBATCH --([a-z-]+)=(.*)$", (slurm / f"{number}.sh").read_text(), re.MULTILINE))


def queue(slurm: Path, place: Path, *numbers: int) -> None:
    """What squeue says from now on: these jobs, by the names that they were submitted with, of a project folder."""
    names = {number: asked(slurm, number)["job-name"] for number in numbers}
    (slurm / "queue").write_text("".join(f"{number}|{place}|{name}\n" for number, name in names.items()))


def submitted(slurm: Path) -> list[int]:
    return sorted(int(path.stem) for path in slurm.glob("1*.sh"))


def test_one_slurm_job_for_each_missing_result(
    slurm: Path, wanted: list[dict], capfd: pytest.CaptureFixture, project: Path
) -> None:
    code, out, err = outcome(capfd, "slurm")
    assert (code, err) == (3, "") and submitted(slurm) == [101, 102, 103, 104, 105]
    assert "5 jobs wait or run; call again" in out and "grid | job 103 | cell 1 | submitted | runs/tiny/grid/" in out
    tuning, cell = asked(slurm, 101), asked(slurm, 103)
    assert tuning["gpus-per-node"] == "4" and cell["gpus-per-node"] == "1"
    expected = {"partition": "gpu", "account": "vision", "time": "90", "mem": "32GB", "cpus-per-task": "6"}
    assert expected.items() <= cell.items() and cell["job-name"] == "tiny/cell-1"
    assert cell["chdir"] == str(project.resolve())
    depends = [asked(slurm, number).get("dependency") for number in range(101, 106)]
    assert depends == [None, None, "afterok:102", "afterok:101", "afterok:104"]
    assert asked(slurm, 105)["kill-on-invalid-dep"] == "yes"
    text = (slurm / "103.sh").read_text()
    assert "\nmodule load cuda\n" in text and "--cpus-per-task 6" in text and "submitit.core._submit" in text


def test_second_call_submits_only_what_neither_is_there_nor_waits(
    slurm: Path, wanted: list[dict], capfd: pytest.CaptureFixture, project: Path
) -> None:
    outcome(capfd, "slurm")
    queue(slurm, project.resolve(), 104, 105)
    wanted[:] = jobs("head 1", "cell 1", "head 2", "cell 2")  # the encoder is made, head 1 has failed
    code, out, _ = outcome(capfd, "slurm")
    assert code == 3 and submitted(slurm) == [*range(101, 108)]
    assert "grid | job 104 | head 2 | waits or runs\n" in out and "grid | job 106 | head 1 | submitted" in out
    assert asked(slurm, 107)["dependency"] == "afterok:106"
    queue(slurm, Path("/elsewhere"), 104, 105)  # another copy of the project
    wanted[:] = jobs("head 2")
    assert outcome(capfd, "slurm")[0] == 3 and submitted(slurm)[-1] == 108
    wanted[:] = []
    code, out, _ = outcome(capfd, "slurm")
    assert code == 0 and "all 7 results are there" in out


@pytest.mark.parametrize(
    ("squeue", "words"),
    [
        ('echo "slurm_load_jobs error: Socket timed out" >&2; exit 1', "(slurm_load_jobs error: Socket timed out)"),
        ("exit 3", "(no message)"),
        ('echo "Welcome to the cluster"', "(Welcome to the cluster)"),
    ],
)
def test_nothing_is_submitted_while_the_queue_is_not_known(
    squeue: str, words: str, slurm: Path, wanted: list[dict], capfd: pytest.CaptureFixture
) -> None:
    (slurm / "squeue").write_text(f"#!/bin/sh\n{squeue}\n")
    code, _, err = outcome(capfd, "slurm")
    assert code == 2 and words in err and err.endswith("; nothing was submitted, repeat when it answers.\n")
    assert err.count("\n") == 1 and submitted(slurm) == []


def test_refusals_of_slurm_are_one_sentence_and_lose_no_job(
    slurm: Path, wanted: list[dict], capfd: pytest.CaptureFixture, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (slurm / "refuse_103").touch()
    code, _, err = outcome(capfd, "slurm")
    said = "sbatch refused 'cell 1' (invalid partition); correct the cluster file in params/cluster/, or repeat when"
    assert code == 2 and err.startswith(said) and err.count("\n") == 1
    queue(slurm, project.resolve(), 101, 102)
    assert outcome(capfd, "slurm")[0] == 3 and submitted(slurm) == [101, 102, 104, 105, 106]
    assert asked(slurm, 104)["dependency"] == "afterok:102"
    (project / "params" / "tiny.yaml").write_text(yaml.safe_dump(PROFILE | {"precision": "auto"}))
    code, _, err = outcome(capfd, "slurm")
    assert code == 2 and "write precision: bf16 or fp32 in params/tiny.yaml" in err and err.count("\n") == 1
    (project / "params" / "tiny.yaml").write_text(yaml.safe_dump(PROFILE))
    monkeypatch.setenv("PATH", "")
    code, _, err = outcome(capfd, "slurm")
    assert code == 2 and err.startswith("EXECUTOR=slurm needs the command sbatch, which is not here; call it where")


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
        ("- gpus\n", ["params/cluster/slurm.yaml", "valid dictionary"]),
        ("gpus: 1\ngpus: 2\n", ["slurm.yaml is not valid YAML near line 2 ('gpus' stands there twice)"]),
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
    errors = {"No masks; add them.": BadInput("No masks; add them."), "ValueError: no": ValueError("no")}
    for said, error in errors.items():
        monkeypatch.setattr(grid, "compute", lambda *_, error=error: (_ for _ in ()).throw(error))
        assert not grid.work(job, settings) and capsys.readouterr().err == f"head x | failed: {said}\n"
        with pytest.raises(SystemExit):  # what needs it is not started by Slurm
            grid.on_cluster(job, settings)
        capsys.readouterr()
    monkeypatch.setattr(grid, "compute", lambda *_: None)
    assert grid.work(job, settings) and capsys.readouterr().out.endswith("head x | done\n")


def test_preempted_job_is_taken_up_with_the_same_work(toy: dict) -> None:
    given = {"name": "head x"}, toy_settings(**toy)
    delayed = submitit.core.utils.DelayedSubmission(grid.on_cluster, *given)._checkpoint_function()
    assert (delayed.function, delayed.args) == (grid.on_cluster, given)


def test_grid_of_a_profile_from_nothing_to_its_records(project: Path, capfd: pytest.CaptureFixture) -> None:
    """Real jobs in processes of their own, then the notebooks' functions find everything."""
    code, out, err = outcome(capfd, "local")
    assert (code, err) == (0, ""), out
    assert out.count("| done |") == 6 and "all 6 results are there" in out
    made = [r["attack"] for r in records.read_records(records.results_dir("tiny"))]
    assert sorted(made) == ["clean", "embed", "task", "worst"]  # the last by the checks, which may have found worse
    assert planted.stored("heads/classification__scenes__embedded_vit__standard__*", "tiny").is_file()
    code, out, _ = outcome(capfd, "local")
    assert code == 0 and out == "grid | profile tiny: all 6 results are there\n"
