"""The renderer: deterministic, balanced, and geometrically true."""

import numpy as np
import pytest
import torch

from ssl_robust.embedded import scenes
from ssl_robust.embedded.scenes import CATEGORIES, cached, render


@pytest.fixture(scope="module")
def sample():
    return render(range(60), "val")


def _equal(a, b):
    return all(torch.equal(getattr(a, f), getattr(b, f)) for f in ("images", "labels", "masks", "depths"))


def _lone(split, index, kind):
    """The room of a scene without its clutter, and a main object of the wanted category."""
    room = scenes._design(split, index)
    main = scenes._body(CATEGORIES.index(kind), np.random.default_rng(0))
    return scenes.replace(room, bodies=(main,))


def test_shapes_types_and_ranges(sample):
    assert sample.images.shape == (60, 3, 64, 64) and sample.images.dtype == torch.uint8
    assert sample.labels.shape == (60,) and sample.labels.dtype == torch.int64
    assert sample.masks.shape == (60, 64, 64) and sample.masks.dtype == torch.uint8
    assert sample.depths.shape == (60, 64, 64) and sample.depths.dtype == torch.float32
    assert sample.depths.min() > 0.1 and sample.depths.max() < 9
    assert sample.masks.max() <= len(CATEGORIES)
    assert sample.images.float().std(dim=(1, 2, 3)).min() > 8  # no blank picture


def test_size_may_be_a_pair():
    wide = render([0], "val", (32, 48))
    assert wide.images.shape == (1, 3, 32, 48) and wide.depths.shape == (1, 32, 48)


