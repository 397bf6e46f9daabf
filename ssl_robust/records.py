"""Results on disk: where they lie, atomic writing, hashes that say what a result was made from, provenance."""

import glob
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .settings import PACKAGE, ROOT, BadInput

if TYPE_CHECKING:
    import torch  # imported where it is used: the runner needs none of it, and it takes seconds

DECIDING = ("ssl_robust", "notebooks", "params")  # what numbers depend on; figures that a run rewrites are not among it
CUDA = "SSL_ROBUST_CUDA"  # of a process and those it starts: why CUDA does not start, '' if it does
SCHEMA = 2  # of records; 2: they carry a hash of their own content
PACKAGES = ("torch", "torchvision", "timm", "torchmetrics", "numpy", "pyautoattack")
# what decides in which order, with which instructions a CPU adds: set differently, last digits differ
THREADING = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "ATEN_CPU_CAPABILITY", "MKL_CBWR", "ONEDNN_MAX_CPU_ISA")
# What computes numbers, each with a version that is raised whenever its numbers change; every key holds those that its
# result was made by. tests/golden.py has golden numbers of each, which fail where they move and the version does not.
VERSIONS = {
    "scenes": 1,  # rendering; their pixels are hashed like all others
    "data": 1,  # reading, resizing, augmenting
    "encoders": 1,  # from pixels to tokens
    "heads": 1,  # from tokens to predictions, the sliding window
    "training": 1,  # of heads
    "metrics": 1,
    "pgd": 1,  # the loop of all attacks, the random start
    "bf16": 1,  # what steps in that precision round, and how
    "embed": 1, "task": 1, "strong": 1,  # losses of EmbedAttack, of the tasks' own attacks; strong.py
    "deacl": 1,
    "released": 1,  # what the released code does differently
    "checks": 2,  # of 07_sanity
}  # fmt: skip


def results_dir(profile: str) -> Path:
    """Folder of the records of `profile`."""
    return ROOT / "results" / profile


def runs_dir(profile: str) -> Path:
    """Folder of all that was computed for `profile`, each under its key, and of executed notebooks.

    Parameters that are tried, '<profile>/lab', have it in common with their profile.
    """
    first, *parts = Path(profile).parts
    return ROOT.joinpath("runs", first, *(part for part in parts if part != "lab"))


def figures_dir(profile: str) -> Path:
    """Folder of tables and figures that runs of `profile` write; git ignores it."""
    return ROOT / "figures" / profile


def committed_dir(profile: str) -> Path:
    """Folder of the tables, figures and records of `profile` that came with the project; no run writes there."""
    return ROOT / "figures" / "committed" / profile


def record_path(profile: str, task: str, dataset: str, encoder: str, defense: str, attack: str) -> Path:
    """File of one table cell, e.g. results/demo/depth/scenes__embedded_vit__standard__embed.json."""
    return results_dir(profile) / task / f"{dataset}__{encoder}__{defense}__{attack}.json"


def checks_path(profile: str, task: str, dataset: str, encoder: str, defense: str) -> Path:
    """File of one row's sanity checks; a folder deeper than the records of tables, which are read by their names."""
    return results_dir(profile) / "sanity" / task / f"{dataset}__{encoder}__{defense}.json"


def examples_path(profile: str, task: str) -> Path:
    """File that names the images of Figure 1 that are the current ones of a task."""
    return results_dir(profile) / "examples" / f"{task}.json"


def home() -> Path:
    """Folder of what Jupyter, IPython and matplotlib keep for themselves."""
    return ROOT / "runs" / ".home"


def keep_inside() -> None:
    """Points what Jupyter, IPython and matplotlib write for themselves into runs/, so nothing outside is touched."""
    try:
        home().mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(disk_problem(error, home())) from None
    for name in ("jupyter_runtime_dir", "ipythondir", "mplconfigdir"):
        os.environ[name.upper()] = str(home() / name)


def write_bytes(data: bytes, path: Path) -> None:
    """Write a file whole or not at all: a killed process leaves the old file or none. BadInput where it cannot be."""
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.part")  # many processes, on many machines
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        raise BadInput(disk_problem(error, path)) from None
    finally:
        with suppress(OSError):  # nor can a folder that was never made hold half a file
            temporary.unlink(missing_ok=True)


def disk_problem(error: OSError, path: Path) -> str:
    """Why a file could not be written, and the remedy, in one sentence."""
    why = error.strerror or str(error) or type(error).__name__
    remedy = "free some space or make its folder writable, and repeat; what was computed before is kept"
    return f"{path} cannot be written ({why}): {remedy}."


def size(number: float) -> str:
    """Bytes in a unit that suits them: '2.1 GB', '24 MB'."""
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.{int(number < 1e7)}f} MB"


