"""The experiment grid as jobs, one for each missing result: python -m ssl_robust.ops.grid --profile P --executor slurm.

A job makes one result by the functions that the notebooks call; those then find everything made. What is there is not
made again, what waits or runs is left alone, and all else is started by the next call. Exit codes: 0 every result is
there, 1 a job failed, 2 bad input, 3 jobs are waiting or running on the cluster, 130 interrupted.
"""

import argparse
import getpass
import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import redirect_stderr
from datetime import UTC, datetime
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import submitit
import torch
from pydantic import Field, ValidationError
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.helpers import DelayedSubmission

from .. import deacl, evaluate, records
from .. import settings as schema
from ..progress import any_terminal
from ..settings import LONG, BadInput, Settings, check
from ..show import examples
from ..trust import sanity
from .wanted import STEPS, Job, results, seeded

WAITING = 3
EXECUTORS = ("local", "slurm")
RUNNING: list[subprocess.Popen] = []  # processes of jobs on this machine, which end with this one


class Cluster(schema.Strict):
    """A file of params/cluster/: what each job of `make paper EXECUTOR=slurm` asks for."""

    partition: str = Field("", description="Slurm partition; empty: the cluster's default")
    account: str = ""
    gpus: int = Field(1, ge=0, le=1000, description="GPUs of a job")
    deacl_gpus: int = Field(1, ge=0, le=1000, description="GPUs of a DeACL job, which shares its batches among them")
    cpus: int = Field(8, ge=1, le=LONG, description="CPU cores of a job")
    memory: int = Field(64, ge=1, le=LONG, description="main memory of a job in GB")
    hours: float = Field(24, gt=0, le=10_000, description="time limit of a job; one that meets it is taken up again")
    setup: list[str] = Field([], description="shell lines before each job, e.g. 'module load cuda'")
    at_once: int = Field(2, ge=1, le=1000, description="EXECUTOR=local: jobs that run at the same time")

    def of(self, job: Job) -> int:
        return self.deacl_gpus if job["step"] == "deacl" else self.gpus


def missing(settings: Settings) -> tuple[list[Job], int, list[dict[str, str]]]:
    """Jobs of all missing results, each after those that it needs; how many results are there; rows that are skipped.

    Raises BadInput as `results` does.
    """
    found, lost = results(settings)
    absent = {w.job["name"] for w in found if not w.there}
    jobs = [w.job | {"needs": [n for n in w.job["needs"] if n in absent]} for w in found if not w.there]
    # stable, so rows keep their order; what waits for DeACL comes last, when other jobs have nothing to wait for
    jobs.sort(key=lambda job: (job.get("defense", "standard") != "standard", STEPS.index(job["step"])))
    return jobs, len(found) - len(jobs), lost


# --- what a job does ---


def work(job: Job, settings: Settings) -> bool:
    """Make one result; whether it could be made, else its log ends with the reason in one line."""
    os.register_at_fork(after_in_child=_deaf)
    print(f"{job['name']} | profile {settings.profile}: started", flush=True)
    try:
        compute(job, settings)
    except Exception as error:
        said = str(error) if isinstance(error, BadInput) else f"{type(error).__name__}: {error}"
        print(f"{job['name']} | failed: {said}", file=sys.stderr, flush=True)
        return False
    print(f"{job['name']} | done", flush=True)
    return True


def on_cluster(job: Job, settings: Settings) -> None:
    """`work`, for Slurm, which starts what needs this result only if it was made."""
    if not work(job, settings):
        sys.exit(1)


def _again(job: Job, settings: Settings) -> DelayedSubmission:
    """Taken up again after preemption or at the time limit: DeACL at its last epoch, heads and cells anew."""
    return DelayedSubmission(on_cluster, job, settings)


on_cluster.checkpoint = _again  # submitit asks for it by this name


def compute(job: Job, settings: Settings) -> None:
    """Make the result of a job by the notebooks' own functions; those that are there are kept."""
    if job["step"] == "deacl":
        # what is to be skipped is said by `work`, and by the notebooks when they come to it
        deacl.finetune_all(settings.model_copy(update={"missing": "stop"}), job["encoder"])
        return
    if job["step"] == "examples":
        examples.make(job["task"], settings)
        return
    row = next(row for row in settings.encoders if row.name == job["encoder"])
    if job["step"] == "checks":
        sanity.check(job["task"], job["dataset"], row, job["defense"], settings)
        return
    cell = cell_of(job, settings)  # its head is made on the way
    if job["step"] == "cell":
        cell.run()


def cell_of(job: Job, settings: Settings) -> evaluate.Cell:
    """The cell of a job, its head made; of a head's job the clean one."""
    row = next(row for row in settings.encoders if row.name == job["encoder"])
    settings, weights = seeded(settings, job["seed"]), Path(job["weights"]) if job["weights"] else None
    model, test = evaluate.prepare(job["task"], job["dataset"], row, settings, job["defense"], weights)
    return evaluate.Cell(model, test, job.get("kind", "clean"), settings, job["defense"], job["epoch"])


