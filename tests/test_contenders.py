"""The contenders do the same thing, what is measured is computed rightly, and no row is missing."""

import itertools
import math
import sys

import contenders as bench
import pandas as pd
import planted
import pytest
import torch

from ssl_robust import attacks, compute, encoders, records
from ssl_robust.heads import ClassificationHead, TaskModel
from ssl_robust.settings import Attack, BadInput, EncoderRow, check

ATTACK = Attack(steps=3)


def planted_case(count: int = 4) -> bench.Case:
    model, x = planted.model("classification"), planted.images(count)
    with torch.no_grad():
        label = model(x).argmax(1)
    ids = [str(i) for i in range(count)]
    start = attacks.random_start(x, ATTACK.eps, ids, 0)
    return bench.Case("planted", model, x, start, label, ids, ATTACK, count, 0, "fp32")


@pytest.fixture(scope="module")
def small() -> TaskModel:
    """A vision transformer, so that shortened and whole forward passes differ."""
    encoder = encoders.random_init(EncoderRow(name="embedded_vit", native=32))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return TaskModel("classification", encoder, ClassificationHead(encoder.dim, 3))


def settings(**changes: object) -> object:
    rows = [{"name": "embedded_vit"}]
    return check(**({"profile": "bench", "device": "cpu", "encoders": rows, "attack": {}} | changes))


SMALL = bench.Bench(("embedded_vit",), 32, 2, 1, 2)


def test_batches_are_those_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench.compute.TOKENS, "cpu", 100)
    assert bench.case(settings(), SMALL._replace(images="auto"), "embedded_vit").batch == 100 // 17
    few = bench.case(settings(), SMALL._replace(images=3), "embedded_vit")
    assert few.batch == 3 and len(few.x) == 3


# --- contenders ---


@pytest.mark.parametrize("name", bench.contenders("fp32"))
@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_contenders_agree_from_the_same_start(name: str, shift: float) -> None:
    model, x = planted.model("classification"), (planted.images(4) + shift).clamp(0, 1)
    label = torch.tensor([0, 1, 2, 0])
    expected = bench.ours(model, x, label, x, ATTACK)
    given = bench.contenders("fp32")[name](model, x, label, x, ATTACK)
    torch.testing.assert_close(given, expected, atol=bench.ROUNDING, rtol=0)
    assert 0.02 < (given - x).abs().max() <= ATTACK.eps + bench.ROUNDING


@pytest.mark.parametrize("name", ["torchattacks", "foolbox", "plain loop"])
def test_contenders_agree_on_a_transformer_up_to_rounding(name: str, small: TaskModel) -> None:
    x, label = planted.images(4, 32), torch.tensor([0, 1, 2, 0])
    ours, theirs = (f(small, x, label, x, ATTACK) for f in (bench.ours, bench.contenders("fp32")[name]))
    assert ((ours - theirs).abs() <= bench.ROUNDING).float().mean() > 0.99


def test_embed_attack_of_the_plain_loop_is_ours() -> None:
    case = planted_case()
    start = bench._start(case, "embed")
    assert not torch.equal(start, case.x)
    ours, theirs = (f(case.model, case.x, None, start, ATTACK) for f in (bench.ours, bench.plain))
    torch.testing.assert_close(ours, theirs, atol=bench.ROUNDING, rtol=0)


def test_embed_attack_has_no_contender_that_lacks_its_loss() -> None:
    assert list(bench.able("embed", "fp32")) == ["ours", "plain loop"]
    assert list(bench.able("task", "fp32")) == ["ours", "torchattacks", "foolbox", "plain loop"]


def test_ours_in_fp32_is_a_contender_of_its_own_only_beside_another_precision() -> None:
    assert list(bench.able("embed", "bf16", "cuda")) == ["ours", "ours fp32", "plain loop"]


def test_others_are_given_timms_own_forward_pass(small: TaskModel, monkeypatch: pytest.MonkeyPatch) -> None:
    x = planted.images(2, 30)  # 30 px are padded
    torch.testing.assert_close(bench.Logits(small)(x), small(x), atol=1e-5, rtol=1e-5)
    monkeypatch.setattr(bench.vit, "features", None)
    monkeypatch.setattr(bench.vit, "cls_token", None)
    bench.Logits(small)(x)


def test_plain_leaves_the_model_frozen_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = planted.model("classification"), planted.images(2)
    label, seen = torch.tensor([0, 1]), []

    def record(*inputs: object) -> torch.Tensor:
        seen.append([p.requires_grad for p in model.parameters()])
        raise RuntimeError("planted")

    bench.plain(model, x, label, x, ATTACK)
    assert [p for p in model.parameters() if p.requires_grad or p.grad is not None] == []
    monkeypatch.setattr(bench, "_plain_steps", record)
    with pytest.raises(RuntimeError, match="planted"):
        bench.plain(model, x, label, x, ATTACK)
    assert all(seen[0])
    assert [p for p in model.parameters() if p.requires_grad] == []