def test_same_bits_whatever_the_batch_and_no_global_randomness(sample):
    np.random.seed(0)
    torch.manual_seed(0)
    before = (torch.random.get_rng_state(), np.random.get_state()[1].copy())
    alone, pair = render([7], "val"), render([3, 7], "val")
    assert torch.equal(before[0], torch.random.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()
    for name in ("images", "labels", "masks", "depths"):
        assert torch.equal(getattr(alone, name)[0], getattr(sample, name)[7])
        assert torch.equal(getattr(pair, name)[1], getattr(sample, name)[7])


def test_splits_differ():
    images = [render([0], split).images for split in scenes.SPLITS]
    assert len({i.numpy().tobytes() for i in images}) == 3


def test_categories_are_balanced_and_the_main_object_is_visible(sample):
    assert torch.bincount(sample.labels).tolist() == [6] * len(CATEGORIES)
    share = (sample.masks == (sample.labels + 1)[:, None, None]).float().mean((1, 2))
    assert (share > 0.08).float().mean() >= 0.9 and share.min() > 0.02 and share.max() < 0.7
    kinds = [len(m.unique()) - 1 for m in sample.masks]  # main and one to three others, which may be hidden
    assert max(kinds) <= 4 and np.mean(kinds) > 1.5


def test_background_depth_lies_on_the_planes_of_the_room(sample):
    """Each background point, rebuilt from its depth, is on the floor, a wall or the ceiling; some are on the floor."""
    for i in range(10):
        room = scenes._design("val", i)
        d = scenes._rays(room, (64, 64), 1)
        bare = sample.masks[i].flatten().numpy() == 0
        p = (room.eye + d * sample.depths[i].flatten().numpy())[:, bare]
        assert np.minimum(np.abs(p - room.low), np.abs(p - room.high)).min(0).max() < 1e-4
        assert ((p > room.low - 1e-4) & (p < room.high + 1e-4)).all() and (np.abs(p[1]) < 1e-4).any()


def test_depth_is_along_the_optical_axis():
    """A hit's camera coordinates have the stored depth as their third one."""
    room = scenes._design("test", 1)
    d = scenes._rays(room, (64, 64), 1)
    t, *_ = scenes._trace(room, d)
    local = room.camera @ (t * d)
    assert np.abs(local[2] - t).max() < 1e-4


def test_lone_ball_is_a_sphere_on_the_floor():
    room = _lone("test", 0, "ball")
    body, d = room.bodies[0], scenes._rays(room, (64, 64), 1)
    t, which, _, _ = scenes._trace(room, d)
    radius = float(body.centre[1, 0])  # it rests on the floor
    assert 0.15 <= radius <= 0.4
    p = (room.eye + t * d)[:, which == 0]
    assert p.shape[1] > 100
    assert np.abs(np.linalg.norm(p - body.centre, axis=0) - radius).max() < 2e-3


@pytest.mark.parametrize("kind", CATEGORIES)
def test_every_object_rests_on_the_floor_inside_its_bounding_sphere(kind):
    for seed in range(4):
        body = scenes._body(CATEGORIES.index(kind), np.random.default_rng(seed))
        hull = body.to_world @ scenes._hull(body.kind)
        assert abs((hull + body.centre)[1].min()) < 1e-5
        assert np.linalg.norm(hull, axis=0).max() <= body.radius


@pytest.mark.parametrize("kind", CATEGORIES)
def test_normals_are_those_of_the_surface(kind):
    """Each hit normal agrees with the normal of the plane through neighbouring hits (differences of the depth)."""
    room = _lone("test", 2, kind)
    d = scenes._rays(room, (256, 256), 1)
    t, which, _, _ = scenes._trace(room, d)
    _, normal, _, _ = scenes._surface(room, d)
    p, on = ((room.eye + t * d).reshape(3, 256, 256), (which == 0).reshape(256, 256))
    cross = np.cross(p[:, :-1, 1:] - p[:, :-1, :-1], p[:, 1:, :-1] - p[:, :-1, :-1], axis=0)
    cross /= np.linalg.norm(cross, axis=0)
    inner = on[:-1, :-1] & on[1:, :-1] & on[:-1, 1:]
    agree = np.abs((cross * normal.reshape(3, 256, 256)[:, :-1, :-1]).sum(0))[inner]
    assert np.median(agree) > 0.995 and np.mean(agree > 0.95) > 0.85


def test_mask_boundaries_are_depth_discontinuities(sample):
    """Second differences of the inverse depth, which vanish on planes, are far larger where the mask changes."""
    inverse = 1 / sample.depths
    bend = (inverse[:, :, 2:] - 2 * inverse[:, :, 1:-1] + inverse[:, :, :-2]).abs()
    edge = (sample.masks[:, :, 2:] != sample.masks[:, :, 1:-1]) | (sample.masks[:, :, 1:-1] != sample.masks[:, :, :-2])
    room = (sample.masks[:, :, 2:] == 0) & (sample.masks[:, :, 1:-1] == 0) & (sample.masks[:, :, :-2] == 0)
    assert bend[edge].median() > 20 * bend[room].median() + 0.01


def test_cache_is_reused_extended_and_repaired(tmp_path):
    seen = []

    def progress(iterable, total, desc):
        seen.append(total)
        return iterable

    first = cached(tmp_path, "val", 4, 32, progress)
    (path,) = tmp_path.iterdir()
    assert "32x32" in path.name and scenes.VERSION in path.name
    assert _equal(cached(tmp_path, "val", 4, 32, progress), first) and seen == [4]
    assert len(cached(tmp_path, "val", 2, 32, progress).labels) == 2 and seen == [4]
    longer = cached(tmp_path, "val", 6, 32, progress)
    assert seen == [4, 2] and _equal(longer, render(range(6), "val", 32))
    path.write_bytes(path.read_bytes()[:-500])
    assert _equal(cached(tmp_path, "val", 6, 32, progress), longer) and seen == [4, 2, 6]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255  # a flipped byte within the arrays
    path.write_bytes(data)
    assert _equal(cached(tmp_path, "val", 6, 32, progress), longer) and seen == [4, 2, 6, 6]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(([0], "dev"), "'dev'.*train, val, test"), (([0], "val", 16), "16.*at least 32"), (([-1], "val"), "-1.*from 0")],
)
def test_bad_arguments_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        render(*arguments)
