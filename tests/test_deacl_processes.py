"""DeACL by several processes: the same images, starts and results as alone, and what happens when one dies."""

import threading
import time

import planted
import psutil
import pytest
import torch
from safetensors.torch import load_file

from ssl_robust import deacl, records
from ssl_robust.ops import launch, run
from ssl_robust.settings import BadInput, check

# 13 images: batches of 4, 4, 4 and 1, which has fewer images than there are processes; 3 held-out ones in two parts
DEACL = {"eps": 0.02, "step": 0.01, "steps": 1, "checkpoints": [1], "epochs": 2, "n_train": 13, "n_val": 3, "batch": 4}
DEACL |= {"warmup_epochs": 1, "lr": 0.01}


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_slices_share_each_batch_once(processes):
    order = torch.randperm(13, generator=torch.Generator().manual_seed(0))
    parts = [deacl.slices(order, 4, process, processes) for process in range(processes)]
    assert {len(part) for part in parts} == {4}  # all take part in each step
    for number, batch in enumerate(order.split(4)):
        mine = [part[number] for part in parts]
        assert sum((indices for indices, counted, _ in mine if counted), []) == batch.tolist()
        assert all(indices and size == len(batch) for indices, _, size in mine)


@pytest.fixture
def given(root, monkeypatch):
    """finetune_all on the embedded encoder by so many processes, the index for `profile`."""
    for name in ("LOCAL_RANK", "RANK", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)

    def finetune(profile, processes, **changes):
        rows = [{"name": "embedded_vit", "defenses": ["standard", "deacl"]}]
        section = {**DEACL, "processes": processes, **changes}
        about = {"profile": profile, "device": "cpu", "precision": "fp32"}  # whatever this CPU computes fast
        return deacl.finetune_all(check(**about, encoders=rows, deacl=section))["embedded_vit"]

    return finetune


def _weights(profile, epoch=2):
    return load_file(planted.stored(f"deacl/embedded_vit/*/epoch_{epoch}.safetensors", profile))


def _numbers(index):
    return [value for row in index["history"] for value in row.values()]


def _kill_one(profile):
    """Kills a process of the run as soon as its first epoch is stored."""
    while not list(records.runs_dir(profile).glob("deacl/*/*/state.pt")):
        time.sleep(0.05)
    workers = [p for p in psutil.Process().children(recursive=True) if "ssl_robust.ops.launch" in p.cmdline()]
    workers[-1].kill()


def test_two_processes_give_the_curve_of_one_and_go_on_after_the_death_of_one(given):
    alone, both = given("one", 1), given("two", 2)
    assert (alone["processes"], both["processes"]) == (1, 2)
    assert _numbers(both) == pytest.approx(_numbers(alone), abs=1e-4)
    for name, weight in _weights("one").items():
        assert torch.allclose(_weights("two")[name], weight, atol=1e-4)
    threading.Thread(target=_kill_one, args=("killed",), daemon=True).start()
    with pytest.raises(RuntimeError, match=r"DeACL of 'embedded_vit' ended \(.*\); repeat, and it goes on"):
        given("killed", 2, epochs=12)
    before = deacl._read_state(next(records.runs_dir("killed").glob("deacl/*/*")), _key("killed"), [])
    again = given("killed", 1, epochs=12)  # one process finishes what two began
    assert 1 < len(before["history"]) < 13 and again["history"][: len(before["history"])] == before["history"]


def _key(profile):
    return next(records.runs_dir(profile).glob("deacl/*/*")).name


def test_what_one_of_them_refuses_is_refused(given):
    with pytest.raises(BadInput, match=r"^DeACL diverged in epoch \d .its loss is no number.; lower deacl.lr"):
        given("diverged", 2, lr=1000.0, warmup_epochs=0, momentum=0.99, gamma=1e6)


def test_a_gpu_on_which_cuda_does_not_start_gets_no_process(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv(records.CUDA, "its driver is too old")
    assert launch.processes(planted.settings(deacl={"processes": "auto"}, device="auto")) == 1


@pytest.mark.parametrize(
    ("gpus", "setting", "device", "expected"),
    [(0, "auto", "cpu", 1), (0, 3, "cpu", 3), (4, "auto", "auto", 4), (4, "auto", "cpu", 1), (4, 2, "cuda", 2),
     (4, 5, "auto", "there are 4 GPUs")],
)  # fmt: skip
def test_how_many_processes(gpus, setting, device, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setenv(records.CUDA, "")
    settings = planted.settings(deacl={"processes": setting}, device=device)
    if isinstance(expected, int):
        assert launch.processes(settings) == expected
    else:
        with pytest.raises(BadInput, match=expected):
            launch.processes(settings)


@pytest.mark.parametrize(
    ("said", "kind", "match"),
    [("torch.OutOfMemoryError: CUDA out of memory.", torch.OutOfMemoryError, "out of memory"),
     ("BadInput: x is bad; do y.", BadInput, "^x is bad; do y.$"),
     ("nothing", RuntimeError, "'vit' ended .exit code 9.; repeat")],
)  # fmt: skip
def test_what_a_failed_process_said_is_said_again(said, kind, match):
    with pytest.raises(kind, match=match):
        raise launch._reason(
            ["Traceback", said, "RuntimeError: another"] if kind is not RuntimeError else [said], "vit", 9
        )


# --- command line ---


@pytest.fixture
def profile(toys, monkeypatch):
    """A profile of two rows with DeACL, whose processes would be two, in a process that was launched."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setattr(deacl.encoders, "load", lambda row, root="", weights=None: planted.encoder())
    monkeypatch.setattr(launch, "start", None)
    rows = [{"name": name, "defenses": ["standard", "deacl"]} for name in ("planted", "other")]
    section = {"eps": 0.1, "step": 0.05, "checkpoints": [1], "epochs": 2, "n_train": 13, "n_val": 3, "processes": 2}
    settings = planted.settings(encoders=rows, deacl=section, missing="skip")
    monkeypatch.setattr(run, "read_profile", lambda profile, data: settings)


def test_a_launched_process_launches_none(profile, capsys):
    assert launch.main(["--profile", "toy"]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [
        f"{name}: checkpoints after epochs [1, 2]" for name in ("planted", "other")
    ]


def test_one_encoder_alone(profile, capsys):
    gone = [{"dataset": "toys", "encoder": name, "defense": "deacl", "why": "gone"} for name in ("planted", "other")]
    records.write_skipped("toy", "deacl", gone)
    assert launch.main(["--encoder", "other"]) == 0
    assert [path.name for path in records.runs_dir("toy").glob("deacl/*")] == ["other"]
    assert records.read_skipped(records.skipped_path("toy", "deacl")) == gone[:1]
    assert launch.main(["--encoder", "third"]) == run.BAD_INPUT
    assert "no encoder 'third' with the defense deacl" in capsys.readouterr().err
