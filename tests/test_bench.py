"""The contenders do the same thing, what is measured is computed rightly, and no row is missing."""

import itertools
import json
import math
import sys

import bench
import bench_page
import choices
import pandas as pd
import planted
import pytest
import torch

from ssl_robust import encoders, records
from ssl_robust.heads import ClassificationHead, TaskModel
from ssl_robust.settings import Attack, BadInput, EncoderRow, check

ATTACK = Attack(steps=3)


def planted_case(count: int = 4) -> bench.Case:
    model, x = planted.model("classification"), planted.images(count)
    with torch.no_grad():
        label = model(x).argmax(1)
    ids = [str(i) for i in range(count)]
    return bench.Case("planted", model, x, label, ids, ATTACK, count, 0, "fp32")


@pytest.fixture(scope="module")
def small() -> TaskModel:
    """A vision transformer, so that shortened and whole forward passes differ."""
    encoder = encoders.random_init(EncoderRow(name="embedded_vit", native=32))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return TaskModel("classification", encoder, ClassificationHead(encoder.dim, 3))


def settings(**changes: object) -> object:
    sizes = {"encoders": ["embedded_vit"], "size": 32, "images": 2, "steps": 1, "repeats": 2}
    parameters = {"profile": "bench", "device": "cpu", "encoders": [{"name": "embedded_vit"}], "bench": sizes}
    return check(**(parameters | changes))


def test_batches_and_encoders_are_those_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"encoders": ["embedded_vit"], "gpu_encoders": ["dino_vitb16"], "size": 32, "steps": 1}
    asked = settings(bench=sizes)
    monkeypatch.setitem(bench.compute.TOKENS, "cpu", 100)
    assert bench.names(asked) == ["embedded_vit"] and bench.case(asked, "embedded_vit").batch == 100 // 17
    few = settings(bench=sizes | {"images": 3})
    assert bench.case(few, "embedded_vit").batch == 3 and len(bench.case(few, "embedded_vit").x) == 3
    monkeypatch.setattr(records, "pick_device", lambda device: "cuda")
    assert bench.names(asked) == ["embedded_vit", "dino_vitb16"]


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
    assert list(bench.able("embed", "fp32")) == ["ours", "ours fp32", "plain loop"]
    assert list(bench.able("task", "fp32")) == ["ours", "ours fp32", "torchattacks", "foolbox", "plain loop"]


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
        bench.run(settings())


def test_libraries_are_imported_only_where_they_are_used() -> None:
    assert not {"torchattacks", "foolbox"} & set(vars(bench))


# --- what is timed ---


def test_missing_section_and_unknown_encoders_are_refused() -> None:
    with pytest.raises(BadInput, match="no section 'bench'; add one"):
        bench.run(settings(bench=None))
    with pytest.raises(BadInput, match="no section 'bench'; add one"):
        choices.run(settings(bench=None))
    with pytest.raises(BadInput, match="timm has no model 'vit_of_nobody'"):
        bench.case(settings(bench={"encoders": ["vit_of_nobody"]}), "vit_of_nobody")


def test_case_is_what_the_settings_ask_for(monkeypatch: pytest.MonkeyPatch, root: object) -> None:
    monkeypatch.setattr(bench, "HEAD_IMAGES", 6)
    asked = settings(attack={"eps": 0.1, "step": 0.01, "steps": 20, "best": True})
    case = bench.case(asked, "embedded_vit")
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
    encoder = bench._encoder(settings(bench={"encoders": ["dinov2_vits14"], "size": 28}), "dinov2_vits14")
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


# --- choices ---


def test_kept_tokens_encode_once(monkeypatch: pytest.MonkeyPatch) -> None:
    case, pieces, encoded = planted_case(2), {}, []

    def planted_times(given: bench.Pieces, repeats: int, device: str) -> pd.DataFrame:
        pieces.update(given)
        return pd.DataFrame({name: [1.0, 2.0] for name in given})

    def counted(*arguments: object) -> object:
        encoded.append(1)
        yield torch.ones(2, 6), None, torch.zeros(2).long()

    monkeypatch.setattr(bench, "timed", planted_times)
    monkeypatch.setattr(bench, "scenes", lambda count, side, seed: [0] * count)
    monkeypatch.setattr(choices.heads, "encoded", counted)
    (row,) = choices.cached_tokens(case, 2)
    for name, expected in (("kept", 1), ("encoded anew", choices.EPOCHS)):
        encoded.clear()
        pieces[name]()
        assert len(encoded) == expected
    assert row["ratio"] == 1


def test_segpgds_loss_is_timed_on_equal_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = {}

    def planted_times(given: bench.Pieces, repeats: int, device: str) -> pd.DataFrame:
        gradients.update({name: piece() for name, piece in given.items()})
        return pd.DataFrame({"own backward": [1.0, 1.0], "autograd": [2.0, 4.0]})

    monkeypatch.setattr(bench, "timed", planted_times)
    monkeypatch.setattr(choices, "SEGMENTED", (2, 5, 12))
    (row,) = choices.segpgd(planted_case(), 2)
    torch.testing.assert_close(gradients["own backward"], gradients["autograd"], atol=1e-7, rtol=1e-4)
    assert gradients["autograd"].abs().max() > 1e-3
    assert row["ratio"] == 3 and row["value"] == 2 and row["unit"] == "images/s"


def test_explicit_attention_leaves_the_modules_as_they_were(small: TaskModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "LEAST", 0.0)
    case = planted_case(2)._replace(model=small, x=planted.images(2, 32))
    before = [b.attn.fused_attn for b in small.encoder.backbone.blocks]
    assert len(choices.fused_attention(case, 2)) == 1
    assert [b.attn.fused_attn for b in small.encoder.backbone.blocks] == before


