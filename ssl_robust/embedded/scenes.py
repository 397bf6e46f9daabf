"""Embedded data: a deterministic ray caster of small rooms with everyday objects.

Every image comes with the category of its main object, a mask (0 = room, 1 + category = visible object) and metric
z-depth, so that classification, segmentation and depth estimation share one source of truth. Lengths are metres,
angles radians; the world is x right, y up, z away from the camera. Arrays of rays are component first: (3, M).
"""

import colorsys
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ..records import VERSIONS, read_tensors, write_tensors
from ..settings import BadInput

VERSION = f"v{VERSIONS['scenes']}"  # names the cache: of another version, other images
SPLITS = {"train": 101, "val": 202, "test": 303}  # first word of each image's seed, so splits never share a seed
TAU = 2 * np.pi
Array = np.ndarray


class Scenes(NamedTuple):
    """N scenes: images uint8 (N,3,H,W), labels int64 (N,), masks uint8 (N,H,W), depths float32 (N,H,W) in metres."""

    images: torch.Tensor
    labels: torch.Tensor
    masks: torch.Tensor
    depths: torch.Tensor


def _dot(a: Array, b: Array) -> Array:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]  # (M,): several times faster than a sum over an axis of three


# --- shapes: (origin (3,1)|(3,M), direction (3,M)) in object space -> distance (M,), inf on a miss; normal (3,M) ---


def _revolved(o: Array, d: Array, a: float, b: float, c: float, low: float, high: float, caps: bool = True):
    """Surface x^2 + z^2 = a + b y + c y^2, low <= y <= high: a sphere, cylinder, cone, barrel or bowl."""
    quad = d[0] ** 2 + d[2] ** 2 - c * d[1] ** 2
    quad = np.where(np.abs(quad) < 1e-7, np.float32(1e-7), quad)
    half = o[0] * d[0] + o[2] * d[2] - (0.5 * b + c * o[1]) * d[1]
    free = o[0] ** 2 + o[2] ** 2 - a - (b + c * o[1]) * o[1]
    disc = half**2 - quad * free
    root = np.sqrt(np.maximum(disc, 0))
    t = np.full(d.shape[1], np.inf, np.float32)
    for sign in (-1, 1):
        s = (sign * root - half) / quad
        y = o[1] + s * d[1]
        t = np.where((disc > 0) & (s > 1e-4) & (y >= low) & (y <= high) & (s < t), s, t)
    s = np.where(np.isfinite(t), t, 0)
    n = np.stack([o[0] + s * d[0], -0.5 * b - c * (o[1] + s * d[1]), o[2] + s * d[2]])
    for y, up in ((low, -1), (high, 1)) if caps else ():  # flat discs close both ends
        s = (y - o[1]) / d[1]
        inside = (o[0] + s * d[0]) ** 2 + (o[2] + s * d[2]) ** 2 <= a + b * y + c * y * y
        hit = inside & (s > 1e-4) & (s < t)
        t = np.where(hit, s, t)
        n = np.where(hit, np.array([[0], [up], [0]], np.float32), n)
    return t, n


def _box(o: Array, d: Array, low: tuple, high: tuple, ball: float = 0.0):
    """Axis-aligned box from outside; ball > 0 rounds the corners by cutting it with a sphere of that radius."""
    low, high = (np.array(v, np.float32)[:, None] for v in (low, high))
    t0, t1 = (low - o) / d, (high - o) / d
    near, far = np.minimum(t0, t1), np.maximum(t0, t1).min(0)
    axis, t = near.argmax(0), near.max(0)
    n = np.where(np.arange(3)[:, None] == axis, -np.sign(d), 0).astype(np.float32)
    if ball:
        dd, od, oo = _dot(d, d), _dot(o, d), _dot(o, o) - ball**2
        root = np.sqrt(np.maximum(od**2 - dd * oo, 0))
        start = np.where(root > 0, (-od - root) / dd, np.inf)
        far = np.minimum(far, (root - od) / dd)
        n = np.where(start > t, o + np.where(np.isfinite(start), start, 0) * d, n)
        t = np.maximum(t, start)
    return np.where((t < far) & (t > 1e-4), t, np.inf).astype(np.float32), n


def _torus(o: Array, d: Array, ring: float = 0.68, tube: float = 0.32):
    """Torus around the y axis, sphere traced from where the ray enters its bounding sphere (unit radius)."""
    speed = np.sqrt(_dot(d, d))
    e, o = d / speed, np.broadcast_to(o, d.shape)
    middle = -_dot(o, e)
    chord = np.sqrt(np.maximum(middle**2 - _dot(o, o) + 1.02, 0))
    t, gap = np.maximum(middle - chord, 0), np.ones_like(speed)
    open_ = np.arange(t.size)
    for steps in (8, 12, 20, 60):  # most rays settle early; a few graze the tube and need many steps
        at, s = (o[:, open_], e[:, open_]), t[open_]
        for _ in range(steps):
            p = at[0] + s * at[1]
            g = np.sqrt((np.sqrt(p[0] ** 2 + p[2] ** 2) - ring) ** 2 + p[1] ** 2) - tube
            s = s + g
        t[open_], gap[open_] = s, g
        open_ = open_[(g > 1e-3) & (s < (middle + chord)[open_])]
    p = o + t * e
    n = p * np.array([[1], [0], [1]], np.float32)
    n = p - n * (ring / np.maximum(np.sqrt(_dot(n, n)), 1e-4))
    return np.where((gap < 4e-3) & (t > 1e-3), t / speed, np.inf).astype(np.float32), n