def write_json(content: dict[str, Any] | list[Any], path: Path) -> Path:
    """Write `content` as JSON, atomically, a list of numbers on one line; returns the path."""
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    # no string can look so, as it would have no line breaks
    text = re.sub(r"\[\n\s*([^][{}\"]*?)\n\s*\]", lambda numbers: f"[{' '.join(numbers[1].split())}]", text)
    write_bytes(text.encode(), path)
    return path


def read_json(path: Path) -> Any:
    """Content of one JSON file; raises BadInput naming the file if it is damaged or gone."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):  # no JSON, or no text
        raise BadInput(f"{path.name} is damaged (not valid JSON); delete {path} and run its notebook again.") from None
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror}); delete it and run its notebook again.") from None


def write_record(content: dict[str, Any], path: Path) -> Path:
    """Write a record (or another dict that others rely on) with `sha`, the hash of the rest; returns the path."""
    return write_json({**content, "sha": _seal(content)}, path)


def _seal(content: dict[str, Any]) -> str:
    """Hash of a record, the same before writing and after reading."""
    return digest(json.loads(json.dumps(content)))


def read_record(path: Path) -> dict[str, Any]:
    """One record without its hash; raises BadInput naming the file if it is damaged, changed, or of a later version.

    Records of schema 1 and dicts that are no records of a table need no hash; `reusable` gives None for the former.
    """
    record = read_json(path)
    again = f"delete {path} and run its notebook again"
    if not isinstance(record, dict):
        raise BadInput(f"{path.name} is damaged (no record); {again}.")
    seal, schema = record.pop("sha", None), record.get("schema", 1)
    if seal != _seal(record) and (seal or schema != 1):
        raise BadInput(f"{path.name} is damaged (its content does not have its hash); {again}.")
    if schema not in range(1, SCHEMA + 1):
        raise BadInput(f"{path.name} was written by a later version (schema {schema}); update, or {again}.")
    return record


def read_records(folder: Path) -> list[dict[str, Any]]:
    """All records below `folder` (results/<profile> or figures/<profile>/records), sorted by path; see read_record."""
    return [read_record(p) for p in sorted(folder.glob("*/*__*__*__*.json"))]


def skipped_path(profile: str, part: str) -> Path:
    """File that lists the skipped rows of `part`: a task, 'heads' or 'deacl'."""
    return results_dir(profile) / part / "skipped.json"


def read_skipped(path: Path) -> list[dict[str, str]]:
    """Rows that could not be run and why, [{dataset, encoder, defense, why}]; empty if there is no such file."""
    return read_json(path) if path.is_file() else []


def write_skipped(profile: str, part: str, lost: list[dict[str, str]]) -> None:
    """Write the skipped rows, one for each place in the table; no file if there are none."""
    path = skipped_path(profile, part)
    # the first reason stands: a row's later variants fail for the same one
    rows = {tuple(v for k, v in row.items() if k != "why"): row for row in reversed(lost)}
    if lost:
        write_json(list(reversed(rows.values())), path)
    else:
        path.unlink(missing_ok=True)


# --- the one rule: a result is valid if its key is that of what it is asked to be made from ---

# What a result is made from: {"inputs": {name: settings, hashes, ..}, "loops": {name: version}}; its digest is the key.
Made = dict[str, Any]
keeping = False  # 'make keep' sets it: a result that other versions of the code made from the same inputs is accepted


def made_from(loops: Iterable[str], **inputs: Any) -> Made:
    """What a result is made from, as JSON reads it back: named inputs, and versions of the loops that compute it.

    `bf16` is among the loops of all whose input `precision` it is.
    """
    names = [*loops, *["bf16"] * (inputs.get("precision") == "bf16")]
    return json.loads(json.dumps({"inputs": inputs, "loops": {name: VERSIONS[name] for name in names}}))


def place(folder: Path, name: str, made: Made, suffix: str) -> Path:
    """The file of a result: its key is part of the name, so that no result ever takes the place of another."""
    return folder / f"{name}__{digest(made)}{suffix}"


def reusable(path: Path, made: Made) -> dict[str, Any] | None:
    """The record at `path` if it is whole, of this version, and made from exactly what `made` says, else None."""
    try:
        record = read_record(path) if _there(path, made) else {}
    except BadInput:
        return None
    return record if record.get("key") == digest(made) and record.get("schema", SCHEMA) == SCHEMA else None


def reusable_tensors(path: Path, made: Made) -> "tuple[dict[str, torch.Tensor], dict[str, str]] | None":
    """Tensors and metadata at `path` if they are whole and were made from exactly what `made` says, else None."""
    try:
        tensors, metadata = read_tensors(path) if _there(path, made) else ({}, {})
    except BadInput:
        return None
    return (tensors, metadata) if metadata.get("key") == digest(made) else None


def about(made: Made) -> dict[str, str]:
    """What metadata of tensors says of their making."""
    return {"key": digest(made), "made_from": json.dumps(made, sort_keys=True)}


def _there(path: Path, made: Made) -> bool:
    """Whether there is such a file; `keeping`, one of the same inputs and other versions is copied to it first."""
    if keeping and not path.is_file():
        for old, before in beside(path):
            if before["inputs"] == made["inputs"]:
                _accept(old, before, path, made)
                break
    return path.is_file()


def _accept(old: Path, before: Made, path: Path, made: Made) -> None:
    """Copy a result to the place of what `made` says; it says by which versions it was made."""
    with suppress(BadInput):  # damaged: then it is not there
        if old.suffix == ".json":
            write_record(accepted(read_record(old), made), path)
        else:
            tensors, metadata = read_tensors(old)
            kept = [*json.loads(metadata.get("kept", "[]")), {"loops": before["loops"]}]
            write_tensors(tensors, {**metadata, **about(made), "kept": json.dumps(kept)}, path)


def accepted(record: dict[str, Any], made: Made) -> dict[str, Any]:
    """A record that other versions of the code made from the same inputs, as one of `made`; it says which they were."""
    kept = [*record.get("kept", []), {"loops": record["made_from"]["loops"]}]
    return {**record, "key": digest(made), "made_from": made, "kept": kept}


def beside(path: Path) -> list[tuple[Path, Made]]:
    """Results of the same name and another key, each with what it was made from; the latest first."""
    pattern = glob.escape(path.name.rpartition("__")[0]) + f"__{'[0-9a-f]' * 16}{path.suffix}"
    found = sorted(path.parent.glob(pattern), key=lambda p: (p.stat().st_mtime_ns, p.name), reverse=True)
    return [(p, made) for p in found if p != path and (made := _made_of(p))]


def _made_of(path: Path) -> Made | None:
    try:
        if path.suffix == ".json":
            return read_record(path).get("made_from")
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {}).get("made_from", "null"))
    except Exception:  # damaged, which is said where it is read
        return None


def digest(content: Any) -> str:
    """Short hash of anything JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def state_hash(state: "dict[str, torch.Tensor]") -> str:
    """Short hash of names, shapes and exact values of a state dict."""
    import torch

    hasher = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        hasher.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        hasher.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return hasher.hexdigest()[:16]


