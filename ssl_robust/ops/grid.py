"""The experiment grid as jobs, one for each missing result: python -m ssl_robust.ops.grid --profile P --executor slurm.

submitit brings the jobs to Slurm (--executor slurm) or starts them as processes here (--executor local). A job
fine-tunes one encoder (DeACL), trains one head, evaluates one table cell, checks the attacks on one row (07_sanity), or
attacks the images that Figure 1 shows of one task, by the functions that the notebooks call; those then find everything
made. Exit codes: 0 every result is there, 1 a job failed, 2 bad input, 3 jobs are waiting or running on the cluster,
130 interrupted.
"""

import argparse
import getpass
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import redirect_stderr
from datetime import UTC, datetime
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import Any

import psutil
import submitit
import torch
from pydantic import Field, ValidationError
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.helpers import DelayedSubmission

from .. import deacl, evaluate, records
from .. import settings as schema
from ..progress import any_terminal
from ..settings import LONG, BadInput, Settings
from ..show import examples
from ..trust import sanity
from .wanted import STEPS, Job, results, seeded

WAITING = 3
EXECUTORS = ("local", "slurm")
SLURM = ("sbatch", "srun", "squeue", "scancel")
# Slurm's states of jobs that still come to an end by themselves
ALIVE = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "RESIZING", "SUSPENDED", "SIGNALING"}
HANDLES = {"local": submitit.LocalJob, "slurm": submitit.SlurmJob}

# What was submitted, by job name: "id", "executor", "log", "submitted", "needs" (ids). Kept until the result is there.
Book = dict[str, dict[str, Any]]


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


def work(job: Job, settings: Settings) -> str:
    """Compute one result; returns "", or with missing: skip why its row is skipped. Says in the log what failed."""
    os.register_at_fork(after_in_child=_deaf)
    any_terminal()
    print(f"{job['name']} | profile {settings.profile}: started", flush=True)
    try:
        compute(job, settings)
    except Exception as error:
        sentence = str(error) if isinstance(error, BadInput) else f"{type(error).__name__}: {error}"
        print(f"{job['name']} | failed: {sentence}", file=sys.stderr, flush=True)
        if isinstance(error, BadInput) and settings.missing == "skip":
            return sentence
        raise
    print(f"{job['name']} | done", flush=True)
    return ""


def noted(do: Callable[[Job, Settings], str], job: Job, settings: Settings, folder: str) -> None:
    """`do` the work of a job and write down how it ended, as JSON: submitit's own files of results are never read."""
    path = _outcome_path(Path(folder), submitit.JobEnvironment().job_id)
    try:
        why = do(job, settings)
    except Exception as error:
        said = str(error) if isinstance(error, BadInput) else f"{type(error).__name__}: {error}"
        records.write_json({"state": "FAILED", "why": _last_line(said)}, path)
        raise
    records.write_json({"state": "COMPLETED", "why": why}, path)


def _again(do: Callable[[Job, Settings], str], job: Job, settings: Settings, folder: str) -> DelayedSubmission:
    """Taken up again after preemption or at the time limit: DeACL at its last epoch, heads and cells anew."""
    return DelayedSubmission(noted, do, job, settings, folder)


noted.checkpoint = _again  # submitit asks for it by this name


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
    settings, weights = seeded(settings, job["seed"]), Path(job["weights"]) if job["weights"] else None
    model, test = evaluate.prepare(job["task"], job["dataset"], row, settings, job["defense"], weights)
    if job["step"] == "cell":
        evaluate.Cell(model, test, job["kind"], settings, job["defense"], job["epoch"]).run()


def _deaf() -> None:
    """Slurm signals preemption to all processes of a job; only the first is to ask for another turn."""
    signal.signal(getattr(signal, f"SIG{submitit.JobEnvironment.USR_SIG}"), signal.SIG_IGN)


# --- bookkeeping ---


def folder(profile: str) -> Path:
    """Where the jobs of a profile keep their book and their logs."""
    return records.runs_dir(profile) / "grid"


def _read_book(profile: str) -> Book:
    """The jobs whose results are not there; BadInput if the file leads to other places than those of the jobs' logs."""
    path = folder(profile) / "jobs.json"
    book = records.read_json(path) if path.is_file() else {}
    if not isinstance(book, dict) or not all(_sound(entry, profile) for entry in book.values()):
        raise BadInput(f"{path} is not as it was written; delete it, and jobs that still wait or run by hand.")
    return book


