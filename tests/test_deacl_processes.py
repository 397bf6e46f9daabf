"""DeACL by several processes: the same images, starts and results as alone, and what happens when one dies."""

import io
import os
import signal

import planted
import pytest
import torch
from safetensors.torch import load_file

from ssl_robust import deacl, records
from ssl_robust.ops import run
from ssl_robust.settings import BadInput, EncoderRow

ROW = EncoderRow(name="planted", defenses=["standard", "deacl"])
# 13 images: batches of 4, 4, 4 and 1, which has fewer images than there are processes; 3 held-out ones in two parts
DEACL = {"eps": 0.1, "step": 0.05, "checkpoints": [1], "epochs": 2, "n_train": 13, "n_val": 3}


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
def given(toys, monkeypatch):
    """finetune_all on the planted encoder by so many processes, {encoder: index} for `profile`."""
    monkeypatch.setattr(deacl.encoders, "load", lambda row, root="", weights=None: planted.encoder())
    for name in ("LOCAL_RANK", "RANK", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)

    def finetune(profile, processes, **changes):
        settings = planted.settings(profile=profile, deacl={**DEACL, "processes": processes}, **changes)
        return deacl.finetune_all(settings)["planted"]

    return finetune


def _weights(profile, epoch=2):
    return load_file(planted.stored(f"deacl/planted/*/epoch_{epoch}.safetensors", profile))


def _numbers(index):
    return [value for row in index["history"] for value in row.values()]


def _before_step(number, do, monkeypatch):
    """The second process calls `do` before its step `number`, from 0 on."""
    original, taken = deacl.train_step, []

    def train_step(tuning, *args):
        if tuning.accelerator.process_index == 1 and len(taken) == number:
            do()
        taken.append(number)
        return original(tuning, *args)

    monkeypatch.setattr(deacl, "train_step", train_step)


def test_two_processes_give_the_curve_of_one_and_go_on_after_the_death_of_one(given, monkeypatch):
    handlers = [signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)]
    alone, both = given("one", 1), given("two", 2)
    assert [signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert (alone["processes"], both["processes"]) == (1, 2)
    assert _numbers(both) == pytest.approx(_numbers(alone), abs=1e-5)
    for epoch in (1, 2):
        for name, weight in _weights("one", epoch).items():
            assert torch.allclose(_weights("two", epoch)[name], weight, atol=1e-5)
    with monkeypatch.context() as dying:
        dying.setattr(deacl, "SAVE_SECONDS", 0)
        _before_step(6, lambda: os.kill(os.getpid(), signal.SIGKILL), dying)  # in the midst of the second epoch
        with pytest.raises(RuntimeError, match=r"A process of DeACL of 'planted' ended \(.*\); repeat, and it goes on"):
            given("killed", 2)
    content = records.read_sealed(planted.stored("deacl/planted/*/state.pt", "killed"))
    state = torch.load(io.BytesIO(content), weights_only=True)
    assert (len(state["history"]), state["batches"]) == (2, 2)
    again = given("killed", 2)
    assert again == both
    assert all(torch.equal(weight, _weights("two")[name]) for name, weight in _weights("killed").items())


def test_one_process_finishes_what_two_began(given, monkeypatch):
    def damaged():
        raise BadInput("The image file a.png cannot be read; replace it.")

    with monkeypatch.context() as dying:
        _before_step(5, damaged, dying)
        with pytest.raises(BadInput, match=r"^The image file a\.png cannot be read; replace it\.$"):
            given("begun", 2)
    taken, original = [], deacl.train_step
    monkeypatch.setattr(deacl, "train_step", lambda *args: taken.append(1) or original(*args))
    index = given("begun", 1)
    assert len(taken) == 4  # the first epoch was kept
    assert index["processes"] == 1 and _numbers(index) == pytest.approx(_numbers(given("one", 1)), abs=1e-5)


def test_an_interrupt_is_an_interrupt(given, monkeypatch):
    def interrupt():
        os.kill(os.getppid(), signal.SIGINT)
        signal.pause()

    _before_step(1, interrupt, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        given("stopped", 2)


@pytest.mark.parametrize(
    ("gpus", "taken", "setting", "device", "expected"),
    [(0, False, "auto", "cpu", 1), (0, False, 3, "cpu", 3), (4, False, "auto", "auto", 4), (4, False, "auto", "cpu", 1),
     (4, False, 2, "cuda", 2), (4, True, "auto", "auto", 1), (4, True, 1, "auto", 1), (4, True, 2, "cpu", 2),
     (4, False, 5, "auto", "there are 4 GPUs"), (4, True, 2, "auto", "restart the kernel")],
)  # fmt: skip
def test_how_many_processes(gpus, taken, setting, device, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: taken)
    settings = planted.settings(deacl={"processes": setting}, device=device)
    if isinstance(expected, int):
        assert deacl.processes(settings) == expected
    else:
        with pytest.raises(BadInput, match=expected):
            deacl.processes(settings)


@pytest.mark.parametrize(
    ("said", "kind", "match"),
    [("torch.OutOfMemoryError: CUDA out of memory.", torch.OutOfMemoryError, "out of memory"),
     ("RuntimeError: Cannot re-initialize CUDA in forked subprocess.", BadInput, "restart the kernel"),
     ("RuntimeError: BadInput: x is bad; do y.", BadInput, "^x is bad; do y.$"),
     ("Signal 9 (SIGKILL) received by PID 7", RuntimeError, "'vit' ended .Signal 9 .* repeat")],
)  # fmt: skip
def test_what_a_failed_process_said_is_said_again(said, kind, match):
    with pytest.raises(kind, match=match):
        raise deacl._reason(said, "vit")


# --- command line ---


@pytest.fixture
def profile(given, monkeypatch):
    """A profile of two rows with DeACL, whose processes would be two."""
    rows = [{"name": name, "defenses": ["standard", "deacl"]} for name in ("planted", "other")]
    settings = planted.settings(encoders=rows, deacl={**DEACL, "processes": 2}, missing="skip")
    monkeypatch.setattr(run, "read_profile", lambda profile, data: settings)


def test_a_launched_process_launches_none(profile, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setattr(deacl, "notebook_launcher", None)
    assert deacl.main(["--profile", "toy"]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [
        f"{name}: checkpoints after epochs [1, 2]" for name in ("planted", "other")
    ]


def test_one_encoder_alone(profile, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    gone = [{"dataset": "toys", "encoder": name, "defense": "deacl", "why": "gone"} for name in ("planted", "other")]
    records.write_skipped("toy", "deacl", gone)
    assert deacl.main(["--encoder", "other"]) == 0
    assert [path.name for path in records.runs_dir("toy").glob("deacl/*")] == ["other"]
    assert records.read_skipped(records.skipped_path("toy", "deacl")) == gone[:1]
    assert deacl.main(["--encoder", "third"]) == run.BAD_INPUT
    assert "no encoder 'third' with the defense deacl" in capsys.readouterr().err