def test_compilation_without_a_compiler_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices.shutil, "which", lambda name: None)
    (row,) = choices.compilation(planted_case(), 2)
    assert math.isnan(row["ratio"]) and "no C++ compiler" in row["note"]


def test_compilation_that_fails_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(function: object, **options: object) -> object:
        def call(x: torch.Tensor) -> torch.Tensor:
            raise NotImplementedError

        return call

    monkeypatch.setattr(choices.shutil, "which", lambda name: name)
    monkeypatch.setattr(torch, "compile", broken)
    (row,) = choices.compilation(planted_case(), 2)
    assert math.isnan(row["ratio"]) and row["note"] == "compiling failed (NotImplementedError)"


def test_when_compiling_pays() -> None:
    case = planted_case()  # batches of 4
    faster = pd.DataFrame({"compiled": [8.0], "not compiled": [4.0]})  # steps of 0.5 s and 1 s
    said = choices._pays(case, 10.0, faster)
    assert "takes 10 s" in said and "pays after 20 such steps" in said
    slower = pd.DataFrame({"compiled": [4.0], "not compiled": [8.0]})
    assert "never pays" in choices._pays(case, 10.0, slower)


# --- tables ---


@pytest.fixture(scope="module")
def measured() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Both tables of the embedded encoder, small and in a hurry."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name, value in (
            (bench, "LEAST", 0.0), (bench, "HEAD_IMAGES", 2),
            (choices, "LOADED", 2), (choices, "EPOCHS", 2), (choices, "SEGMENTED", (1, 3, 8)),
        ):  # fmt: skip
            patch.setattr(module, name, value)
        return bench.run(settings()), choices.run(settings(), compiled=[])


def test_table_has_every_contender_and_column(measured: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    table, _ = measured
    for kind, name in bench.ATTACK.items():
        assert list(table[table["attack"] == name]["contender"]) == list(bench.able(kind, "fp32"))
    numbers = table[["speed", "ratio", "ratio_sd", "memory_mb", "gflop", "ceiling_share", "accuracy", "loss", "near"]]
    assert numbers.notna().all(axis=None) and (table["speed"] > 0).all()
    assert (table["max_change"] <= ATTACK.eps + bench.ROUNDING).all()
    assert [len(s) for s in table["seconds"]] == [2] * len(table)


def test_every_choice_has_a_ratio_or_a_reason(measured: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    _, picks = measured
    wanted = {
        "weights", "last block", "patch embedding", "precision", "attention", "batch", "broken images",
        "tokens of head training", "windows in a batch", "SegPGD's loss", "loading",
        "memory by steps", "memory by batch",
    }  # fmt: skip
    assert set(picks["choice"]) == wanted and list(picks) == choices.COLUMNS
    without = picks[picks["ratio"].isna()]
    assert set(without["choice"]) <= {"patch embedding", "precision"} and (without["note"] != "").all()
    bf16 = picks[picks["choice"] == "precision"].iloc[0]
    assert "bf16: accuracy" in bf16["note"] and "fp32: accuracy" in bf16["note"]  # its strength, timed or not


def test_everything_is_written(measured: tuple[pd.DataFrame, pd.DataFrame], root: object) -> None:
    text = bench_page.write(settings(), *measured)
    folder = records.figures_dir("bench")
    assert {p.name for p in folder.iterdir()} >= {"bench.csv", "choices.csv", "bench.json", "bench.md", "bench.png"}
    content = json.loads((folder / "bench.json").read_text())
    assert len(content["contenders"]) == len(measured[0]) and len(content["choices"]) == len(measured[1])
    assert all(f"| {name} (" in text for name in bench.contenders("fp32"))
    assert len(pd.read_csv(folder / "bench.csv")) == len(measured[0])


def test_notes_say_what_was_reached(measured: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    table, picks = measured
    slow = " ".join(bench_page.notes(table.assign(ratio=1.0), picks))
    fast = " ".join(bench_page.notes(table.assign(ratio=1.2), picks))
    assert "(aim: 1.1; not reached)" in slow and "(aim: 1.1; reached)" in fast
    quick = table.assign(precision=["bf16" if c == "ours" else "fp32" for c in table["contender"]], ratio=2.3)
    assert "(aim: 2.2; reached)" in " ".join(bench_page.notes(quick, picks))


def test_notes_say_that_bf16_could_not_be_measured(
    measured: tuple[pd.DataFrame, pd.DataFrame], monkeypatch: pytest.MonkeyPatch
) -> None:
    table, case = measured[0], planted_case()
    monkeypatch.setattr(bench_page.compute, "fast_bf16", lambda device: False)
    picks = pd.DataFrame(choices.bf16(case, 2))
    said = bench_page.notes(table.assign(precision="fp32"), picks)[-1]
    assert "its speed could not be measured here" in said and "Strength, planted, on 4 images bf16: accuracy" in said
    monkeypatch.setattr(bench_page.compute, "fast_bf16", lambda device: True)
    assert "the setting precision is fp32" in bench_page.notes(table.assign(precision="fp32"), picks)[-1]


def test_remarks_name_choices_that_bring_nothing() -> None:
    rows = [("a", 0.8, 0.9), ("b", 0.9, 1.2), ("c", 1.1, 1.3), ("d", math.nan, math.nan)]
    picks = pd.DataFrame(rows, columns=["choice", "ratio_min", "ratio_max"])
    picks = picks.assign(ratio=picks["ratio_min"], option="on", encoder="e", unit="image steps/s")
    said = bench_page.remarks(picks)
    assert "Slower in every round: a (on, e)." in said
    assert "Faster in some rounds and slower in others: b (on, e)." in said
