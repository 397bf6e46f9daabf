"""Pretraining: augmentation, losses by hand, taking up a killed run, the shipped weights."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import trees
from safetensors import safe_open
from torch import Tensor

from ssl_robust.embedded import pretrain
from ssl_robust.embedded.backbone import WEIGHTS as EMBEDDED_WEIGHTS
from ssl_robust.embedded.backbone import embedded_backbone
from ssl_robust.formats.checkpoints import load_weights, read, recognise
from ssl_robust.items import Item, Part
from ssl_robust.settings import BadInput


def images(n: int = 24, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (n, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def run(tmp_path: Path, name: str = "run.pt", **changes: object) -> tuple[torch.nn.Module, list[dict]]:
    # 16 images in batches of 8: two steps an epoch
    options = {"checkpoint": tmp_path / name, "epochs": 1.0, "batch": 8}
    return pretrain.pretrain({"noise": images(16)}, **{**options, **changes})


# --- augmentation ---


def test_crops_keep_range_and_size() -> None:
    views = pretrain.multi_crop(images(6), rng(), global_px=40, local_px=32)
    assert [tuple(v.pixels.shape) for v in views] == [(6, 3, 40, 40)] * 2 + [(6, 3, 32, 32)] * 2
    for view in views:
        assert view.pixels.min() >= 0
        assert view.pixels.max() <= 1
        edges = view.box[:, 0].abs() + view.box[:, 1].abs()
        assert edges.max() <= 1 + 1e-6  # no crop leaves the image


def test_jitter_of_strength_zero_changes_only_the_grey_ones() -> None:
    pixels = images(64).float() / 255
    changed = (pretrain.jitter(pixels, 0.0, rng()) - pixels).abs().amax((1, 2, 3)) > 1e-4
    assert 0 < changed.float().mean() < 0.4


def test_a_flipped_full_crop_is_the_mirror_image() -> None:
    pixels = images(1).float() / 255
    box = torch.tensor([[[0.0, 0.0], [-1.0, 1.0]]])
    assert torch.allclose(pretrain.cut(pixels, box, 64), pixels.flip(3), atol=1e-4)


def test_shared_points_show_the_same_place_of_the_image() -> None:
    ramp = torch.linspace(0, 1, 64).expand(4, 3, 64, 64)  # grows with x: a value tells the place
    boxes = [pretrain.random_boxes(4, (0.4, 1.0), rng(s)) for s in (1, 2)]
    cuts = [pretrain.cut(ramp, box, 64).flatten(2).transpose(1, 2) for box in boxes]
    points = pretrain.shared_points(*boxes, 16, rng(3))
    here, there = (pretrain.tokens_at(c, p) for c, p in zip(cuts, points, strict=True))
    assert (here - there).abs().max() < 0.02


# --- losses ---


def test_contrastive_loss_by_hand() -> None:
    first, second = [1.0, 0.0], [0.0, 1.0]
    z = torch.tensor([[first, second], [first, second]])  # both views of an image agree, the images are orthogonal
    assert math.isclose(pretrain.contrastive_loss(z, 0.5).item(), math.log(2) - 2, rel_tol=1e-5)


def test_contrastive_loss_prefers_agreeing_views() -> None:
    z = torch.nn.functional.normalize(torch.randn(2, 16, 8, generator=rng()), dim=2)
    assert pretrain.contrastive_loss(torch.stack([z[0], z[0]])) < pretrain.contrastive_loss(z)


def test_learning_rate_follows_its_formula() -> None:
    rates = [pretrain.learning_rate(p, 2.0) for p in (0.03, 0.515, 1.0)]
    assert rates == pytest.approx([2.0, 1.0, 0.0], abs=1e-9)
    assert 0 < pretrain.learning_rate(0.0, 2.0) < 0.1


# --- runs ---


def test_a_run_changes_the_weights(tmp_path: Path) -> None:
    backbone, history = run(tmp_path, stop_after=2)
    losses = [v for k, v in history[-1].items() if k not in ("seconds", "images", "progress")]
    assert history[-1]["images"] == 16
    assert all(math.isfinite(v) for v in losses)
    assert not torch.equal(backbone.cls_token, pretrain.random_backbone().cls_token)


def test_contrastive_loss_falls(tmp_path: Path) -> None:
    histories = [run(tmp_path, epochs=4, stop_after=1)[1] for _ in range(6)]  # each takes up the one before
    assert [line["images"] for line in histories[-1]] == [8, 16, 24, 32, 40, 48]
    assert histories[-1][-1]["cls"] < histories[0][0]["cls"]


def test_a_run_taken_up_again_is_the_uninterrupted_one(tmp_path: Path) -> None:
    whole, _ = run(tmp_path, "whole.pt")
    run(tmp_path, "parts.pt", stop_after=1)
    parts, _ = run(tmp_path, "parts.pt")
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), parts.state_dict().values(), strict=True))


def test_a_run_starts_from_given_weights(tmp_path: Path) -> None:
    pretrain.save_weights(pretrain.random_backbone(3), tmp_path / "start.safetensors")
    backbone, _ = run(tmp_path, lr=0.0, start=tmp_path / "start.safetensors")
    wanted = pretrain.random_backbone(3).state_dict()
    with pytest.raises(BadInput, match="none.safetensors cannot be read"):
        run(tmp_path, start=tmp_path / "none.safetensors")
    assert all(torch.allclose(now, wanted[name], atol=1e-3) for name, now in backbone.state_dict().items())


def test_steps_in_bf16_are_those_in_fp32_but_for_rounding(tmp_path: Path) -> None:
    exact, rounded = (run(tmp_path, f"{kind}.pt", precision=kind, epochs=4)[1][-1] for kind in ("fp32", "bf16"))
    assert exact["cls"] != rounded["cls"]
    assert all(math.isclose(exact[name], rounded[name], rel_tol=0.03) for name in ("cls", "pool", "point"))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"minutes": 1.0}, "either in minutes or in epochs"),
        ({"epochs": None}, "either in minutes or in epochs"),
    ],
)
def test_bad_settings_are_refused(changes: dict, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=sentence):
        run(tmp_path, **changes)


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    run(tmp_path, stop_after=1)
    (tmp_path / "run.pt").write_bytes((tmp_path / "run.pt").read_bytes()[:1000])
    with pytest.raises(BadInput, match="run.pt is damaged"):
        run(tmp_path)


# --- data ---


def test_photographs_are_the_training_images_of_tiny_imagenet(tmp_path: Path) -> None:
    trees.tiny_imagenet(tmp_path, zipped=True)
    pools = pretrain.training_images(str(tmp_path), 0)
    assert {name: tuple(pool.shape) for name, pool in pools.items()} == {"tiny-imagenet": (12, 3, 16, 16)}
    assert pools["tiny-imagenet"].dtype == torch.uint8
    with pytest.raises(BadInput, match="'tiny_imagenet' .train. was not found"):
        pretrain.training_images(str(tmp_path / "none"), 0)


def test_photographs_come_archive_by_archive(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(path: Path, key: int) -> np.ndarray:
        return np.full((8, 8, 3), key, np.uint8)

    places = [("b.zip", "1"), ("a.zip", "3"), ("a.zip", "2")]
    items = [Item(name, Part(read, Path(file), int(name)), 0) for file, name in places]
    monkeypatch.setattr(pretrain.datasets, "list_items", lambda *_: items)
    pool = pretrain.training_images("data", 0)["tiny-imagenet"]
    assert pool[:, 0, 0, 0].tolist() == [2, 3, 1]


def test_batches_hold_both_pools_in_their_shares() -> None:
    pools = {"tiny-imagenet": torch.zeros_like(images(5)), "scenes": torch.ones_like(images(3))}
    batch = pretrain.draw(pools, 40, rng())
    assert batch.float().mean() == pytest.approx(pretrain.SCENES_SHARE)
    assert pretrain.draw({"scenes": pools["scenes"]}, 7, rng()).shape == (7, 3, 64, 64)


# --- weights ---


def test_linear_probe_reads_out_the_scenes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(pretrain.PROBES, "classification", {"epochs": 2, "batch": 8, "lr": 0.003})
    accuracy = pretrain.linear_probe(
        pretrain.random_backbone(), "classification", "scenes", n_train=16, n_val=8, n_test=10
    )
    assert accuracy in [k / 10 for k in range(11)]


def test_saved_weights_load_into_the_backbone(tmp_path: Path) -> None:
    source, target = pretrain.random_backbone(1), embedded_backbone()
    path = tmp_path / "weights.safetensors"
    assert pretrain.save_weights(source, path, objective="none") == path.stat().st_size
    load_weights(target, recognise(read(path), path)[0], "test")
    assert torch.allclose(target.cls_token, source.cls_token, atol=1e-3)
    assert [p.name for p in tmp_path.iterdir()] == ["weights.safetensors"]


def test_shipped_weights_are_small_half_precision_and_say_what_they_are() -> None:
    assert EMBEDDED_WEIGHTS.stat().st_size <= 12 * 2**20
    state, _ = recognise(read(EMBEDDED_WEIGHTS), EMBEDDED_WEIGHTS)
    load_weights(embedded_backbone(), state, "the embedded encoder")
    assert {t.dtype for t in state.values()} == {torch.float16}
    with safe_open(EMBEDDED_WEIGHTS, "pt") as file:
        assert {"objective", "images_seen", "data"} <= set(file.metadata())