def _sound(entry: Any, profile: str) -> bool:
    """Whether an entry of the book is one of ours: a number, and a log in a folder of this profile's jobs."""
    try:
        number, needs = str(entry["id"]), map(str, entry["needs"])
        log = (records.ROOT / entry["log"]).resolve()
        numbers = all(re.fullmatch(r"[0-9_]+", n) for n in (number, *needs))
        return numbers and entry["executor"] in EXECUTORS and folder(profile).resolve() == log.parents[1]
    except (KeyError, TypeError, IndexError, OSError):
        return False


def _write_book(book: Book, profile: str) -> None:
    """The file is there as long as a job's result is not."""
    path = folder(profile) / "jobs.json"
    records.write_json(book, path) if book else path.unlink(missing_ok=True)


def _new_folder(profile: str) -> Path:
    """Submitit's files of one call. Process numbers come again, so calls must not share one.

    It is made here and now, so that what jobs unpickle, their own task, was written by this call.
    """
    path = folder(profile) / datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f")
    path.mkdir(parents=True)
    return path


def _entry(handle: submitit.Job, executor: str, needs: list[str]) -> dict[str, Any]:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    log = str(handle.paths.stdout.relative_to(records.ROOT.absolute()))
    return {"id": handle.job_id, "executor": executor, "log": log, "submitted": now, "needs": needs}


def _states(book: Book) -> dict[str, tuple[str, str]]:
    """(state, why) of every job in the book: Slurm's states; 'LOST' if nothing is known of it any more.

    Raises BadInput if Slurm does not say which jobs it has: one that seems lost may still be waiting.
    """
    handles = {}  # all before the first is asked, because submitit asks sacct for all of them at once
    for name, entry in book.items():
        handles[name] = HANDLES[entry["executor"]](records.ROOT / Path(entry["log"]).parent, entry["id"])
    queued = _queued() if any(entry["executor"] == "slurm" for entry in book.values()) else set()
    return {name: _state(handle, book[name], queued) for name, handle in handles.items()}


def _state(handle: submitit.Job, entry: dict[str, Any], queued: set[str]) -> tuple[str, str]:
    outcome, why = _outcome(handle)
    if entry["executor"] == "local":
        return ("RUNNING" if _runs_here(handle) else outcome or "INTERRUPTED"), why
    state = _accounted(handle).split(" ")[0]  # 'CANCELLED by 1000'
    if state == "UNKNOWN":  # accounting is late, or there is none
        state = "PENDING" if entry["id"] in queued else outcome or "LOST"
    elif state == "PREEMPTED" and entry["id"] in queued:
        state = "REQUEUED"
    return state, why


def _accounted(handle: submitit.Job) -> str:
    """The state of a job in Slurm's accounting; 'UNKNOWN' where there is none, or it answers in another form."""
    try:
        return handle.state
    except (LookupError, ValueError):
        return "UNKNOWN"