# --- textures: (point (3,M), normal (3,M) in object space, u: 12 uniforms of the instance) -> albedo (3,M) in 0..1 ---

_LATTICE = np.random.default_rng(7).random((128, 128), dtype=np.float32)
_PIPS = np.zeros((7, 3, 3), bool)
for _value in range(1, 7):
    _PIPS[_value, 1, 1] = _value % 2
    _PIPS[_value, [0, 2], [0, 2]] = _value > 1
    _PIPS[_value, [0, 2], [2, 0]] = _value > 3
    _PIPS[_value, [0, 2], [1, 1]] = _value == 6


def _hsv(h: float, s: float, v: float) -> Array:
    return np.array(colorsys.hsv_to_rgb(h % 1, min(max(s, 0), 1), min(max(v, 0), 1)), np.float32)[:, None]  # (3,1)


def _frac(x: Array) -> Array:
    return x - np.floor(x)  # as x % 1, at a tenth of its cost


def _noise(x: Array, y: Array) -> Array:
    """Smooth periodic value noise in 0..1 with one lattice cell per unit."""
    fx, fy = np.floor(x), np.floor(y)
    i, j, x, y = fx.astype(np.int32) & 127, fy.astype(np.int32) & 127, x - fx, y - fy
    i1, j1 = (i + 1) & 127, (j + 1) & 127
    top = _LATTICE[i, j] * (1 - x) + _LATTICE[i1, j] * x
    return top * (1 - y) + (_LATTICE[i, j1] * (1 - x) + _LATTICE[i1, j1] * x) * y


def _cell(index: Array, salt: float) -> Array:
    return _LATTICE[index.astype(np.int32) & 127, int(salt * 127)]  # one random value in 0..1 per integer cell


def _turn(p: Array) -> Array:
    return np.arctan2(p[2], p[0]) / np.float32(TAU)  # azimuth in turns, -0.5 .. 0.5


def _face(p: Array, n: Array) -> tuple[Array, Array, Array]:
    axis = np.abs(n).argmax(0)
    return axis, np.where(axis == 0, p[2], p[0]), np.where(axis == 1, p[2], p[1])


def _ball(p: Array, n: Array, u: Array) -> Array:
    panel = np.floor(_turn(p) * (6 if u[0] < 0.7 else 4)) % 2 == 0
    first = _hsv(u[1], 0.8 + 0.2 * u[2], 0.8 + 0.2 * u[3])
    second = _hsv(0.1, 0.06, 0.95) if u[4] < 0.55 else _hsv(u[1] + 0.3 + 0.4 * u[5], 0.85, 0.9)
    return np.where(np.abs(p[1]) > 0.95, _hsv(0, 0, 0.95), np.where(panel, first, second))


def _crate(p: Array, n: Array, u: Array) -> Array:
    axis, a, b = _face(p, n)
    boards = (b + 1) * (2 + np.floor(2 * u[0]))
    frame = np.maximum(np.abs(a), np.abs(b)) > 0.78
    brace = (np.abs(a - b) < 0.2) & (u[1] < 0.5)
    tone = 0.75 + 0.3 * _cell(np.floor(boards) + 5 * axis, u[2]) + 0.25 * (_noise(3 * a + 9, 22 * b + 50 * u[3]) - 0.5)
    tone = np.where(frame | brace, 1.12 + 0.2 * (_noise(9 * a, 9 * b) - 0.5), tone)
    gap = (_frac(boards) < 0.13) & ~frame & ~brace
    edge = np.abs(np.maximum(np.abs(a), np.abs(b)) - 0.76) < 0.035
    return _hsv(0.065 + 0.04 * u[4], 0.42 + 0.25 * u[5], 0.5 + 0.25 * u[6]) * np.where(gap | edge, 0.35, tone)


def _barrel(p: Array, n: Array, u: Array) -> Array:
    stave = _turn(p) * 18
    lid = np.abs(n[1]) > 0.9
    stave = np.where(lid, p[0] * 7, stave)
    tone = 0.7 + 0.45 * _cell(np.floor(stave), u[0]) + 0.2 * (_noise(stave * 4, p[1] * 3) - 0.5)
    tone = np.where(_frac(stave) < 0.14, 0.45, tone)
    wood = _hsv(0.045 + 0.045 * u[1], 0.5 + 0.2 * u[2], 0.3 + 0.22 * u[3])
    steel = _hsv(0.5 + 0.15 * u[4], 0.15 + 0.4 * u[5], 0.28 + 0.2 * u[6])
    hoop = (np.abs(np.abs(p[1]) - 0.42) < 0.075) | (np.abs(p[1]) > 0.86)
    band = _hsv(0.6, 0.08, 0.35 + 0.3 * u[7])
    return np.where(hoop & ~lid, band, (wood if u[8] < 0.75 else steel) * tone)


