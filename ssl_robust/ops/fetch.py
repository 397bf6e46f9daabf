"""Gets the data sets and encoder weights of a profile: python -m ssl_robust.ops.fetch --profile quick --data FOLDER.

What can be downloaded is, file by file, so that an interrupted call goes on with the next one; of the rest it is said
what to get and where it goes. Of a training set that comes in two sizes the larger is got only if the profile asks for
more images than the smaller has, and never with --small. Exit codes: 0 everything is complete, 2 something is missing,
130 interrupted.
"""

import argparse
import hashlib
import os
import shutil
import sys
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from urllib.request import Request, urlopen

from .. import datasets, encoders, records
from ..datasets import DATASETS
from ..items import Archive
from ..progress import any_terminal, track
from ..settings import BadInput, Settings, check, read_params
from ..trust import data
from . import plan
from .run import BAD_INPUT, INTERRUPTED, PARAMS, data_folder, read_profile

CHUNK = 2**20
TIMEOUT = 60  # seconds without a byte


def download(url: str, file: Path, checksum: str = "") -> None:
    """Downloads `url` as `file`, which appears only when it is whole.

    checksum: 'kind:hexadecimal', '' for none. Raises BadInput if that cannot be done, or the checksum is wrong.
    """
    part, problem = file.with_name(f"{file.name}.part"), "the connection was lost"
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        with urlopen(Request(url, headers={"User-Agent": "ssl_robust"}), timeout=TIMEOUT) as response:
            size = int(response.headers.get("Content-Length", -1))
            chunks = iter(lambda: response.read(CHUNK), b"")
            with part.open("wb") as out:
                for chunk in track(chunks, total=-(-size // CHUNK) if size > 0 else None, desc=f"{file.name} (MB)"):
                    out.write(chunk)
        whole = size in (-1, part.stat().st_size)
    except (OSError, HTTPException) as error:  # HTTPError among them
        whole, problem = False, str(error) or type(error).__name__
    if not whole:
        raise BadInput(f"{url} could not be downloaded ({problem}); repeat make data, or get that file elsewhere.")
    kind, _, expected = checksum.partition(":")
    with part.open("rb") as opened:
        if kind and hashlib.file_digest(opened, kind).hexdigest() != expected:
            raise BadInput(f"{url} came with a wrong checksum (not {checksum}); repeat make data.")
    os.replace(part, file)


def unpack(file: Path, root: Path, place: str, inside: str = "") -> None:
    """Unpacks the folder `inside` (else `place`) of an archive as root/place, which appears only when it is whole."""
    temporary = root / f".unpacking-{file.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        tar = {} if file.suffix == ".zip" else {"filter": "data"}  # nothing goes elsewhere
        shutil.unpack_archive(file, temporary, **tar)
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        os.replace(temporary / (inside or place), root / place)
    except Exception as error:  # damage, a password and unknown compression have errors of their own each
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(":")
        raise BadInput(f"{file} could not be unpacked ({reason}); delete it and repeat make data.") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _file(archive: Archive, root: Path) -> Path:
    """Where an archive is downloaded to."""
    return root / (archive.place if archive.as_it_is else f"downloads/{archive.name}")


def _absent(files: Sequence[Archive], root: Path) -> list[Archive]:
    return [a for a in files if not (root / a.place).exists()]


def needed_bytes(name: str, root: Path, files: Sequence[Archive]) -> int:
    """Bytes that getting a data set still takes on the disk of `root`: what is not downloaded yet, and unpacked."""
    missing = _absent(files, root)
    have = sum(file.stat().st_size for file in (_file(a, root) for a in missing) if file.is_file())
    unpacked = 0 if all(a.as_it_is for a in missing) else int(DATASETS[name].gigabytes * 1e9)
    return max(0, sum(a.size for a in missing) - have) + unpacked


def get(name: str, root: Path, files: Sequence[Archive]) -> None:
    """Downloads and unpacks those of `files` that are not there; raises BadInput if the disk is too small."""
    need, free, missing = needed_bytes(name, root, files), shutil.disk_usage(root).free, _absent(files, root)
    if need > free:
        sizes = f"{records.size(need)}, but the disk of {root} has {records.size(free)} free"
        raise BadInput(f"Fetching {name} takes {sizes}; free some space or name another folder.")
    if len(missing) > 1:
        print(f"{name}: {len(missing)} files, {records.size(need)}. {_instead(name, files)}".strip(), flush=True)
    for archive in missing:
        file = _file(archive, root)
        print(f"{name}: fetching {archive.url} ({archive.size / 1e6:.1f} MB)", flush=True)
        if not file.is_file():
            download(archive.url, file, archive.checksum)
        if not archive.as_it_is:
            print(f"{name}: unpacking {file.name}", flush=True)
            unpack(file, root, archive.place, archive.inside)
            file.unlink()


def _tasks(name: str, settings: Settings) -> list[str]:
    """The tasks that use a data set, 'deacl' being one too."""
    return [task for task, used in datasets.wanted(settings) if used == name]


def _problems(name: str, settings: Settings) -> list[str]:
    """What is wrong with one data set for all tasks that use it."""
    found = [problem for task in _tasks(name, settings) for problem in data.problems(task, name, settings)]
    if not found and settings.counts == "official":
        try:
            data.verify(name, settings.data_root)
        except BadInput as problem:
            found = [str(problem)]
    return list(dict.fromkeys(found))


def _short(name: str, settings: Settings) -> bool:
    """Whether a data set has fewer training images than some task asks for."""
    return any(data.shortage(task, name, settings) for task in _tasks(name, settings))


def _summary(name: str, settings: Settings) -> str:
    """The line of a complete data set: its images."""
    tasks = _tasks(name, settings)
    if datasets.entry(name, tasks[0]).own_val:
        return f"{name}: rendered here, nothing to fetch"
    splits = ("train",) if tasks == ["deacl"] else ("train", "test")
    numbers = [len(datasets.list_items(name, tasks[0], split, 0, settings.data_root)) for split in splits]
    images = " and ".join(f"{n:,} {split}" for n, split in zip(numbers, splits, strict=True))
    return f"{name}: complete, {images} images"


def _instead(name: str, files: Sequence[Archive]) -> str:
    """How to do with the smaller training set, if `files` are the larger one."""
    known = DATASETS[name]
    images, size = min(known.counts["train"]), records.size(sum(a.size for a in known.archives))
    words = f"With SMALL=1 make data gets {images:,} training images of {name} instead ({size})."
    return words if files is known.larger else ""


def _missing(name: str, settings: Settings, small: bool) -> list[str]:
    """Gets one data set if it must and can; returns what is wrong afterwards, with the remedy."""
    wrong, root = _problems(name, settings), Path(settings.data_root)
    known = DATASETS.get(name)
    files = known.archives if known and small else data.archives(name, settings)
    larger = bool(files) and files is known.larger
    if wrong and known and known.by_hand:
        remedy = f"{name} cannot be fetched: {known.by_hand.format(root=root)}; then repeat make data."
        return [remedy, *wrong] if (root / name).is_dir() else [remedy]
    if not files or not (wrong or (larger and _short(name, settings))):
        return wrong
    there = [archive.place for archive in files if (root / archive.place).exists()]
    try:
        get(name, root, files)
    except (BadInput, OSError) as problem:
        return [f"{problem} {_instead(name, files)}".strip()]
    wrong = _problems(name, settings)
    if not wrong and larger and _short(name, settings):
        wrong = [f"The archives of {name} hold fewer images than the {max(known.counts['train']):,} that they should."]
    if wrong and there:
        what = root / there[0] if len(there) == 1 else f"what is damaged of it, or all of {(root / there[0]).parent},"
        wrong.append(f"{name} was there in part; move {what} away and repeat make data to get it anew.")
    return wrong


def fetch(settings: Settings, small: bool = False) -> list[str]:
    """Gets the data sets of `settings` that are not complete, with a line for each that is, then weights of encoders.

    Returns what is missing.

    small: without the larger one of two training sets.
    """
    names = list(dict.fromkeys(name for _, name in datasets.wanted(settings)))
    if not settings.data_root and any(n not in DATASETS or not DATASETS[n].own_val for n in names):
        return ["There is no folder to put data sets into; name one: make data DATA=FOLDER."]
    left = []
    for name in names:
        wrong = _missing(name, settings, small)
        left += wrong
        if not wrong:
            print(_summary(name, settings), flush=True)
    for sentence in data.shortages(settings):
        print(sentence, flush=True)
    return left + _weights(settings)


def _weights(settings: Settings) -> list[str]:
    """Fetches, by what loads them, the encoders' weights that are on timm's hub; returns what is missing afterwards."""
    absent = {encoders.describe(row).timm: row for row in plan.fetched(settings)}
    absent = {model: row for model, row in absent.items() if not plan.cached(model)}
    sizes = {model: plan.bytes_of(plan.meta(row)) for model, row in absent.items()}
    if absent:
        total = f"about {records.size(sum(sizes.values()))}, into the local cache of timm's hub"
        print(f"encoder weights: {len(absent)} to fetch, {total}", flush=True)
    left = []
    for model, row in absent.items():
        print(f"{row.name}: fetching {model} (about {records.size(sizes[model])})", flush=True)
        try:
            encoders.load(row, settings.data_root)
        except BadInput as problem:
            left.append(str(problem))
    return [*encoders.check(settings), *left]


def _settings(profile: str, data: str) -> Settings:
    """Settings of a profile; the data folder is made if it is not there."""
    settings = check(**read_params(PARAMS / f"{profile}.yaml"))  # first, so that a misspelt profile makes no folder
    folder = data_folder(settings, data)
    try:
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"The data folder '{folder}' cannot be made ({error.strerror}); name another one.") from None
    return read_profile(profile, data)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    any_terminal()
    parser = argparse.ArgumentParser(
        prog="python -m ssl_robust.ops.fetch", description="Get a profile's data sets and encoder weights."
    )
    parser.add_argument("--profile", default="demo", help="name of a file in params/ without .yaml")
    parser.add_argument("--data", default="", help="folder of the data sets, made if it is not there")
    parser.add_argument("--small", action="store_true", help="the smaller one of a training set of two sizes")
    arguments = parser.parse_args(argv)
    try:
        left = fetch(_settings(arguments.profile, arguments.data), arguments.small)
    except BadInput as error:
        left = [str(error)]
    except KeyboardInterrupt:
        print("Interrupted; repeat the command, files that are whole are kept.", file=sys.stderr)
        return INTERRUPTED
    if left:
        print("\n".join(left), file=sys.stderr)
        return BAD_INPUT
    print(f"Profile {arguments.profile}: all data sets and encoder weights are there.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