def _queued() -> set[str]:
    """Numbers of this user's jobs that Slurm has yet to finish; BadInput if squeue does not say."""
    command = ["squeue", "--noheader", "--user", getpass.getuser(), "--format", "%i"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        numbers, said = done.stdout.split(), done.stdout
    except subprocess.CalledProcessError as error:
        numbers, said = [], error.stderr or f"exit code {error.returncode}"
    except OSError as error:
        numbers, said = [], f"{error.strerror}: squeue"
    if not all(re.match(r"\d+(\W|_|$)", number) for number in numbers) or (said and not numbers):
        raise BadInput(
            f"squeue does not say which jobs of earlier calls still wait or run ({_last_line(said)}); nothing was "
            "submitted, repeat when it answers."
        )
    return set(numbers)


def _last_line(said: str) -> str:
    return (said.strip().splitlines() or ["no message"])[-1]


def _runs_here(handle: submitit.Job) -> bool:
    """Whether the process of a job runs; its number may have come again for something else."""
    try:
        return str(handle.paths.folder) in psutil.Process(int(handle.job_id)).cmdline()
    except psutil.Error:
        return False


def _outcome_path(folder: Path, number: str) -> Path:
    return folder / f"{number}_outcome.json"


def _outcome(handle: submitit.Job) -> tuple[str, str]:
    """('COMPLETED', why it was skipped or ''), ('FAILED', the error in one line), ('', '') if it did not say."""
    path = _outcome_path(handle.paths.folder, handle.job_id)
    try:
        said = records.read_json(path) if path.is_file() else {}
        return said.get("state", ""), said.get("why", "")
    except (BadInput, AttributeError):
        return "", ""


def _say(*parts: str) -> None:
    print(" | ".join(["grid", *(part for part in parts if part)]), flush=True)


# --- jobs as processes of this machine ---


def run_here(jobs: list[Job], settings: Settings, cluster: Cluster, book: Book) -> int:
    """Run all jobs, cluster.at_once at a time, each after those that it needs; returns how many failed or were left.

    The CPU threads of this machine are shared out among the jobs.
    """
    threads = max(1, torch.get_num_threads() // cluster.at_once)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # read by the jobs; torch has been set up in this process
    _say(f"{len(jobs)} jobs, {cluster.at_once} at a time with {threads} threads each")
    desk = {"settings": settings, "cluster": cluster, "book": book, "lock": Lock(), "free": SimpleQueue()}
    desk |= {"folder": _new_folder(settings.profile), "running": {}}
    for place in range(cluster.at_once):
        desk["free"].put(place)
    futures: dict[str, Future] = {}
    with ThreadPoolExecutor(cluster.at_once) as pool:
        try:
            for job in jobs:
                before = {name: futures[name] for name in job["needs"]}
                futures[job["name"]] = pool.submit(_in_turn, job, before, desk)
            return sum(not future.result() for future in futures.values())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for handle in [*desk["running"].values()]:
                handle.cancel()
            raise


def _in_turn(job: Job, before: dict[str, Future], desk: dict[str, Any]) -> bool:
    """Run one job when those before it are done; whether it has made its result."""
    for name, future in before.items():
        if not future.result():
            _say(job["name"], f"not started, because '{name}' failed")
            return False
    place = desk["free"].get()
    try:
        handle = _start(job, place, desk)
        handle.wait()
    finally:
        desk["free"].put(place)
    return _finished(job, handle, desk)


def _start(job: Job, place: int, desk: dict[str, Any]) -> submitit.Job:
    """Start the process of a job and write it down."""
    executor = submitit.LocalExecutor(desk["folder"])
    cluster = desk["cluster"]
    gpus = _gpus(place, _gpus_of(job, cluster), desk["settings"].device)
    minutes = max(1, math.ceil(60 * cluster.hours))
    executor.update_parameters(
        timeout_min=minutes, gpus_per_node=len(gpus), visible_gpus=gpus, stderr_to_stdout=True, signal_delay_s=90
    )
    with desk["lock"]:
        handle = executor.submit(noted, work, job, desk["settings"], str(desk["folder"]))
        desk["running"][job["name"]] = handle
        desk["book"][job["name"]] = _entry(handle, "local", [])
        _write_book(desk["book"], desk["settings"].profile)
        _say(job["name"], "started", desk["book"][job["name"]]["log"])
    return handle


def _finished(job: Job, handle: submitit.Job, desk: dict[str, Any]) -> bool:
    """Say how a job ended, and strike it from the book if it has made its result or was skipped."""
    outcome, why = _outcome(handle)
    log = desk["book"][job["name"]]["log"]
    with desk["lock"]:
        del desk["running"][job["name"]]
        if outcome == "COMPLETED":
            del desk["book"][job["name"]]
            _write_book(desk["book"], desk["settings"].profile)
        _say(job["name"], f"{outcome or 'INTERRUPTED'}{': ' + why if why else ''}", log)
    return outcome == "COMPLETED"


def _gpus_of(job: Job, cluster: Cluster) -> int:
    return cluster.deacl_gpus if job["step"] == "deacl" else cluster.gpus


def _gpus(place: int, count: int, device: str) -> list[int]:
    """Numbers of the GPUs for a job in one of the places: neighbours take different ones as far as there are any."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    own = [int(n) for n in given if n.isdigit()] or [*range(torch.cuda.device_count())]
    if device == "cpu" or not own:
        return []
    return [own[(place * count + i) % len(own)] for i in range(min(count, len(own)))]


# --- jobs of a Slurm cluster ---


def submit(jobs: list[Job], settings: Settings, cluster: Cluster, book: Book) -> int:
    """Submit every job that is not waiting or running already; returns how many now wait or run.

    Jobs that need others start when those have succeeded; if one of them fails, Slurm cancels what waits for it. Raises
    BadInput if Slurm is not here or refuses a job.
    """
    _slurm_here()
    _recognised(settings, cluster)
    states, place = _states(book), _new_folder(settings.profile)
    alive = 0
    for job in jobs:
        needs = [book[name]["id"] for name in job["needs"] if name in book]
        if _listed(job["name"], book.get(job["name"]), states.get(job["name"]), needs):
            handle = _submitted(job, place, needs, settings, cluster)
            book[job["name"]] = _entry(handle, "slurm", needs)
            _write_book(book, settings.profile)
            _say(f"job {handle.job_id}", job["name"], "submitted", book[job["name"]]["log"])
        alive += job["name"] in book and not _skipped(states.get(job["name"]))
    return alive


def _slurm_here() -> None:
    """Raises BadInput if this is no machine from which jobs are submitted."""
    absent = [command for command in SLURM if shutil.which(command) is None]
    if absent:
        raise BadInput(
            f"EXECUTOR=slurm needs the command {absent[0]}, which is not here; call it where jobs are submitted "
            "(a login node), or use EXECUTOR=local."
        )


def _recognised(settings: Settings, cluster: Cluster) -> None:
    """Raises BadInput if what the cluster's GPUs compute would not be taken for the results asked for here."""
    if settings.precision == "auto" and cluster.gpus and records.pick_device(settings.device) == "cpu":
        raise BadInput(
            "precision: auto is another one on the cluster's GPUs than here, so their results would not be found again;"
            f" write precision: bf16 or fp32 in params/{settings.profile}.yaml."
        )


def _listed(name: str, entry: dict[str, Any] | None, state: tuple[str, str] | None, needs: list[str]) -> bool:
    """Say what has become of an earlier submission of a job; whether it is to be submitted (again)."""
    if entry is None or state is None:
        return True
    said, why = state
    if said == "COMPLETED" and not why:
        why = "without the result that is asked for now: parameters, data or code have changed since"
    _say(f"job {entry['id']}", name, f"{said}{': ' + why if why else ''}", entry["log"])
    if said in ALIVE and not set(needs) <= set(entry["needs"]):  # it waits for a job that will never succeed
        submitit.SlurmJob(records.ROOT / Path(entry["log"]).parent, entry["id"]).cancel(check=False)
        return True
    return said not in ALIVE and not _skipped(state)


def _skipped(state: tuple[str, str] | None) -> bool:
    """Whether a job found that its row is to be skipped (missing: skip)."""
    return state is not None and state[0] == "COMPLETED" and bool(state[1])


class _Executor(submitit.SlurmExecutor):
    """Takes the number of a job from the words that sbatch has for it, whatever else a site has it print."""

    @staticmethod
    def _get_job_id_from_submission_command(string: bytes | str) -> str:
        said = string if isinstance(string, str) else string.decode(errors="replace")
        found = re.search(r"^Submitted batch job (\d+)", said, re.MULTILINE)
        if found is None:
            raise FailedSubmissionError(_last_line(said))
        return found[1]


def _submitted(job: Job, place: Path, needs: list[str], settings: Settings, cluster: Cluster) -> submitit.Job:
    executor = _Executor(place)
    executor.update_parameters(**_request(job, needs, cluster))
    try:
        with redirect_stderr(None):  # submitit prints what the sentence below says
            return executor.submit(noted, work, job, settings, str(place))
    except FailedJobError as error:
        said = _last_line(str(error))
        busy = any(words in said.lower() for words in ("timed out", "unable to contact", "temporarily", "try again"))
        remedy = "repeat when it answers" if busy else "correct the cluster file in params/cluster/"
        raise BadInput(f"sbatch refused '{job['name']}' ({said}); {remedy}.") from None
    except FailedSubmissionError as error:
        raise BadInput(
            f"sbatch took '{job['name']}' but named no job ({error}); see by squeue whether it waits, end it by "
            "scancel, and have sbatch say 'Submitted batch job N'."
        ) from None


def _request(job: Job, needs: list[str], cluster: Cluster) -> dict[str, Any]:
    """What a job asks Slurm for, in sbatch's words."""
    asked = {
        "job_name": job["name"].replace(" ", "-"), "time": max(1, math.ceil(60 * cluster.hours)),
        "partition": cluster.partition or None, "account": cluster.account or None,
        "cpus_per_task": cluster.cpus, "mem": f"{cluster.memory}GB", "gpus_per_node": _gpus_of(job, cluster) or None,
        "ntasks_per_node": 1, "setup": cluster.setup, "stderr_to_stdout": True,
        "srun_args": ["--cpus-per-task", str(cluster.cpus)],  # since Slurm 22.05 not taken over from sbatch
    }  # fmt: skip
    if needs:
        asked["additional_parameters"] = {"dependency": ":".join(["afterok", *needs]), "kill-on-invalid-dep": "yes"}
    return {name: value for name, value in asked.items() if value is not None}


# --- command line ---


def read_cluster(name: str) -> Cluster:
    """The validated file params/cluster/<name>.yaml; raises BadInput with one sentence for what is wrong with it."""
    from . import run  # here and in main, because papermill takes seconds that no job needs

    path = run.PARAMS / "cluster" / f"{name}.yaml"
    if not os.path.isfile(path):
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml"))) or "none"
        raise BadInput(f"There is no cluster file '{name}' in params/cluster/; choose one of: {known}.")
    parameters = schema.read_yaml(path, f"params/cluster/{path.name}") or {}
    if not isinstance(parameters, dict):
        raise BadInput(f"params/cluster/{path.name} is no list of 'name: value' lines; correct it.")
    try:
        return Cluster(**parameters)
    except ValidationError as error:
        raise BadInput(f"params/cluster/{path.name}: {schema.sentence(error.errors()[0])}") from None


def _one_executor(book: Book, executor: str) -> None:
    """Raises BadInput while jobs run that this call would start a second time."""
    for name, (state, _) in _states(book).items():
        entry = book[name]
        if state not in ALIVE or executor == entry["executor"] == "slurm":
            continue
        number = "process" if entry["executor"] == "local" else "Slurm job"
        raise BadInput(
            f"'{name}' of an earlier call still runs or waits ({number} {entry['id']}); wait for it or end it first."
        )


def _grid(settings: Settings, executor: str, cluster: Cluster) -> int:
    book = _read_book(settings.profile)
    if executor == "slurm" and any(entry["executor"] == "slurm" for entry in book.values()):
        _slurm_here()
    _one_executor(book, executor)
    jobs, there, lost = missing(settings)
    for row in lost:
        _say("skipped", row["what"], row["why"])
    wanted = {job["name"] for job in jobs}
    book = {name: entry for name, entry in book.items() if name in wanted}
    _write_book(book, settings.profile)
    if jobs and executor == "slurm":
        return _waiting(submit(jobs, settings, cluster, book), settings.profile)
    if executor == "local":
        for name, (state, why) in _states(book).items():
            _say(name, f"{state}{': ' + why if why else ''}", book[name]["log"], "taken up again")
    failed = run_here(jobs, settings, cluster, book) if jobs else 0
    if failed:
        return _fail(f"{failed} of {len(jobs)} jobs made no result; see the logs above, then call again.", 1)
    _say(f"profile {settings.profile}: all {there + len(jobs)} results are there")
    return 0


def _waiting(alive: int, profile: str) -> int:
    """The exit code after submission: 0 if nothing is left but skipped rows."""
    if not alive:
        _write_book({}, profile)
        return 0
    _say(f"profile {profile}: {alive} jobs wait or run; call again to see what has become of them")
    return WAITING


def _fail(sentence: str, code: int) -> int:
    print(sentence, file=sys.stderr, flush=True)
    return code


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m ssl_robust.ops.grid", description="Run a profile's grid as jobs.")
    parser.add_argument("--profile", default="demo", help="name of a file in params/ without .yaml")
    parser.add_argument("--data", default="", help="folder of the real data sets, in place of the profile's data_root")
    parser.add_argument("--executor", required=True, choices=EXECUTORS, help="processes here, or jobs of a cluster")
    parser.add_argument("--cluster", default="", help="name of a file in params/cluster/; default: the executor's name")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    from . import run

    any_terminal()
    arguments = _arguments(argv)
    run.prepare_children()
    logging.getLogger("submitit").setLevel(logging.ERROR)
    try:
        cluster = read_cluster(arguments.cluster or arguments.executor)
        settings = run.read_profile(arguments.profile, arguments.data)
        records.keep_inside()
        return _grid(settings, arguments.executor, cluster)
    except BadInput as error:
        return _fail(str(error), run.BAD_INPUT)
    except KeyboardInterrupt:
        return _fail("Interrupted; repeat the command to go on from what is computed.", run.INTERRUPTED)


if __name__ == "__main__":
    from ssl_robust.ops import grid  # under its own name, by which the jobs' processes find `work`

    sys.exit(grid.main())