def _cone(p: Array, n: Array, u: Array) -> Array:
    orange = _hsv(0.02 + 0.05 * u[0], 0.85 + 0.12 * u[1], 0.85 + 0.15 * u[2])
    white = _hsv(0.12, 0.04, 0.92)
    band = (np.abs(p[1] - 0.12) < 0.2) | ((u[3] < 0.5) & (np.abs(p[1] - 0.66) < 0.12))
    foot = _hsv(0.6, 0.1, 0.13) if u[4] < 0.5 else 0.85 * orange
    return np.where(p[1] < -0.84, foot, np.where(band, white, orange))


def _tyre(p: Array, n: Array, u: Array) -> Array:
    radius = np.sqrt(p[0] ** 2 + p[2] ** 2)
    block = _frac(_turn(p) * 26 + np.sign(p[1]) * 0.25) < 0.4
    tone = np.where((radius > 0.86) & (block | (np.abs(p[1]) < 0.03)), np.float32(0.35), 1)
    ring = np.abs(radius - 0.6) < 0.03 + 0.04 * (u[0] < 0.3)
    rim = radius < 0.42
    wall = _hsv(0.6 + 0.1 * u[1], 0.1, 0.35 + 0.5 * (u[0] < 0.3))
    return np.where(ring, wall, np.where(rim, 1.6, tone) * _hsv(0.6 + 0.5 * u[2], 0.12 * u[3], 0.13 + 0.1 * u[4]))


def _die(p: Array, n: Array, u: Array) -> Array:
    axis, a, b = _face(p, p)
    positive = np.take_along_axis(p, axis[None], 0)[0] > 0
    value = np.where(positive, 6 - axis, axis + 1)
    i, j = (np.clip(np.rint(v / 0.52), -1, 1).astype(np.int32) for v in (a, b))
    dot = ((a - 0.52 * i) ** 2 + (b - 0.52 * j) ** 2 < 0.19**2) & _PIPS[value, i + 1, j + 1]
    body = _hsv(0.05 + 0.1 * u[0], 0.04 + 0.14 * u[1], 0.86 + 0.1 * u[2])
    return np.where(dot, _hsv(0.98 * u[3], 0.3, 0.1) if u[4] < 0.8 else _hsv(0.99, 0.8, 0.6), body)


def _melon(p: Array, n: Array, u: Array) -> Array:
    wave = _turn(p) * (7 + np.floor(3 * u[0])) + 0.7 * (_noise(p[1] * 5 + 20 * u[1], _turn(p) * 9 + 40) - 0.5)
    dark = _hsv(0.33 + 0.05 * u[2], 0.65 + 0.2 * u[3], 0.2 + 0.15 * u[4])
    pale = _hsv(0.24 + 0.06 * u[5], 0.4 + 0.2 * u[6], 0.6 + 0.2 * u[7])
    return np.where(_frac(wave) < 0.55, dark, pale) * (0.9 + 0.2 * _noise(p[1] * 14, p[0] * 14))


def _bowl(p: Array, n: Array, u: Array) -> Array:
    white = _hsv(0.6, 0.05, 0.9 + 0.08 * u[0])
    blue = _hsv(0.57 + 0.08 * u[1], 0.65 + 0.25 * u[2], 0.5 + 0.35 * u[3])
    inside = n[0] * p[0] + n[2] * p[2] < 0
    zigzag = np.abs(p[1] + 0.08 - 0.14 * np.sin(np.float32(TAU) * _turn(p) * 8)) < 0.07
    outer = (p[1] > 0.32) | (np.abs(p[1] + 0.33) < 0.04) | (zigzag & (u[4] < 0.6))
    inner = (np.abs(p[1] - 0.36) < 0.04) | (p[1] < -0.34)
    paint = np.where(inside, inner, outer if u[5] < 0.6 else p[1] < 0.3)
    return np.where(paint, blue, white)


def _can(p: Array, n: Array, u: Array) -> Array:
    red = _hsv(0.96 + 0.06 * u[0], 0.8 + 0.15 * u[1], 0.6 + 0.3 * u[2])
    silver = _hsv(0.6, 0.04, 0.7 + 0.15 * u[3])
    lid = np.abs(n[1]) > 0.9
    rings = np.where(np.sqrt(p[0] ** 2 + p[2] ** 2) % 0.24 > 0.06, silver, 0.75 * silver)
    ribbon = np.abs(p[1] - 0.3 * np.sin(np.float32(TAU) * (_turn(p) * 2 + u[4]))) < 0.14 + 0.06 * u[5]
    body = np.where(np.abs(p[1]) > 0.84, silver, np.where(ribbon, _hsv(0, 0, 0.93), red))
    return np.where(lid, rings, body)