def test_only_the_plain_loop_computes_gradients_of_weights() -> None:
    case = planted_case()
    frozen = bench.flops(case, lambda *a: bench.plain(*a, trainable=False), "task")
    pixels, dim, patch = 16 * 16, 6, 4
    convolution, linear = 2 * pixels * 3 * dim, 2 * dim * 3
    assert frozen == 2 * (convolution + linear)  # forward, and backward to the image
    assert bench.flops(case, bench.plain, "task") == 3 * (convolution + linear)
    assert patch == case.model.encoder.patch


def test_flops_of_what_is_done_once_do_not_count() -> None:
    case = planted_case()
    once = bench.flops(case, bench.ours, "embed")
    assert once == 2 * 2 * 16 * 16 * 3 * 6  # the clean embedding is not among it


@pytest.mark.parametrize("name", ["torchattacks", "foolbox"])
def test_a_missing_library_is_one_sentence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(bench, "case", None)  # refused before any work
    with pytest.raises(BadInput, match=f"^The package {name}, .* is not installed .*; install the extra 'dev'.*\\.$"):
        bench.run(settings(), SMALL)


def test_libraries_are_imported_only_where_they_are_used() -> None:
    assert not {"torchattacks", "foolbox"} & set(vars(bench))


# --- what is timed ---


def test_unknown_encoders_are_refused() -> None:
    with pytest.raises(BadInput, match="timm has no model 'vit_of_nobody'"):
        bench.case(settings(), SMALL, "vit_of_nobody")


def test_case_is_what_the_settings_ask_for(monkeypatch: pytest.MonkeyPatch, root: object) -> None:
    monkeypatch.setattr(bench, "HEAD_IMAGES", 6)
    asked = settings(attack={"eps": 0.1, "step": 0.01, "steps": 20, "best": True})
    case = bench.case(asked, SMALL, "embedded_vit")
    assert case.x.shape == (2, 3, 32, 32) and case.size == 32 and case.batch == 2 and case.tokens == 17
    assert (case.attack.eps, case.attack.step, case.attack.steps, case.attack.best) == (0.1, 0.01, 1, False)
    assert "embedded_vit.safetensors" in case.model.encoder.origin
    x = bench._all(bench.scenes(6, 32, 0))
    with torch.no_grad():
        logits = case.model(x)
    assert torch.equal(logits[:2].argmax(1), case.label)
    torch.testing.assert_close(logits.mean(0), torch.zeros(bench.CLASSES), atol=1e-3, rtol=0)
    assert float(logits.std()) == pytest.approx(3, abs=0.01)


def test_encoders_without_weights_are_random_but_all_blocks_count() -> None:
    encoder = bench._encoder(settings(), SMALL._replace(size=28), "dinov2_vits14")
    assert encoder.native == 28 and encoder.origin == "random, seed 0"
    assert all((block.ls1.gamma == 1).all() for block in encoder.backbone.blocks)


def test_ratios_are_paired() -> None:
    rates = pd.DataFrame({"a": [10.0, 40.0], "b": [5.0, 10.0]})  # the mean of ratios, not the ratio of means
    assert bench.paired(rates, "a", "b") == {
        "ratio": 3.0, "ratio_sd": pytest.approx(math.sqrt(2)), "ratio_min": 2.0, "ratio_max": 4.0,
    }  # fmt: skip


def test_rounds_are_interleaved_and_the_first_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "LEAST", 0.0)
    calls = []
    times = bench.timed({n: lambda n=n: calls.append(n) for n in "abc"}, 3, "cpu")
    first, rest = calls[:3], calls[3:]
    assert first == ["a", "b", "c"] and times.shape == (3, 3) and list(times) == ["a", "b", "c"]
    assert [sorted(set(rest[i : i + 3])) for i in (0, 3, 6)] == [["a", "b", "c"]] * 3
    assert [rest[i] for i in (0, 3, 6)] == ["a", "b", "c"]  # nobody is always first


def test_short_pieces_are_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = itertools.count(0.0, 0.1), []
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    assert bench.seconds(lambda: calls.append(1), "cpu", least=0.25) == pytest.approx(0.1)
    assert len(calls) == 3


def test_rates_are_image_steps_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    def planted_times(pieces: bench.Pieces, repeats: int, device: str, warm: bool = False) -> pd.DataFrame:
        return pd.DataFrame({name: [2.0, 4.0] if "torch" in name else [1.0, 1.0] for name in pieces})

    monkeypatch.setattr(bench, "timed", planted_times)
    monkeypatch.setattr(bench, "products", lambda case, precision: (print, 1e9))
    rows = {row["contender"]: row for row in bench.compare(planted_case(), "task", 2)}
    assert rows["ours"]["speed"] == 4 * 3 / 1.0  # images x steps / seconds
    assert rows["torchattacks"]["speed"] == (6 + 3) / 2 and rows["torchattacks"]["ratio"] == 1
    assert (rows["ours"]["ratio"], rows["ours"]["ratio_min"], rows["ours"]["ratio_max"]) == (3, 2, 4)
    assert rows["ours"]["ceiling_share"] == pytest.approx(12 * rows["ours"]["gflop"])  # of 1 GFLOP/s
    assert rows["foolbox"]["seconds"] == [1.0, 1.0]


