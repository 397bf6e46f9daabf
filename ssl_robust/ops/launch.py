"""DeACL in several processes, which share its batches: started from 02_deacl, or by hand on several nodes by

accelerate launch [--num_machines M ...] -m ssl_robust.ops.launch --profile PROFILE [--data FOLDER] [--encoder NAME]
"""

import argparse
import os
import re
import subprocess
import sys
from subprocess import PIPE, STDOUT

import torch

from .. import deacl, records
from ..progress import any_terminal
from ..settings import BadInput, Settings, check


def processes(settings: Settings) -> int:
    """Processes that 02_deacl starts: deacl.processes, 'auto' being one for each GPU, on the CPU one.

    One where this process was started so itself. Raises BadInput for more processes than GPUs.
    """
    if {"LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"} & set(os.environ):
        return 1
    wanted = settings.deacl.processes
    gpus = torch.cuda.device_count() if records.pick_device(settings.device) == "cuda" else 0
    if wanted == "auto":
        return max(1, gpus)
    if gpus and wanted > gpus:
        raise BadInput(f"deacl.processes is {wanted} but there are {gpus} GPUs; lower it or write auto.")
    return wanted


def start(count: int, encoder: str, settings: Settings) -> None:
    """Fine-tune one encoder in `count` processes of this machine; what they say is passed on line by line.

    Raises BadInput for theirs, MemoryError where a GPU has too little memory, RuntimeError for any other end.
    """
    print(f"DeACL of {encoder}: {count} processes", flush=True)
    given = records.runs_dir(settings.profile) / "deacl" / f".{encoder}.json"
    records.write_json(settings.model_dump(mode="json"), given)
    # what accelerate launch calls, which takes one process for enough on CPUs
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    command = [*launch, "-m", __name__, "--settings", str(given), "--encoder", encoder]
    # lines instead of bars, which only the notebook's own process can draw
    environment = os.environ | {"SSL_ROBUST_HEADLESS": "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    said: list[str] = []
    with subprocess.Popen(command, stdout=PIPE, stderr=STDOUT, text=True, env=environment) as made:
        try:
            for line in made.stdout:
                said.append(line.rstrip())
                if line.startswith("DeACL"):  # tracebacks are not passed on
                    print(said[-1], flush=True)
        except BaseException:
            made.terminate()  # and it ends its processes
            raise
    if made.returncode:
        raise _reason(said, encoder, made.returncode)


def _reason(said: list[str], encoder: str, code: int) -> Exception:
    """The error for what the processes said at their end: the first that failed says why."""
    for line in said:
        if found := re.search(r"(?:^|: )BadInput: ([^{].*)", line):
            return BadInput(found[1])
        if "OutOfMemoryError" in line:
            return torch.OutOfMemoryError(line)
    errors = [line for line in said if "Error" in line] or [f"exit code {code}"]
    why = errors[0].strip().rstrip(".")
    return RuntimeError(
        f"A process of DeACL of '{encoder}' ended ({why}); repeat, and it goes on from the last stored state."
    )


def main(argv: list[str] | None = None) -> int:
    """Command line, also under accelerate launch; returns the exit code: 0 done, 2 bad input, 130 interrupted."""
    from . import run  # here, so that fine-tuning alone needs no papermill

    any_terminal()
    parser = argparse.ArgumentParser(
        prog="python -m ssl_robust.ops.launch", description="DeACL of a profile's encoders."
    )
    parser.add_argument("--profile", default="demo", help="name of a file in params/ without .yaml")
    parser.add_argument("--data", default="", help="folder of the real data sets, in place of the profile's data_root")
    parser.add_argument("--encoder", default="", help="only this encoder")
    parser.add_argument("--settings", default="", help="a file with all settings, in place of a profile")
    asked = parser.parse_args(argv)
    try:
        given = records.read_json(asked.settings and records.ROOT / asked.settings) if asked.settings else None
        settings = check(**given) if given else run.read_profile(asked.profile, asked.data)
        runs = deacl.finetune_all(settings, asked.encoder)
    except BadInput as problem:
        print(f"BadInput: {problem}" if asked.settings else problem, file=sys.stderr, flush=True)
        return run.BAD_INPUT
    except KeyboardInterrupt:
        print("Interrupted; repeat the command to go on from the last stored state.", file=sys.stderr, flush=True)
        return run.INTERRUPTED
    for name, index in runs.items() if deacl.first() else ():
        print(f"{name}: checkpoints after epochs {index['epochs']}")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