def write_tensors(tensors: "dict[str, torch.Tensor]", metadata: dict[str, str], path: Path) -> None:
    """Write a safetensors file: the same bytes for the same content, with the hash `sha` of all of it as metadata."""
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = save(tensors, {**metadata, "sha": _tensor_seal(tensors, metadata)})
    end = 8 + int.from_bytes(data[:8], "little")
    # the library's own order of metadata is random
    header = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # tensors start at a multiple of 8 bytes
    write_bytes(len(header).to_bytes(8, "little") + header + data[end:], path)


def _tensor_seal(tensors: "dict[str, torch.Tensor]", metadata: dict[str, str]) -> str:
    return digest([state_hash(tensors), {k: v for k, v in metadata.items() if k != "sha"}])


def read_tensors(path: Path, again: str = "make it again") -> "tuple[dict[str, torch.Tensor], dict[str, str]]":
    """Tensors and metadata of a safetensors file; no code in it is executed, as there can be none.

    Raises BadInput naming the file and the remedy `again` if it is missing, damaged, or was changed since
    write_tensors; files of others, which carry no hash, are taken as they are.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            # cloned, as the library maps the file, and whoever writes it anew would change them
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise BadInput(
            f"The file {path} does not exist; run the notebook that makes it, or correct the path."
        ) from None
    except Exception as error:  # a flipped bit in the header raises whatever it leads to
        raise BadInput(f"The file {path} cannot be read ({type(error).__name__}: truncated?); {again}.") from None
    if "sha" in metadata and metadata["sha"] != _tensor_seal(tensors, metadata):
        raise BadInput(f"The file {path} is damaged (its content does not have its hash); {again}.")
    return tensors, metadata


def packed(stats: "torch.Tensor") -> "dict[str, torch.Tensor]":
    """Statistics as they are stored: without zeros, as confusion matrices of many classes are nearly empty."""
    import torch

    index = stats.nonzero()
    return {"index": index.int(), "values": stats[tuple(index.T)], "shape": torch.tensor(stats.shape)}


def unpacked(parts: "dict[str, torch.Tensor]") -> "torch.Tensor":
    """The statistics that `packed` was given."""
    import torch

    stats = torch.zeros(parts["shape"].tolist(), dtype=torch.float64)
    stats[tuple(parts["index"].long().T)] = parts["values"]
    return stats


def write_sealed(data: bytes, path: Path) -> None:
    """Write bytes of any format behind a line with their hash, which read_sealed compares and takes off."""
    write_bytes(hashlib.sha256(data).hexdigest().encode() + b"\n" + data, path)


def read_sealed(path: Path) -> bytes | None:
    """What write_sealed was given; None if there is no such file or any bit of it differs."""
    try:
        seal, _, data = path.read_bytes().partition(b"\n")
    except OSError:
        return None
    return data if hashlib.sha256(data).hexdigest().encode() == seal else None


def _revision(project: Path) -> str:
    """Commit of the project, with '+' if what its numbers depend on differs from it; 'unknown' outside a checkout."""
    try:
        _git(project, "ls-files", "--error-unmatch", PACKAGE.name)  # not a checkout of something else around it
        changed = _git(project, "--no-optional-locks", "status", "--porcelain", "--", *DECIDING)
        return _git(project, "rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _git(project: Path, *words: str) -> str:
    run = ["git", "-C", str(project), *words]
    return subprocess.run(run, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


# As it is when the process starts, for that is what it computes with, whatever is edited while it runs.
REVISION = _revision(PACKAGE.parent)


def pick_device(device: str) -> str:
    """'cpu' or 'cuda' for the setting 'auto', 'cpu' or 'cuda'; raises BadInput if a GPU is asked for in vain.

    A GPU on which CUDA does not start (its driver is older than this torch, say) is none for 'auto', which says so.
    """
    import torch

    # asked of the driver: CUDA must not be set up in a process that forks others
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    if device == "cpu" or not torch.cuda.is_available():
        if device == "cuda":
            raise BadInput("The setting device is 'cuda' but no CUDA GPU is usable here; write device: auto or cpu.")
        return "cpu"
    asked = CUDA not in os.environ
    why = os.environ[CUDA] = _cuda_fails() if asked else os.environ[CUDA]  # processes started from here know it, too
    remedy = "update its driver, or use an environment whose torch fits it (docs/profiles.md)"
    if why and device == "cuda":
        raise BadInput(f"The setting device is 'cuda' but CUDA does not start here ({why}); {remedy}.")
    if why and asked:
        print(f"CUDA does not start on the GPU here ({why}), so the CPU computes; {remedy}.", file=sys.stderr)
    return "cpu" if why else "cuda"


def _cuda_fails() -> str:
    """Why CUDA computes nothing on this machine, '' if it does; tried in a process of its own."""
    code = "import torch; torch.ones(1, device='cuda').sum().item()"
    try:
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    except (OSError, subprocess.SubprocessError) as error:
        return type(error).__name__
    said = run.stderr.strip().splitlines() or [f"exit code {run.returncode}"]
    first = next((line for line in said if "Error: " in line), said[-1])  # what follows it is advice on debugging
    return first.partition("Error: ")[2].partition(". ")[0].rstrip(".") or first if run.returncode else ""


def notebook() -> str:
    """The executed copy that this process will leave, 'runs/demo/05_attack_depth.ipynb'; '' in JupyterLab."""
    return os.environ.get("SSL_ROBUST_NOTEBOOK", "")


def provenance(device: str) -> dict[str, Any]:
    """Where and with what a result was computed."""
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    return {
        "git": REVISION,
        "versions": {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}},
        "device": f"{device} ({name})",
        "threads": torch.get_num_threads(),
        "numerics": numerics(device),
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def numerics(device: str) -> dict[str, Any]:
    """What besides versions and threads decides the last digits: instructions, libraries, settings of them."""
    import torch

    cpu = {
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "libraries": [name for name in ("mkl", "mkldnn", "openmp") if getattr(torch.backends, name).is_available()],
        "matmul": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "environment": {name: os.environ[name] for name in THREADING if name in os.environ},
    }
    if device != "cuda":
        return cpu
    flags = {"benchmark": torch.backends.cudnn.benchmark, "tf32": torch.backends.cudnn.allow_tf32}
    return {**cpu, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), **flags}


def stage_path(profile: str, notebook: str) -> Path:
    """The file that a notebook writes as its last act, and that make waits for."""
    return results_dir(profile) / f"{notebook}.json"


def finish(profile: str, notebook: str, **summary: Any) -> Path:
    """Last act of a notebook: say that it is done, and what it found."""
    return write_record({"notebook": notebook, "profile": profile, **summary}, stage_path(profile, notebook))


def need(profile: str, notebook: str) -> dict[str, Any]:
    """Summary of a notebook that must have run before; raises BadInput naming it if it has not, or is damaged.

    With parameters that are tried, '<profile>/lab', it is enough that it has run for the profile.
    """
    base = profile.partition("/")[0]
    path = next((p for p in (stage_path(profile, notebook), stage_path(base, notebook)) if p.is_file()), None)
    if path is None:
        raise BadInput(f"Notebook {notebook} has not run for profile '{base}'; run it first, or 'make paper'.")
    return read_record(path)
