"""Precision, batch sizes and memory of attack steps."""

import planted
import pytest
import torch
from planted import images, model, target

from ssl_robust import attacks, compute, deacl, evaluate, records
from ssl_robust.settings import Attack
from ssl_robust.tasks import TASKS


def test_bf16_is_chosen_where_it_is_fast(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    assert compute.precision("auto", "cpu") == "bf16" and compute.precision("fp32", "cpu") == "fp32"
    for slow in ("avx512_f", "arm_bf16"):  # the second one has not been measured
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda slow=slow: {slow: True}, raising=False)
        assert compute.precision("auto", "cpu") == "fp32" and compute.precision("bf16", "cpu") == "bf16"
    for capability, expected in (((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda found=capability: found)
        assert compute.precision("auto", "cuda") == expected


def test_steps_in_bf16_stay_in_the_ball_and_predictions_stay_fp32():
    planted, x, label = model("classification"), images(4), torch.tensor([0, 1, 2, 0])
    seen = []

    def loss(adv, t):
        token = planted.encoder(adv)[0]
        seen.append(token.dtype)
        return attacks.margin(planted(adv), label)

    adv = attacks.pgd(x, loss, Attack(steps=2), precision="bf16")
    assert seen == [torch.bfloat16] * 2 and adv.dtype == torch.float32
    assert (adv - x).abs().max() <= Attack().eps + 1e-7 and planted(adv).dtype == torch.float32
    attacks.pgd(x, loss, Attack(steps=1), precision="fp32")
    assert seen[-1] == torch.float32


def test_attention_is_explicit_in_bf16_on_cpus_and_the_same(monkeypatch):
    asked, attention = [], torch.nn.functional.scaled_dot_product_attention
    query, key, value = torch.randn(3, 2, 4, 9, 8, generator=torch.Generator().manual_seed(0))
    fused, causal = attention(query, key, value), attention(query, key, value, is_causal=True)
    for precision in ("fp32", "bf16"):
        with compute.steps_in(precision, "cpu"), torch.profiler.profile() as profile:
            found = torch.nn.functional.scaled_dot_product_attention(query, key, value)
            masked = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        asked.append(sum("scaled_dot_product" in event.key for event in profile.key_averages()) > 0)
        explicit = [event.count for event in profile.key_averages() if event.key == "aten::matmul"]
        assert bool(explicit) == (precision == "bf16")
        assert torch.allclose(found.float(), fused, atol=0.02) and torch.allclose(masked.float(), causal, atol=0.02)
    assert asked == [True, True]  # the causal one
    mask = torch.ones(9, 9, dtype=torch.bool).tril()
    with compute.steps_in("bf16", "cpu"):
        for given in ({"attn_mask": mask}, {"is_causal": True}):
            found = attention(query=query, key=key, value=value, **given)
            again = attention(query, key, value, **given)
            assert torch.allclose(found.float(), causal, atol=0.02) and torch.equal(found, again)


def test_tf32_ends_where_it_began():
    assert torch.get_float32_matmul_precision() == "highest"
    with compute.steps_in("tf32", "cpu"):
        assert torch.get_float32_matmul_precision() == "high" and not torch.is_autocast_enabled("cpu")
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("kind", ["embed", "task"])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_attacks_move_the_embedding_within_the_ball_in_both_precisions(precision, task, kind):
    x, planted_model = images(4), model(task)
    ids = [str(i) for i in range(4)]
    adv = attacks.attacked(kind, planted_model, x, target(task, x), ids, Attack(steps=3), 0, precision)
    assert adv.dtype == torch.float32 and adv.isfinite().all() and adv.min() >= 0 and adv.max() <= 1
    assert (adv - x).abs().max() <= Attack().eps + 1e-7
    moved = (planted_model.embed(adv) - planted_model.embed(x)).flatten(1).norm(dim=1)
    noise = x + Attack().eps * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).sign()
    chance = (planted_model.embed(noise.clamp(0, 1)) - planted_model.embed(x)).flatten(1).norm(dim=1)
    assert (moved > 0).all() and (kind == "task" or (moved > chance).all())


@pytest.mark.parametrize("task", TASKS)
def test_cells_agree_in_both_precisions_and_say_which(task, toys):
    cells = {}
    for precision in ("fp32", "bf16"):
        row = {"name": "planted", "timm": "embedded_vit", "native": 24}
        settings = planted.settings(profile=precision, precision=precision, encoders=[row])
        model_, test = evaluate.prepare(task, "toys", settings.encoders[0], settings)
        for kind in ("clean", "embed", "task"):
            cells[precision, kind] = evaluate.Cell(model_, test, kind, settings).run()
    clean = cells["fp32", "clean"]
    assert cells["bf16", "clean"]["value"] == clean["value"] and cells["bf16", "clean"]["precision"] == "fp32"
    for kind in ("embed", "task"):
        exact, rounded = cells["fp32", kind], cells["bf16", kind]
        assert (exact["precision"], rounded["precision"]) == ("fp32", "bf16") and exact["key"] != rounded["key"]
        assert exact["nonfinite"] == rounded["nonfinite"] == 0
        assert abs(exact["value"] - rounded["value"]) <= 0.15 * max(1, clean["chance"])
    for precision in ("fp32", "bf16"):
        loss = clean["value"] - cells[precision, "task"]["value"]
        assert TASKS[clean["task"]].sign * loss > 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_deacl_trains_in_both_precisions(precision, toys):
    settings, teacher = planted.settings(precision=precision), planted.encoder()
    index = deacl.finetune(settings.encoders[0], teacher, settings)
    assert all(torch.tensor([*map(float, epoch.values())]).isfinite().all() for epoch in index["history"])
    tuned = records.read_tensors(planted.stored("deacl/planted/*/epoch_3.safetensors"))[0]
    before = teacher.backbone.state_dict()
    assert all(tuned[name].dtype == torch.float32 and not torch.equal(tuned[name], before[name]) for name in before)


def test_a_batch_fills_the_device_unless_a_number_is_given():
    assert compute.tokens_of(8, (64, 64)) == 65 and compute.tokens_of(14, (224, 225), windows=3) == 3 * (16 * 17 + 1)
    assert compute.batch_for(65, "cpu") * 65 <= compute.TOKENS["cpu"] < (compute.batch_for(65, "cpu") + 1) * 65
    assert compute.batch_for(10**9, "cpu") == 1 and compute.batch_for(65, "cpu", 7) == 7
    assert compute.batch_for(257, "cuda") > compute.batch_for(257, "cpu")
    ade20k = 150 * 512 * 683  # logits of an image: on GPUs they take more memory than its tokens
    assert compute.batch_for(2955, "cuda", logits=ade20k) == 7 and compute.batch_for(2955, "cuda") == 22
    assert compute.batch_for(65, "cpu", logits=ade20k) == compute.batch_for(65, "cpu")


MEMORY = (
    "[..] DefaultCPUAllocator: can't allocate memory: you tried", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling",
    "CUDA error: out of memory\nCUDA kernel errors might be",
)  # fmt: skip


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("x"), *map(RuntimeError, MEMORY)], ids=str)
def test_parts_are_halved_when_memory_runs_out(error):
    data, tried = torch.arange(11), []

    def work(rows):
        tried.append(len(data[rows]))
        if tried[-1] > 3:
            raise error
        return data[rows] * 2

    found, size = compute.in_parts(work, 11, 100)
    assert torch.equal(found, data * 2) and size == 3 and tried == [11, 6, 3, 3, 3, 2]


def test_several_tensors_are_joined_each_by_itself():
    data = torch.arange(10).view(5, 2)
    found, size = compute.in_parts(lambda rows: (data[rows], data[rows, :0]), 5, 2)
    assert torch.equal(found[0], data) and found[1].shape == (5, 0) and size == 2


def test_a_single_image_that_does_not_fit_and_other_errors_are_raised():
    def work(rows):
        raise torch.OutOfMemoryError("x")

    with pytest.raises(torch.OutOfMemoryError):
        compute.in_parts(work, 3, 4)

    def wrong(rows):
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        compute.in_parts(wrong, 3, 4)