def _pumpkin(p: Array, n: Array, u: Array) -> Array:
    rib = np.abs(np.sin(np.float32(np.pi) * _turn(p) * (9 + np.floor(4 * u[0]))))
    skin = _hsv(0.045 + 0.045 * u[1], 0.78 + 0.2 * u[2], 0.75 + 0.22 * u[3]) * (0.5 + 0.5 * np.sqrt(rib))
    stem = _hsv(0.18 + 0.1 * u[4], 0.5, 0.3 + 0.15 * u[5])
    return np.where((p[1] > 0.66) & (p[0] ** 2 + p[2] ** 2 < 0.04), stem, skin)


# --- the one table of categories ---


@dataclass(frozen=True)
class _Category:
    """Parts share one object space; size is the diameter range in metres; squash the range of the height factor."""

    parts: tuple[Callable, ...]
    texture: Callable
    size: tuple[float, float]
    poses: tuple[str, ...]
    squash: tuple[float, float] = (1.0, 1.0)
    gloss: float = 0.1


_SPHERE = partial(_revolved, a=1, b=0, c=-1, low=-1.1, high=1.1, caps=False)
_CUBE = partial(_box, low=(-1, -1, -1), high=(1, 1, 1))
_STAVES = partial(_revolved, a=0.56, b=0, c=-0.24, low=-1, high=1)
_TAPER = partial(_revolved, a=0.0838, b=-0.1509, c=0.0679, low=-0.86, high=1)  # radius 0.513 below, 0.029 on top
_FOOT = partial(_box, low=(-0.66, -1, -0.66), high=(0.66, -0.85, 0.66))
_EGG = partial(_revolved, a=0.6, b=0, c=-0.6, low=-1.1, high=1.1, caps=False)
_SHELL = partial(_revolved, a=0.75, b=1, c=-1, low=-0.45, high=0.45, caps=False)
_BASE = partial(_revolved, a=0.18, b=0, c=0, low=-0.55, high=-0.42)
_TIN = partial(_revolved, a=0.3, b=0, c=0, low=-1, high=1)
_FLAT = partial(_revolved, a=1, b=0, c=-1.78, low=-1.1, high=1.1, caps=False)
_STEM = partial(_revolved, a=0.025, b=-0.01, c=0, low=0.6, high=1.02)

# name: parts, texture, diameter in metres, resting poses (repeated: more frequent)
_TABLE = {
    "ball": _Category((_SPHERE,), _ball, (0.3, 0.8), ("any",), gloss=0.3),
    "crate": _Category((_CUBE,), _crate, (0.5, 1.3), ("up",), squash=(0.6, 1.0)),
    "barrel": _Category((_STAVES,), _barrel, (0.6, 1.3), ("up", "up", "side"), squash=(0.8, 1.1)),
    "cone": _Category((_TAPER, _FOOT), _cone, (0.5, 1.1), ("up", "up", "up", "side")),
    "tyre": _Category((_torus,), _tyre, (0.5, 1.0), ("up", "side", "lean"), gloss=0.15),
    "die": _Category((partial(_CUBE, ball=1.45),), _die, (0.3, 0.8), ("cube",), gloss=0.2),
    "melon": _Category((_EGG,), _melon, (0.35, 0.8), ("side",), squash=(0.85, 1.05)),
    "bowl": _Category((_SHELL, _BASE), _bowl, (0.35, 0.8), ("up", "up", "lean"), squash=(0.8, 1.15), gloss=0.4),
    "can": _Category((_TIN,), _can, (0.3, 0.9), ("up", "up", "side"), gloss=0.4),
    "pumpkin": _Category((_FLAT, _STEM), _pumpkin, (0.35, 0.9), ("up", "tilt"), squash=(0.8, 1.15), gloss=0.15),
}
CATEGORIES: tuple[str, ...] = tuple(_TABLE)


# --- bodies: a category with a pose, a place and a size in the room ---


@dataclass(frozen=True)
class _Body:
    """to_world (3,3) maps object to world directions and lengths, centre (3,1); radius bounds the body around it."""

    kind: int
    to_world: Array
    to_object: Array
    centre: Array
    radius: float
    bulk: float  # geometric mean of its three extents over its diameter: 1 for a ball, less for slender things
    u: Array

    def hits(self, origin: Array, direction: Array, dd: Array) -> tuple[Array, Array, Array]:
        """World rays (dd (M,): their squared lengths) that hit -> indices (K,), distances (K,), normals (3,K)."""
        oc = origin - self.centre
        od, oo = _dot(oc, direction), _dot(oc, oc) - self.radius**2
        index = np.flatnonzero((od * od >= dd * oo) & ((od < 0) | (oo < 0)))
        o = self.to_object @ (oc if oc.shape[1] == 1 else oc[:, index])
        d = self.to_object @ direction[:, index]
        d = np.where(np.abs(d) < 1e-9, np.float32(1e-9), d)  # keeps the slab divisions finite
        t, n = _nearest(_TABLE[CATEGORIES[self.kind]].parts, o, d)
        keep = np.flatnonzero(np.isfinite(t))
        return index[keep], t[keep], np.where(_dot(n, d) > 0, -n, n)[:, keep]  # shells show both sides


