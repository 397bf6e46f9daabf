"""The program against other programs, loops that transcribe the equations, and answers in closed form."""

import importlib
import math

import pytest
import torch
from planted import Backbone, brightness_model, images, model, strong_attacks, target
from torch import nn

from ssl_robust import attacks, datasets, deacl, evaluate, metrics
from ssl_robust.datasets import IGNORE, Item
from ssl_robust.embedded.backbone import embedded_backbone
from ssl_robust.encoders import IMAGENET_MEAN, IMAGENET_STD, Encoder
from ssl_robust.heads import BINS, HEADS, MIN_DEPTH, TaskModel
from ssl_robust.settings import Attack, DeACL
from ssl_robust.strong import autoattack
from ssl_robust.tasks import TASKS

EPS = 8 / 255


def _library(name):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        pytest.fail(f"{name} cannot be imported ({error}); it belongs to the extra 'dev': pip install -e '.[dev]'.")


def _ids(count):
    return [f"image-{i}" for i in range(count)]


# --- PGD of other libraries from the same start ---


@pytest.fixture(scope="module")
def transformer():
    """The embedded architecture with random weights and a head of 5 classes, its clean predictions being the truth."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = Encoder(embedded_backbone(), "random", 64, IMAGENET_MEAN, IMAGENET_STD)
        return TaskModel("classification", encoder, HEADS["classification"](encoder.dim, 5)).eval()


@pytest.fixture(scope="module")
def exact(transformer):
    """Images, starts and an attack in whole multiples of 1/1024, in which fp32 projects without rounding.

    In 8/255 every library rounds its own way, by the last bit, and later gradients differ with it.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(257, (2, 3, 64, 64), generator=generator) / 256
    noise = torch.randint(-32, 33, x.shape, generator=generator) / 1024
    with torch.no_grad():
        return x, noise, transformer(x).argmax(1), Attack(eps=1 / 32, step=1 / 128, steps=6)


def _ours(planted, x, start, label, attack):
    return attacks.pgd(x, attacks.pgd_loss(planted, label), attack, start)


def _torchattacks(planted, x, noise, label, attack, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, low, high: noise.clone())
    return _library("torchattacks").PGD(planted, attack.eps, attack.step, attack.steps)(x, label)


def _foolbox(planted, x, noise, label, attack, monkeypatch):
    foolbox, eagerpy = _library("foolbox"), _library("eagerpy")
    pgd = foolbox.attacks.LinfPGD(abs_stepsize=attack.step, steps=attack.steps)
    monkeypatch.setattr(pgd, "get_random_start", lambda x0, epsilon: eagerpy.astensor(x0.raw + noise))
    bounded = foolbox.PyTorchModel(planted, bounds=(0, 1))
    return pgd.run(bounded, x, foolbox.criteria.Misclassification(label), epsilon=attack.eps)


OTHERS = pytest.mark.parametrize("other", [_torchattacks, _foolbox])


@OTHERS
@pytest.mark.parametrize("started", [False, True])
def test_pgd_makes_the_images_of_other_libraries_bit_for_bit(other, started, transformer, exact, monkeypatch):
    x, noise, label, attack = exact
    noise = noise if started else torch.zeros_like(noise)
    theirs = other(transformer, x, noise, label, attack, monkeypatch)
    ours = _ours(transformer, x, (x + noise).clamp(0, 1), label, attack)
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, x) and transformer(ours).argmax(1).ne(label).any()


@OTHERS
def test_pgd_in_the_papers_ball_differs_by_rounding_alone(other, monkeypatch):
    planted, x = model("classification"), images(4)
    label, attack = planted(x).argmax(1), Attack()
    start = attacks.random_start(x, attack.eps, _ids(4), 0)
    theirs = other(planted.eval(), x, start - x, label, attack, monkeypatch)
    assert torch.allclose(_ours(planted, x, start, label, attack), theirs, rtol=0, atol=2e-7)


# --- metrics of torchmetrics ---