def test_noise_is_drawn_before_anything_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = planted_case()
    monkeypatch.setattr(attacks, "random_start", lambda *args: pytest.fail("drawn while it is timed"))
    adv = bench.attack_case(case, bench.ours, "embed")
    assert (adv - case.x).abs().max() <= case.attack.eps + 1e-6 and not torch.equal(case.start, case.x)


def test_a_batch_that_does_not_fit_is_halved_and_the_table_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    original, asked = bench.compare, []

    def hungry(case: bench.Case, kind: str, repeats: int) -> list[bench.Row]:
        asked.append(case.batch)
        if case.batch > 2:
            raise torch.OutOfMemoryError("x")
        return original(case, kind, repeats)

    monkeypatch.setitem(bench.compute.TOKENS, "cpu", 100)  # 5 images
    monkeypatch.setattr(bench, "compare", hungry)
    found = bench.run(settings(), SMALL._replace(images="auto", encoders=("embedded_vit",), repeats=1))
    assert set(found["batch"]) == {2} and asked == [5, 2, 2]  # what was too much is not tried again
    assert "memory lacks for 4 images at a time; 2 are timed (--images)" in capsys.readouterr().out
    monkeypatch.setattr(bench, "compare", lambda *args: (_ for _ in ()).throw(torch.OutOfMemoryError("x")))
    with pytest.raises(torch.OutOfMemoryError):  # not a single image fits
        bench.run(settings(), SMALL._replace(encoders=("embedded_vit",)))


def test_fused_attention_has_a_row_where_the_package_avoids_it() -> None:
    assert "ours, fused attention" in bench.contenders("bf16", "cpu")
    assert not {"ours, fused attention"} & {*bench.contenders("fp32", "cpu"), *bench.contenders("bf16", "cuda")}
    explicit, case = compute.ExplicitAttention, planted_case()
    adv = bench.attack_case(case, bench.fused, "task")
    assert compute.ExplicitAttention is explicit and adv.shape == case.x.shape


def test_strength_counts_images_values_and_differences() -> None:
    case = planted_case()
    adv = case.x.clone()
    adv[0, 0, 0, 0] += 0.5
    adv[0, 0, 0, 1] += 1e-7
    row = bench.strength(case, adv, "task", case.x)
    assert row["accuracy"] in (0.75, 1.0) and row["largest"] == pytest.approx(0.5) == row["max_change"]
    assert row["identical"] == pytest.approx(1 - 2 / adv.numel())
    assert row["near"] == pytest.approx(1 - 1 / adv.numel())
    assert bench.strength(case, case.x, "embed")["loss"] == 0
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(case.model(case.x), case.label, reduction="none")
    assert bench.strength(case, case.x, "task")["loss_se"] == pytest.approx(float(loss.std() / 2))


def test_peak_memory_sees_what_is_held_for_a_moment() -> None:
    def hold() -> None:
        torch.ones(20_000_000).sum()  # 80 MB

    assert 70 < bench.peak_memory(hold, "cpu") < 160


def test_ceiling_counts_its_flops() -> None:
    case = planted_case()
    piece, flops = bench.products(case, "fp32", times=3)
    with bench._Flops() as count:
        piece()
    assert count.total == flops == 3 * 2 * 2 * (4 * 17) * 6 * 24


def test_every_contender_has_a_row_and_all_is_written(root: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "HEAD_IMAGES", 2)
    monkeypatch.setattr(bench, "LEAST", 0.0)
    monkeypatch.setattr(bench, "Bench", lambda **asked: SMALL._replace(**asked) if asked else SMALL)
    assert bench.main(["--device", "cpu", "--precision", "fp32", "--steps", "1", "--repeats", "2"]) == 0
    table = pd.read_csv(records.figures_dir("bench") / "contenders.csv")
    assert set(table["attack"]) == {"PGD", "EmbedAttack"} and (table["max_change"] <= 8 / 255 + 1e-6).all()
    pgd = table[table["attack"] == "PGD"].set_index("contender")
    assert {"ours", "torchattacks", "foolbox", "plain loop"} <= set(pgd.index)
    assert pgd["loss"].max() - pgd["loss"].min() < 1e-3 and pgd.loc["ours", "near"] > 0.99
    assert "| embedded_vit | PGD | ours |" in (records.figures_dir("bench") / "contenders.md").read_text()