def _nearest(parts: tuple[Callable, ...], o: Array, d: Array) -> tuple[Array, Array]:
    t, n = parts[0](o, d)
    for part in parts[1:]:
        t2, n2 = part(o, d)
        t, n = np.minimum(t, t2), np.where(t2 < t, n2, n)
    return t, n


def _spin(axis: int, angle: float) -> Array:
    c, s = np.cos(angle), np.sin(angle)
    i, j = [(1, 2), (2, 0), (0, 1)][axis]
    r = np.eye(3)
    r[i, i], r[i, j], r[j, i], r[j, j] = c, -s, s, c
    return r


def _rotation(pose: str, rng: np.random.Generator) -> Array:
    """Rotation (3,3) of a resting pose: up, side (axis level), tilt, lean (steep), cube (a face down) or any."""
    yaw, roll = _spin(1, rng.uniform(0, TAU)), _spin(1, rng.uniform(0, TAU))
    if pose == "cube":
        return yaw @ _spin(0, rng.integers(4) * TAU / 4) @ _spin(2, rng.integers(4) * TAU / 4)
    tilts = {"up": (0, 0), "side": (1.571, 1.571), "tilt": (0.1, 0.4), "lean": (0.5, 1.2), "any": (0, np.pi)}
    return yaw @ _spin(0, rng.uniform(*tilts[pose])) @ roll


@cache
def _hull(kind: int) -> Array:
    """Surface points (3,K) that matter for the lowest point, found by casting rays along the axes once."""
    grid = np.linspace(-1.2, 1.2, 97, dtype=np.float32)
    a, b = (v.ravel() for v in np.meshgrid(grid, grid))
    found = []
    for axis, sign in itertools.product(range(3), (-3, 3)):
        o, d = np.empty((3, a.size), np.float32), np.full((3, a.size), 1e-6, np.float32)
        o[axis], o[axis - 1], o[axis - 2], d[axis] = sign, a, b, -sign
        t, _ = _nearest(_TABLE[CATEGORIES[kind]].parts, o, d)
        found.append((o + np.where(np.isfinite(t), t, 0) * d)[:, np.isfinite(t)])
    points = np.concatenate(found, 1)
    ways = np.random.default_rng(3).normal(size=(1500, 3)).astype(np.float32)
    return points[:, np.unique((ways @ points).argmax(1))]


def _body(kind: int, rng: np.random.Generator, limit: float = np.inf) -> _Body:
    """A body resting on the floor at x = z = 0, its bounding radius at most limit metres."""
    category = _TABLE[CATEGORIES[kind]]
    rotation = _rotation(category.poses[rng.integers(len(category.poses))], rng)
    shape = rotation @ np.diag([1, rng.uniform(*category.squash), 1])
    hull = shape @ _hull(kind)
    reach = np.sqrt((hull**2).sum(0)).max()
    scale = min(rng.uniform(*category.size) / 2, limit) / reach
    to_world = scale * shape
    centre = np.array([[0], [-scale * hull[1].min()], [0]])
    bulk = float(np.cbrt(np.prod(np.ptp(hull, axis=1))) / (2 * reach))
    to_world, to_object, centre, u = map(np.float32, (to_world, np.linalg.inv(to_world), centre, rng.random(12)))
    return _Body(kind, to_world, to_object, centre, float(scale * reach * 1.03), bulk, u)


# --- rooms ---


@dataclass(frozen=True)
class _Room:
    """low, high (3,1): corners of the room; camera rows (3,3): right, up, forward; eye, light (3,1)."""

    low: Array
    high: Array
    eye: Array
    camera: Array
    slope: float  # tangent of half the field of view of the shorter side
    light: Array
    tint: Array
    ambient: float
    floor: Callable
    wall: Callable
    bodies: tuple[_Body, ...]


def _planks(x: Array, y: Array, u: Array) -> Array:
    row = np.floor(x / (0.09 + 0.1 * u[0]))
    along = y / 1.1 + _cell(row, u[1]) * 7
    tone = 0.75 + 0.35 * _cell(row * 5 + np.floor(along), u[2]) + 0.25 * (_noise(x * 40, y * 3) - 0.5)
    seam = (_frac(x / (0.09 + 0.1 * u[0])) < 0.06) | (_frac(along) < 0.012)
    return _hsv(0.05 + 0.06 * u[3], 0.25 + 0.4 * u[4], 0.4 + 0.4 * u[5]) * np.where(seam, 0.5, tone)


def _tiles(x: Array, y: Array, u: Array) -> Array:
    side = 0.2 + 0.3 * u[0]
    a, b = x / side, y / side
    odd = (np.floor(a) + np.floor(b)) % 2 == 0
    seam = (_frac(a) < 0.05) | (_frac(b) < 0.05)
    first = _hsv(u[1], 0.4 * u[2], 0.5 + 0.4 * u[3])
    second = first * (0.5 + 0.5 * u[4]) if u[5] < 0.6 else first
    tone = 0.92 + 0.16 * _cell(np.floor(a) * 7 + np.floor(b), u[6])
    return np.where(seam, 0.55, np.where(odd, first, second) * tone)