def _deaf() -> None:
    """Slurm signals preemption to all processes of a job; only the first is to ask for another turn."""
    signal.signal(getattr(signal, f"SIG{submitit.JobEnvironment.USR_SIG}"), signal.SIG_IGN)


def _new_folder(profile: str) -> Path:
    """Logs of one call, and what its jobs unpickle, their own task: written by this call, as the folder is new."""
    path = records.runs_dir(profile) / "grid" / datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f")
    path.mkdir(parents=True)
    return path


def _say(*parts: str) -> None:
    print(" | ".join(["grid", *(part for part in parts if part)]), flush=True)


def _last_line(said: str) -> str:
    return (said.strip().splitlines() or ["no message"])[-1]


# --- jobs as processes of this machine ---


def run_here(jobs: list[Job], settings: Settings, cluster: Cluster) -> int:
    """Run all jobs, cluster.at_once at a time, each after those that it needs; returns how many failed or were left.

    The CPU threads of this machine are shared out among the jobs.
    """
    own, each = _gpus(settings.device), max(1, cluster.gpus, cluster.deacl_gpus)
    at_once = min(cluster.at_once, max(1, len(own) // each)) if own else cluster.at_once  # no GPU has two jobs
    threads, folder = max(1, torch.get_num_threads() // at_once), _new_folder(settings.profile)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # read by the jobs; torch has been set up in this process
    _say(f"{len(jobs)} jobs, {at_once} at a time with {threads} threads each")
    places: SimpleQueue[list[str]] = SimpleQueue()
    for place in range(at_once):
        places.put(own[place * each : (place + 1) * each])
    futures: dict[str, Future] = {}
    with ThreadPoolExecutor(at_once) as pool:
        try:
            for job in jobs:
                before = {name: futures[name] for name in job["needs"]}
                futures[job["name"]] = pool.submit(_in_turn, job, before, settings, cluster, folder, places)
            return sum(not future.result() for future in futures.values())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in RUNNING:
                process.terminate()
            raise


def _in_turn(
    job: Job, before: dict[str, Future], settings: Settings, cluster: Cluster, folder: Path, places: SimpleQueue
) -> bool:
    """Run one job when those before it are done; whether it has made its result."""
    if failed := [name for name, future in before.items() if not future.result()]:
        _say(job["name"], f"not started, because '{failed[0]}' failed")
        return False
    gpus, log = places.get(), folder / f"{job['name'].replace(' ', '-')}.log"
    shown = log.relative_to(records.ROOT).as_posix()
    try:
        _say(job["name"], "started", shown)
        code = _process(job, settings, gpus[: cluster.of(job)], log)
    finally:
        places.put(gpus)
    said = "done" if code == 0 else f"failed: {_last_line(log.read_text(errors='replace')).rpartition('failed: ')[2]}"
    _say(job["name"], said, shown)
    return code == 0


def _process(job: Job, settings: Settings, gpus: list[str], log: Path) -> int:
    """The exit code of a job in a process of its own, which sees these GPUs and says what it says in `log`."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}
    command = [sys.executable, "-m", "ssl_robust.ops.grid", "--executor", "local", "--job"]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=file, stderr=file, env=environment)
        RUNNING.append(process)
        process.communicate(json.dumps([job, settings.model_dump()]).encode())
    RUNNING.remove(process)
    return process.returncode


def _gpus(device: str) -> list[str]:
    """The GPUs that jobs of this machine may use, by the names that they were given."""
    if records.pick_device(device) == "cpu":
        return []
    given = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    return given or [str(n) for n in range(torch.cuda.device_count())]


# --- jobs of a Slurm cluster ---


def submit(jobs: list[Job], settings: Settings, cluster: Cluster) -> None:
    """Submit every job that is not waiting or running already, so that all of them now wait or run.

    Jobs that need others start when those have succeeded; if one of them fails, Slurm cancels what waits for it. Raises
    BadInput if Slurm is not here or refuses a job.
    """
    if settings.precision == "auto" and cluster.gpus and records.pick_device(settings.device) == "cpu":
        raise BadInput(
            "precision: auto is another one on the cluster's GPUs than here, so their results would not be found again;"
            f" write precision: bf16 or fp32 in params/{settings.profile}.yaml."
        )
    ids, executor = _queued(), submitit.SlurmExecutor(_new_folder(settings.profile))
    for job in jobs:
        name = _name(job["name"], settings)
        if name in ids:
            _say(f"job {ids[name]}", job["name"], "waits or runs")
            continue
        needs = [ids[_name(need, settings)] for need in job["needs"]]
        executor.update_parameters(**_request(name, job, needs, cluster))
        try:
            with redirect_stderr(None):  # submitit prints what the sentence below says
                ids[name] = executor.submit(on_cluster, job, settings).job_id
        except (FailedJobError, FailedSubmissionError) as error:
            raise BadInput(
                f"sbatch refused '{job['name']}' ({_last_line(str(error))}); correct the cluster file in "
                "params/cluster/, or repeat when it answers."
            ) from None
        _say(f"job {ids[name]}", job["name"], "submitted", executor.folder.relative_to(records.ROOT).as_posix())


def _name(job: str, settings: Settings) -> str:
    return f"{settings.profile}/{job}".replace(" ", "-")


def _queued() -> dict[str, str]:
    """Numbers, by their names, of this folder's jobs that wait or run; BadInput if Slurm does not say."""
    if shutil.which("sbatch") is None:
        raise BadInput(
            "EXECUTOR=slurm needs the command sbatch, which is not here; call it where jobs are submitted (a login "
            "node), or use EXECUTOR=local."
        )
    command = ["squeue", "--noheader", "--user", getpass.getuser(), "--format", "%i|%Z|%j"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    rows = [line.strip().split("|", 2) for line in done.stdout.splitlines() if line.strip()]
    if done.returncode or not all(len(row) == 3 for row in rows):
        raise BadInput(
            f"squeue does not say which jobs still wait or run ({_last_line(done.stderr or done.stdout)}); nothing was "
            "submitted, repeat when it answers."
        )
    return {name: number for number, place, name in rows if Path(place) == records.ROOT.resolve()}


def _request(name: str, job: Job, needs: list[str], cluster: Cluster) -> dict[str, Any]:
    """What a job asks Slurm for, in sbatch's words."""
    more = {"chdir": str(records.ROOT.resolve())}
    if needs:
        more |= {"dependency": ":".join(["afterok", *needs]), "kill-on-invalid-dep": "yes"}
    return {
        "job_name": name, "time": max(1, math.ceil(60 * cluster.hours)),
        "partition": cluster.partition or None, "account": cluster.account or None,
        "cpus_per_task": cluster.cpus, "mem": f"{cluster.memory}GB", "gpus_per_node": cluster.of(job) or None,
        "ntasks_per_node": 1, "setup": cluster.setup, "stderr_to_stdout": True, "additional_parameters": more,
        "srun_args": ["--cpus-per-task", str(cluster.cpus)],  # since Slurm 22.05 not taken over from sbatch
    }  # fmt: skip


# --- command line ---


def read_cluster(name: str) -> Cluster:
    """The validated file params/cluster/<name>.yaml; raises BadInput with one sentence for what is wrong with it."""
    from . import run  # here and in main, because papermill takes seconds that no job needs

    path = run.PARAMS / "cluster" / f"{name}.yaml"
    if not os.path.isfile(path):
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml"))) or "none"
        raise BadInput(f"There is no cluster file '{name}' in params/cluster/; choose one of: {known}.")
    try:
        return Cluster.model_validate(schema.read_yaml(path, f"params/cluster/{path.name}") or {})
    except ValidationError as error:
        raise BadInput(f"params/cluster/{path.name}: {schema.sentence(error.errors()[0])}") from None


def _grid(settings: Settings, executor: str, cluster: Cluster) -> int:
    jobs, there, lost = missing(settings)
    for row in lost:
        _say("skipped", row["what"], row["why"])
    if jobs and executor == "slurm":
        submit(jobs, settings, cluster)
        _say(f"profile {settings.profile}: {len(jobs)} jobs wait or run; call again to see what is there")
        return WAITING
    failed = run_here(jobs, settings, cluster) if jobs else 0
    if failed:
        print(f"{failed} of {len(jobs)} jobs made no result; see the logs above, then call again.", file=sys.stderr)
        return 1
    _say(f"profile {settings.profile}: all {there + len(jobs)} results are there")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    from . import run

    any_terminal()
    parser = argparse.ArgumentParser(prog="python -m ssl_robust.ops.grid", description="Run a profile's grid as jobs.")
    parser.add_argument("--profile", default="demo", help="name of a file in params/ without .yaml")
    parser.add_argument("--data", default="", help="folder of the real data sets, in place of the profile's data_root")
    parser.add_argument("--executor", required=True, choices=EXECUTORS, help="processes here, or jobs of a cluster")
    parser.add_argument("--cluster", default="", help="name of a file in params/cluster/; default: the executor's name")
    parser.add_argument("--job", action="store_true", help="make one result; it and all settings are read from stdin")
    asked = parser.parse_args(argv)
    run.prepare_children()
    logging.getLogger("submitit").setLevel(logging.ERROR)

    def whole_grid() -> int:
        cluster = read_cluster(asked.cluster or asked.executor)
        settings = run.read_profile(asked.profile, asked.data)
        records.keep_inside()
        with run.alone("grid", settings.profile):
            return _grid(settings, asked.executor, cluster)

    def one_job() -> int:
        job, settings = json.load(sys.stdin)
        return int(not work(job, check(**settings)))

    return run.guarded(one_job if asked.job else whole_grid)


if __name__ == "__main__":
    from ssl_robust.ops import grid  # under its own name, by which the cluster's jobs find `on_cluster`

    sys.exit(grid.main())