@pytest.mark.parametrize("seed", range(6))
def test_miou_of_random_predictions_is_that_of_torchmetrics(seed):
    jaccard = _library("torchmetrics").classification.MulticlassJaccardIndex
    generator = torch.Generator().manual_seed(seed)
    classes = 3 + 4 * seed
    occur = torch.randperm(classes, generator=generator)  # some in neither, some in one of target and prediction only
    predicted = occur[torch.randint(max(1, classes // 2), (5, 8, 9), generator=generator)]
    truth = occur[torch.randint(max(1, classes // 3), (5, 8, 9), generator=generator) + classes // 4]
    truth[torch.rand(truth.shape, generator=generator) < 0.3] = IGNORE
    truth[0] = IGNORE  # an image of which nothing counts
    logits = nn.functional.one_hot(predicted, classes).movedim(-1, 1).float()
    stats = metrics.statistics("segmentation", logits, truth.to(torch.uint8), classes)
    reference = jaccard(classes, ignore_index=IGNORE)
    assert metrics.value("segmentation", stats) == pytest.approx(float(reference(predicted, truth)), abs=1e-6)
    singly = [float(reference(p[None], t[None])) for p, t in zip(predicted[1:], truth[1:], strict=True)]
    assert metrics.per_image("segmentation", stats)[1:] == pytest.approx(singly, abs=2e-6)


@pytest.mark.parametrize("seed", range(3))
def test_rmse_is_that_of_torchmetrics(seed):
    rmse = _library("torchmetrics").MeanSquaredError
    generator = torch.Generator().manual_seed(seed)
    truth, predicted = (12 * torch.rand(4, 7, 6, generator=generator) for _ in range(2))
    truth[torch.rand(truth.shape, generator=generator) < 0.3] = 0
    valid = (truth > 0) & (truth <= 10)
    stats = metrics.statistics("depth", predicted, truth, 0)
    assert metrics.value("depth", stats) == pytest.approx(float(rmse(squared=False)(predicted[valid], truth[valid])))
    singly = [float(rmse(squared=False)(p[v], t[v])) for p, t, v in zip(predicted, truth, valid, strict=True)]
    assert metrics.per_image("depth", stats) == pytest.approx(singly, abs=2e-6)


# --- equations 1 to 4, number by number ---


def _equation_1(logits, mask, t, steps):
    """SegPGD's loss of one image: logits (C, H, W), mask (H, W)."""
    weight, total = (t - 1) / (2 * steps), 0.0
    classes, height, width = logits.shape
    for r in range(height):
        for c in range(width):
            label = int(mask[r, c])
            if label == IGNORE:
                continue
            pixel = torch.log(sum(torch.exp(logits[k, r, c]) for k in range(classes))) - logits[label, r, c]
            right = max(range(classes), key=lambda k, r=r, c=c: float(logits[k, r, c].detach())) == label
            total = total + ((1 - weight) if right else weight) * pixel
    return total / (height * width)


def _equations_3_and_4(prediction, depth):
    """The depth head's loss of one image, depths (H, W); also what DepthPGD makes large."""
    height, width = depth.shape
    g = {
        (r, c): prediction[r, c].log() - depth[r, c].log()
        for r in range(height)
        for c in range(width)
        if 0 < depth[r, c] <= 10
    }
    squares, mean = sum(value**2 for value in g.values()) / len(g), sum(g.values()) / len(g)
    steps = 0.0
    for k in range(4):
        for r, c in g:
            if r % 2**k or c % 2**k:
                continue
            for neighbour in ((r + 2**k, c), (r, c + 2**k)):
                if neighbour in g:
                    steps = steps + (g[neighbour] - g[r, c]).abs()
    return (squares - 0.85 * mean**2).sqrt() + 0.5 * steps / len(g)


def _attacked_by_loops(planted, x, loss, attack, start):
    """PGD on one image (1, 3, H, W): ascend by signs, stay in the ball and in [0,1]."""
    adv = start
    for t in range(1, attack.steps + 1):
        adv = adv.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss(planted(adv)[0], t), adv)
        moved = adv.detach() + attack.step * torch.sign(gradient)
        adv = torch.maximum(torch.minimum(moved, x + attack.eps), x - attack.eps).clamp(0, 1)
    return adv


@pytest.mark.parametrize("task", ["segmentation", "depth"])
def test_attacks_on_dense_tasks_are_those_of_the_equations_by_loops(task):
    planted, x, attack = model(task, 1), images(2), Attack(steps=3)
    truth = target(task, x)
    if task == "segmentation":
        truth = truth.to(torch.uint8)
        truth[:, 5:9] = planted(x).argmax(1)[:, 5:9].to(torch.uint8)  # right ones among them
    found = attacks.attacked("task", planted, x, truth, _ids(2), attack, 0)
    start = attacks.random_start(x, attack.eps, _ids(2), 0)
    for i in range(2):
        loss = {
            "segmentation": lambda logits, t, i=i: _equation_1(logits, truth[i], t, attack.steps),
            "depth": lambda depth, t, i=i: _equations_3_and_4(depth, truth[i]),
        }[task]
        expected = _attacked_by_loops(planted, x[i : i + 1], loss, attack, start[i : i + 1])[0]
        # the sign of a gradient that is all but zero is up to rounding
        assert torch.isclose(found[i], expected, atol=1e-6).float().mean() > 0.999
        given = attacks.loss_for("task", planted, x[i : i + 1], truth[i : i + 1], attack.steps)
        for t in (1, 3):
            by_loops = float(loss(planted(found[i : i + 1])[0], t))
            assert float(given(found[i : i + 1], t).flatten()[0]) == pytest.approx(by_loops, rel=1e-5)


def test_equations_3_and_4_by_loops_on_scattered_valid_pixels():
    generator = torch.Generator().manual_seed(3)
    predicted, depth = (0.5 + 9 * torch.rand(3, 13, 10, generator=generator) for _ in range(2))
    depth[torch.rand(depth.shape, generator=generator) < 0.2] = 0
    expected = [float(_equations_3_and_4(p, d)) for p, d in zip(predicted, depth, strict=True)]
    assert attacks.depth_loss(predicted, depth).tolist() == pytest.approx(expected, rel=1e-5)


def test_the_gradient_of_deacl_is_that_of_equation_2():
    """Against finite differences of eq. 2 written out, in single weights of the encoder that is trained."""
    x, x_adv, gamma = images(3).double(), images(3, seed=1).double(), DeACL().gamma
    teacher, student = _doubled(0), _doubled(1)
    weight = student.backbone.proj.weight

    def equation_2():
        total = 0.0
        for image, attacked in zip(x, x_adv, strict=True):
            f, robust, moved = (e(i[None])[0][0] for e, i in ((teacher, image), (student, image), (student, attacked)))
            total += -_cosine(robust, f) - gamma * _cosine(moved, robust)
        return total

    for place in [(0, 0, 0, 0), (2, 1, 3, 2), (5, 2, 1, 1)]:
        middle, sides = float(weight[place]), []
        for shift in (1e-5, -1e-5):
            weight[place] = middle + shift
            sides.append(equation_2())
        weight[place] = middle
        weight.requires_grad_(True)
        preserve, robust = deacl.loss_terms(student, teacher(x)[0], x, x_adv)
        (gradient,) = torch.autograd.grad(preserve + gamma * robust, weight)
        weight.requires_grad_(False)
        assert float(gradient[place]) == pytest.approx((sides[0] - sides[1]) / 2e-5, rel=1e-4)


def _doubled(seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Encoder(Backbone(6, 4, 16), "planted", 16, (0.5,) * 3, (0.25,) * 3).double()


def _cosine(a, b):
    dot = sum(float(p) * float(q) for p, q in zip(a, b, strict=True))
    return dot / math.sqrt(sum(float(p) ** 2 for p in a) * sum(float(q) ** 2 for q in b))


# --- optima in closed form ---


def _darker_or_brighter(x, sign, eps=EPS):
    return (x + eps * sign).clamp((x - eps).clamp(min=0), (x + eps).clamp(max=1))


@pytest.mark.parametrize("seed", range(3))
def test_pgd_on_a_linear_encoder_and_head_ends_in_the_optimal_corner(seed):
    planted, x = model("classification", seed), images(4, seed=seed)
    planted.head.linear.weight[2], planted.head.linear.bias[2] = 0, -1e4  # leaves two classes
    label = torch.tensor([0, 1, 0, 1])
    # CLS is the mean of 16 patch tokens, each one convolution of its pixels divided by the standard deviation 0.25
    kernel = torch.einsum("d,dchw->chw", planted.head.linear.weight[1] - planted.head.linear.weight[0],
                          planted.encoder.backbone.proj.weight)  # fmt: skip
    towards_1 = kernel.repeat(1, 4, 4).sign()
    sign = torch.where(label[:, None, None, None] == 0, towards_1, -towards_1)
    attack = Attack(stop_when_broken=False)
    adv = attacks.attacked("task", planted, x, label, _ids(4), attack, 0)
    assert torch.equal(adv, _darker_or_brighter(x, sign))
    gap = lambda x: (planted(x)[:, 1] - planted(x)[:, 0]) * (1 - 2 * label)  # noqa: E731
    room = (kernel.repeat(1, 4, 4) * (adv - x)).flatten(1).sum(1) * (1 - 2 * label) / (16 * 0.25)
    assert gap(adv) - gap(x) == pytest.approx(room, rel=1e-3)


@pytest.mark.parametrize("task", ["classification", "depth"])
def test_embed_attack_on_a_linear_encoder_ends_in_one_of_the_two_optimal_corners(task):
    encoder = model("classification", 4, dim=1).encoder
    planted, x = TaskModel(task, encoder, HEADS[task](1, 2)), images(3, 4, low=0.1, high=0.9)  # one token
    adv = attacks.attacked("embed", planted, x, None, _ids(3), Attack(), 0)
    sign = encoder.backbone.proj.weight[0].sign()
    corners = torch.stack([_darker_or_brighter(x, sign), _darker_or_brighter(x, -sign)])
    assert (corners == adv).flatten(2).all(2).any(0).all()
    reach = EPS * encoder.backbone.proj.weight.abs().sum() / 0.25
    assert (planted.embed(adv) - planted.embed(x)).norm(dim=1) == pytest.approx(reach.expand(3), rel=1e-4)


# --- the whole pipeline where the optimum is known ---


def _subset(task, pictures, targets):
    items = [Item(f"{task}-{i}", *pair) for i, pair in enumerate(zip(pictures, targets, strict=True))]
    transform = datasets.transform(task, "test", "original", pictures[0].shape[-1])
    return datasets.Subset("toys", task, items, transform)


def _evaluated(planted, test, kind, attack=None):
    outcome = evaluate.evaluate(planted, test, kind, attack or Attack(), 3, 0, "cpu")
    return metrics.value(planted.task, outcome[0])


def _pictures(count, side=16, spread=0.05):
    """Gray levels around one half, with black and white pixels that a ball cannot darken or brighten further."""
    generator = torch.Generator().manual_seed(0)
    level = 0.5 + spread * (2 * torch.rand(count, 1, 1, 1, generator=generator) - 1)
    x = (level + 0.2 * torch.randn(count, 3, side, side, generator=generator)).clamp(0, 1)
    border = torch.rand(x.shape, generator=generator) < 0.1
    x[border] = x[border].round()
    return (255 * x).round().to(torch.uint8)


def test_accuracy_of_a_linear_classifier_through_the_whole_pipeline(toys):
    pictures = _pictures(24)
    x = pictures.float() / 255
    label = (x.mean((1, 2, 3)) > 0.5).long()
    label[:4] = 1 - label[:4]  # wrong from the beginning
    test = _subset("classification", list(pictures), label.tolist())
    optimum = _darker_or_brighter(x, (1 - 2 * label)[:, None, None, None])
    right = ((optimum.mean((1, 2, 3)) > 0.5) == label.bool()).float().mean()
    assert 0 < right < 20 / 24
    assert _evaluated(brightness_model(), test, "task") == pytest.approx(float(right))
    assert _evaluated(brightness_model(), test, "clean") == pytest.approx(20 / 24)


def test_miou_of_a_linear_segmenter_through_the_whole_pipeline(toys):
    pictures = _pictures(6)
    x, label = pictures.float() / 255, torch.tensor([0, 1, 0, 1, 0, 1])
    masks = [torch.full((16, 16), int(c), dtype=torch.uint8) for c in label]
    for mask in masks:
        mask[2:5, 3:7] = IGNORE
    optimum = _darker_or_brighter(x, (1 - 2 * label)[:, None, None, None])  # best for every pixel of the image alike
    expected = []
    for shown in (x, optimum):
        tokens = nn.functional.avg_pool2d(shown.mean(1, keepdim=True), 4) / math.sqrt(1 + 1e-5)  # of the batch norm
        bright = nn.functional.interpolate(tokens, scale_factor=4, mode="bilinear")[:, 0] > 0.5
        hits, union = [0, 0], [0, 0]
        for predicted, mask in zip(bright, masks, strict=True):
            for c in (0, 1):
                true, found = mask == c, (predicted.long() == c) & (mask != IGNORE)
                hits[c] += int((true & found).sum())
                union[c] += int((true | found).sum())
        expected.append((hits[0] / union[0] + hits[1] / union[1]) / 2)
    test = _subset("segmentation", list(pictures), masks)
    assert _evaluated(brightness_model("segmentation"), test, "clean") == pytest.approx(expected[0])
    assert _evaluated(brightness_model("segmentation"), test, "task") == pytest.approx(expected[1])
    assert 0 < expected[1] < expected[0] / 2


def _depth_model(slope, threshold=0.0, steep=False):
    """One token for 4 px; the farthest bin weighs relu(slope * (brightness - threshold)), all others nothing.

    steep: the nearest bin weighs relu of minus that.
    """
    encoder = Encoder(Backbone(1, 4, 4), "brightness", 4, (0.0,) * 3, (1.0,) * 3)
    encoder.backbone.proj.weight.fill_(1 / 48)
    encoder.backbone.proj.bias.zero_()
    head = HEADS["depth"](1)
    with torch.no_grad():
        head.conv.weight.zero_()
        head.conv.bias.zero_()
        for place, sign in ((-1, 1), (0, -1))[: 2 if steep else 1]:
            head.conv.weight[place, 0], head.conv.bias[place] = sign * slope, -sign * slope * threshold
    return TaskModel("depth", encoder, head)


def _depth_of(brightness, slope):
    """Expectation over the 256 bins, weights relu + 0.1, centres evenly between 0.001 and 10 m."""
    width = (10 - MIN_DEPTH) / BINS
    centres = [MIN_DEPTH + (i + 0.5) * width for i in range(BINS)]
    far = max(slope * brightness, 0)
    return (0.1 * sum(centres) + far * centres[-1]) / (0.1 * BINS + far)


def test_rmse_of_a_monotone_depth_model_through_the_whole_pipeline(toys):
    pictures = _pictures(6, side=4)
    x, truth = pictures.float() / 255, [9.9, 0.5, 9.5, 1.0, 9.0, 3.0]
    away = torch.tensor([-1.0 if depth > 8.5 else 1.0 for depth in truth])[:, None, None, None]
    depths = [torch.full((4, 4), depth) for depth in truth]
    for depth in depths:
        depth[0, 0] = 0  # not seen
    test = _subset("depth", list(pictures), depths)
    for kind, shown in (("clean", x), ("task", _darker_or_brighter(x, away))):
        predicted = [_depth_of(float(image.double().mean()), 60.0) for image in shown]
        expected = math.sqrt(sum((p - d) ** 2 for p, d in zip(predicted, truth, strict=True)) / 6)
        assert _evaluated(_depth_model(60.0), test, kind) == pytest.approx(expected, rel=1e-4)


# --- adversarial images that surely exist, or surely do not ---

ALL = [(task, kind) for task in TASKS for kind in ("task", *strong_attacks(task))]
AIMED = {"apgd_far": 0, "apgd_near": 1}  # the side on which the scene has to lie for the attack to hurt


def _planted(task, margins):
    """A model that decides by brightness, images that are `margins` away from its boundary, and the truth."""
    side = 4 if task == "depth" else 16
    x = (0.5 + torch.tensor(margins))[:, None, None, None].expand(-1, 3, side, side).clone()
    bright = (torch.tensor(margins) > 0).long()
    if task == "depth":
        ends = torch.tensor([MIN_DEPTH, 10.0])
        return _depth_model(1e4, 0.5, steep=True), x, ends[bright][:, None, None].expand(-1, 4, 4)
    truth = bright if task == "classification" else bright[:, None, None].expand(-1, 16, 16).to(torch.uint8)
    return brightness_model(task), x, truth


def _badness(task, planted, adv, truth):
    """Share of wrong labels, or of the depth range by which depths are off: 0 is right, 1 as wrong as can be; (B,)."""
    prediction = planted(adv)
    if task == "depth":
        return (prediction - truth).abs().flatten(1).mean(1) / 10
    return (prediction.argmax(1) != truth).float().reshape(len(adv), -1).mean(1)


@pytest.mark.parametrize(("task", "kind"), ALL)
def test_what_surely_exists_is_found_and_what_surely_does_not_is_not(task, kind, monkeypatch):
    monkeypatch.setattr(autoattack, "QUERIES", 5)
    margins = [0.01, -0.01, 0.025, -0.025, 0.045, -0.045]  # of a ball of 0.031
    planted, x, truth = _planted(task, margins)
    assert (_badness(task, planted, x, truth) < 0.15).all()
    adv = attacks.attacked(kind, planted, x, truth, _ids(6), Attack(steps=20 if kind in ("task", "mifgsm") else 4), 0)
    badness = _badness(task, planted, adv, truth)
    hurt = [i for i in range(4) if kind not in AIMED or (margins[i] > 0) == bool(AIMED[kind])]
    assert (badness[hurt] > 0.85).all()
    assert (badness[4:] < 0.15).all()