def _carpet(x: Array, y: Array, u: Array) -> Array:
    pile = 0.72 + 0.35 * _noise(x * 70, y * 70) + 0.2 * _noise(x * 9, y * 9)
    ground = _hsv(u[0], 0.25 + 0.5 * u[1], 0.3 + 0.4 * u[2])
    figure = (np.sin(x * 14) * np.sin(y * 14) > 0.45) & (u[3] < 0.4)
    return np.where(figure, _hsv(u[0] + 0.1, 0.4, 0.7), ground) * pile


def _concrete(x: Array, y: Array, u: Array) -> Array:
    stain = 0.5 * _noise(x * 3, y * 3) + 0.3 * _noise(x * 11, y * 11) + 0.2 * _noise(x * 47, y * 47)
    return _hsv(0.08 + 0.5 * u[0], 0.12 * u[1], 0.4 + 0.35 * u[2]) * (0.65 + 0.7 * stain)


def _paint(x: Array, y: Array, u: Array) -> Array:
    return _hsv(u[0], 0.55 * u[1], 0.55 + 0.4 * u[2]) * (0.93 + 0.14 * _noise(x * 4, y * 4))


def _stripes(x: Array, y: Array, u: Array) -> Array:
    first = _hsv(u[0], 0.5 * u[1], 0.6 + 0.35 * u[2])
    second = first * (0.6 + 0.3 * u[3]) if u[4] < 0.6 else _hsv(u[5], 0.4, 0.8)
    return np.where(_frac(x / (0.08 + 0.2 * u[6])) < 0.5, first, second)


def _brick(x: Array, y: Array, u: Array) -> Array:
    row = np.floor(y / 0.09)
    a = x / 0.24 + 0.5 * (row % 2)
    seam = (_frac(a) < 0.06) | (_frac(y / 0.09) < 0.15)
    tone = 0.7 + 0.5 * _cell(row * 11 + np.floor(a), u[0]) + 0.2 * (_noise(x * 40, y * 40) - 0.5)
    brick = _hsv(0.01 + 0.06 * u[1], 0.5 * (u[2] > 0.25) + 0.2 * u[3], 0.4 + 0.35 * u[4])
    return np.where(seam, 0.6 + 0.2 * u[5], brick * tone)


_FLOORS = (_planks, _tiles, _carpet, _concrete)
_WALLS = (_paint, _stripes, _brick, _planks, _paint)


def _view(main: _Body, rng: np.random.Generator) -> tuple[Array, Array, float, float]:
    """Camera that sees main in the wanted size: eye (3,), axes (3,3), slope, distance to main.

    Field of view and pitch vary little, as with one camera carried about, so that one image can tell metric distance.
    """
    slope, cover = np.tan(rng.uniform(0.45, 0.5)), min(rng.uniform(0.4, 0.68) / main.bulk**0.9, 0.95)
    distance = max(main.radius / np.sin(np.arctan(cover * slope)), main.radius + 0.55)
    pitch, azimuth = rng.uniform(0.28, 0.42), rng.uniform(-0.6, 0.6)
    away = np.array([np.sin(azimuth) * np.cos(pitch), np.sin(pitch), -np.cos(azimuth) * np.cos(pitch)])
    centre = main.centre[:, 0].astype(float)
    eye = centre + distance * away
    eye[1] = max(eye[1], 0.3)
    forward = _unit(centre - eye)
    right = _unit(np.cross([0, 1, 0], forward))
    slack = 0.8 * max(distance * slope - main.radius, 0)
    aim = centre + slack * (rng.uniform(-1, 1) * right + rng.uniform(-1, 1) * np.cross(forward, right))
    forward = _unit(aim - eye)
    right = _unit(np.cross([0, 1, 0], forward))
    axes = _spin(2, rng.normal() * 0.05) @ np.stack([right, np.cross(forward, right), forward])
    return eye, axes, slope, distance


def _unit(v: Array) -> Array:
    return v / np.sqrt(_dot(v, v))


def _clutter(main: _Body, view: tuple, low: Array, high: Array, rng: np.random.Generator) -> list[_Body]:
    """One to three bodies of other categories, at least as far as main and apparently smaller, none overlapping."""
    eye, axes, slope, distance = view
    ahead = np.arctan2(axes[2, 0], axes[2, 2])
    others = rng.permutation([k for k in range(len(CATEGORIES)) if k != main.kind])
    bodies, wanted = [main], 1 + rng.integers(1, 4)
    for attempt in range(24):
        if len(bodies) == wanted:
            break
        far = distance * rng.uniform(0.95, 2.6)
        turn = ahead + rng.uniform(-1, 1) * np.arctan(slope) * 0.95
        x, z = eye[0] + far * np.sin(turn), eye[2] + far * np.cos(turn)
        if min(x - low[0], high[0] - x, z - low[2], high[2] - z) < 0.1:
            continue
        body = _body(int(others[attempt % len(others)]), rng, 0.62 * main.radius * far / distance)
        body = replace(body, centre=body.centre + np.array([[x], [0], [z]], np.float32))
        room = min(x - low[0], high[0] - x, z - low[2], high[2] - z) > body.radius
        apart = all(np.hypot(x - b.centre[0, 0], z - b.centre[2, 0]) > 0.95 * (body.radius + b.radius) for b in bodies)
        if room and apart:
            bodies.append(body)
    return bodies


def _design(split: str, index: int) -> _Room:
    """Draw everything about one scene; each ten images run through a fresh permutation of the ten categories."""
    count = len(CATEGORIES)
    kind = np.random.default_rng([SPLITS[split], index // count, 1]).permutation(count)[index % count]
    rng = np.random.default_rng([SPLITS[split], index, 2])
    main = _body(int(kind), rng)
    view = eye, axes, slope, distance = _view(main, rng)
    side = max(abs(eye[0]), main.radius)
    back = main.radius + min(rng.uniform(2.4, 3.0), 6.8 - distance)
    low = np.array([-side - rng.uniform(1.0, 1.6), 0, eye[2] - 0.6])
    high = np.array([side + rng.uniform(1.0, 1.6), max(eye[1] + 0.4, rng.uniform(2.2, 3.2)), back])
    bodies = _clutter(main, view, low, high, rng)
    light = np.array([rng.uniform(-1.3, 1.3), rng.uniform(1.5, 2.6), rng.uniform(eye[2], 0.5)])
    light = np.clip(light, low + 0.1, high - 0.1)
    tint = rng.uniform(0.75, 1.2) * np.array([1 + rng.normal() * 0.06, 1, 1 - rng.normal() * 0.08])
    banks = (_FLOORS, _WALLS)
    floor, wall = (partial(bank[rng.integers(len(bank))], u=np.float32(rng.random(8))) for bank in banks)
    low, high, eye, light, tint = (v.astype(np.float32)[:, None] for v in (low, high, eye, light, tint))
    camera, slope = axes.astype(np.float32), float(slope)
    return _Room(low, high, eye, camera, slope, light, tint, rng.uniform(0.35, 0.6), floor, wall, tuple(bodies))


# --- rendering ---


def _rays(room: _Room, size: tuple[int, int], fine: int) -> Array:
    """World directions (3, H*fine*W*fine) with unit length along the optical axis, so that distance is z-depth."""
    h, w = size
    v = (np.arange(h * fine, dtype=np.float32) + 0.5) / fine - h / 2
    u = (np.arange(w * fine, dtype=np.float32) + 0.5) / fine - w / 2
    scale = np.float32(2 * room.slope / min(size))
    right, up, forward = room.camera[:, :, None, None]
    d = right * (u * scale) - up * (v * scale)[:, None] + forward
    d = d.reshape(3, -1)
    return np.where(np.abs(d) < 1e-9, np.float32(1e-9), d)


def _trace(room: _Room, d: Array) -> tuple[Array, Array, Array, Array]:
    """First hits of camera rays: depth (M,), body (M,) or -1, room axis (M,), object-space normal (3,M)."""
    walls = np.where(d > 0, room.high - room.eye, room.low - room.eye) / d
    axis, t = walls.argmin(0), walls.min(0)
    which, normal = np.full(t.size, -1), np.zeros_like(d)
    dd = _dot(d, d)
    for k, body in enumerate(room.bodies):
        index, s, n = body.hits(room.eye, d, dd)
        closer = s < t[index]
        index = index[closer]
        t[index], which[index], normal[:, index] = s[closer], k, n[:, closer]
    return t, which, axis, normal


def _surface(room: _Room, d: Array) -> tuple[Array, Array, Array, Array]:
    """What camera rays see: points (3,M), unit normals (3,M), albedo (3,M), gloss (M,)."""
    t, which, axis, n_object = _trace(room, d)
    p = room.eye + t * d
    normal, albedo = np.zeros_like(d), np.full_like(d, 0.85)
    gloss = np.zeros_like(t)
    bare = which < 0
    for a in range(3):
        index = np.flatnonzero(bare & (axis == a))
        normal[a, index] = -np.sign(d[a, index])
        x, y = p[2 * (a == 0), index], p[2 if a == 1 else 1, index]
        ground = room.floor(x, y) if a == 1 else np.where(y < 0.07, 0.85, room.wall(x, y))
        albedo[:, index] = np.where((a == 1) & (d[1, index] > 0), 0.85, ground)
    for k, body in enumerate(room.bodies):
        index = np.flatnonzero(which == k)
        category = _TABLE[CATEGORIES[body.kind]]
        n = n_object[:, index]
        albedo[:, index] = category.texture(body.to_object @ (p[:, index] - body.centre), n, body.u)
        normal[:, index] = _unit(body.to_object.T @ n)
        gloss[index] = category.gloss
    return p, normal, albedo, gloss


def _shade(room: _Room, d: Array) -> Array:
    """Colour (3,M) in 0..1 of camera rays: ambient, Lambert with cast shadows, a highlight, contact darkening."""
    p, n, albedo, gloss = _surface(room, d)
    p = p + 3e-3 * n
    to_light = room.light - p
    far_squared = _dot(to_light, to_light)
    far = np.sqrt(far_squared)
    toward = to_light / far
    lit = np.maximum(_dot(n, toward), 0)
    reach = float(np.linalg.norm(room.light - room.bodies[0].centre))
    lit = lit * 1.35 / (0.35 + 0.65 * far_squared / reach**2)
    occlusion, ground = np.ones_like(far), np.flatnonzero((n[1] > 0.99) & (p[1] < 0.01))
    facing = np.flatnonzero(lit > 0)  # only these can lose light to a shadow
    start, path, squared = p[:, facing], to_light[:, facing], far_squared[facing]
    for body in room.bodies:
        index, s, _ = body.hits(start, path, squared)
        lit[facing[index[s < 1]]] = 0
        off = p[:, ground] - body.centre
        occlusion[ground] *= 1 - 0.45 * np.exp(_dot(off, off) * (-2 / body.radius**2))
    shine, glossy = np.zeros_like(far), np.flatnonzero((lit > 0) & (gloss > 0))
    half = _unit(toward[:, glossy] - _unit(d[:, glossy]))
    shine[glossy] = gloss[glossy] * np.maximum(_dot(n[:, glossy], half), 0) ** 40
    sky = room.ambient * (0.8 + 0.2 * n[1]) * occlusion
    return np.clip(room.tint * (albedo * (sky + 0.75 * lit) + shine), 0, 1)


def _image(split: str, index: int, size: tuple[int, int]) -> tuple[Array, int, Array, Array]:
    """One scene, alone, so that its bits cannot depend on its batch: image, label, mask, depth."""
    h, w = size
    room = _design(split, index)
    depth, which, _, _ = _trace(room, _rays(room, size, 1))
    kinds = np.array([b.kind + 1 for b in room.bodies] + [0], np.uint8)  # index -1 is the room
    colour = _shade(room, _rays(room, size, 2)).reshape(3, h, 2, w, 2).mean((2, 4))
    rng = np.random.default_rng([SPLITS[split], index, 3])
    colour += rng.normal(0, 0.012, colour.shape)
    image = (colour.clip(0, 1) * 255).round().astype(np.uint8)
    return image, room.bodies[0].kind, kinds[which].reshape(h, w), depth.astype(np.float32).reshape(h, w)


def _checked(split: str, size: int | tuple[int, int]) -> tuple[int, int]:
    if split not in SPLITS:
        raise BadInput(f"Unknown split {split!r}; use one of {', '.join(SPLITS)}.")
    h, w = (size, size) if isinstance(size, int) else size
    if min(h, w) < 32:
        raise BadInput(f"Size {size!r} is below 32 pixels; use at least 32 per side.")
    return h, w


def _stack(rows: list[tuple], size: tuple[int, int]) -> Scenes:
    columns = zip(*rows, strict=True) if rows else ((),) * 4
    kinds = ((np.uint8, (3, *size)), (np.int64, ()), (np.uint8, size), (np.float32, size))
    arrays = (np.array(c, kind).reshape(-1, *shape) for c, (kind, shape) in zip(columns, kinds, strict=True))
    return Scenes(*map(torch.from_numpy, arrays))


def render(indices: Sequence[int], split: str, size: int | tuple[int, int] = 64) -> Scenes:
    """Render the scenes with these indices (>= 0) of split "train", "val" or "test"; size is a side or (H, W) >= 32.

    Each image depends on (split, index, size) alone, bit for bit, and no global random state is read or changed.
    Raises ValueError for an unknown split, a size below 32 or a negative index.
    """
    size = _checked(split, size)
    if any(i < 0 for i in indices):
        raise BadInput(f"Index {min(indices)} is negative; count scenes from 0.")
    return _stack([_image(split, int(i), size) for i in indices], size)


# --- cache ---


def _images(split: str, indices: range, size: tuple[int, int]) -> Iterator[tuple]:
    """_image of every index, in as many processes as there are cores: NumPy holds the interpreter for most of it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    image = partial(_image, split, size=size)
    if min(cores, len(indices) // 32) < 2:  # few scenes are done before other processes have begun
        yield from map(image, indices)
        return
    with ProcessPoolExecutor(cores, mp_context=get_context("fork")) as pool:
        yield from pool.map(image, indices, chunksize=8)


def cached(
    folder: Path, split: str, n: int, size: int | tuple[int, int] = 64, progress: Callable | None = None
) -> Scenes:
    """First n scenes of split, kept in one file of folder and re-used; a short file is extended, a broken one replaced.

    progress wraps the scenes as they come like tqdm: progress(iterable, total=..., desc=...). Errors as for render.
    """
    size = _checked(split, size)
    path, have = Path(folder) / f"scenes-{split}-{size[0]}x{size[1]}-{VERSION}.safetensors", _stack([], size)
    with suppress(BadInput):  # not there or damaged: rendered again
        have = Scenes(**read_tensors(path)[0])
    start = len(have.labels)
    if start < n:
        rows = _images(split, range(start, n), size)
        more = _stack(list(progress(rows, total=n - start, desc=f"render {split}") if progress else rows), size)
        have = Scenes(*map(torch.cat, zip(have, more, strict=True)))
        write_tensors(have._asdict(), {}, path)
    return Scenes(*(part[:n] for part in have))
