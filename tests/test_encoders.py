"""Encoders are frozen functions of pixels in [0,1]: timm models with their authors' positions, and own callables."""

import copy
import itertools
import math
import sys
from pathlib import Path

import numpy as np
import planted
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer

from ssl_robust import encoders, records
from ssl_robust.embedded import backbone
from ssl_robust.settings import BadInput, EncoderRow, check
from ssl_robust.vit import resample

DATA = Path(__file__).parents[2] / "shared" / "data"
EMBEDDED = EncoderRow(name="embedded_vit")


@pytest.fixture(scope="module")
def embedded():
    return encoders.load(EMBEDDED)


@pytest.mark.parametrize("size", [(64, 64), (70, 51), (32, 96), (65, 64)])
def test_embedded_encoder_takes_any_size(embedded, size):
    x = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    cls, patches = embedded(x)
    assert cls.shape == (2, 160)
    assert patches.shape == (2, 160, -(-size[0] // 8), -(-size[1] // 8))
    assert cls.isfinite().all() and patches.isfinite().all() and not torch.allclose(cls[0], cls[1])
    assert embedded.unpad(torch.zeros(1, patches.shape[2] * 8, patches.shape[3] * 8), size).shape == (1, *size)


def test_embedded_encoder_is_its_stored_weights(embedded):
    stored = load_file(backbone.WEIGHTS)
    assert all(torch.equal(embedded.backbone.state_dict()[k], v.float()) for k, v in stored.items())
    assert stored.keys() == embedded.backbone.state_dict().keys()
    assert backbone.WEIGHTS.stat().st_size < 12e6
    assert sum(p.numel() for p in embedded.parameters()) < 6e6
    assert (embedded.native, embedded.patch, embedded.dim) == (64, 8, 160)


def test_an_image_is_encoded_alike_alone_and_in_a_batch(embedded):
    x = planted.images(4, 64)
    together, alone = embedded(x), embedded(x[2:3])
    assert torch.allclose(together[0][2], alone[0][0], atol=1e-4)
    assert torch.allclose(together[1][2], alone[1][0], atol=1e-4)


def test_patch_tokens_lie_on_their_grid():
    encoder = planted.brightness_model().encoder  # a token is the mean of its 4 x 4 pixels
    x = torch.rand(1, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    expected = x.mean(1).unfold(1, 4, 4).unfold(2, 4, 4).mean((-2, -1))
    assert torch.allclose(encoder(x)[1][:, 0], expected, atol=1e-6)


def test_normalisation_and_padding_with_the_mean_colour():
    encoder = planted.encoder(patch=8)
    x = torch.rand(1, 3, 13, 16, generator=torch.Generator().manual_seed(0))
    padded = torch.full((1, 3, 16, 16), 0.5)
    padded[:, :, 1:14] = x
    assert torch.allclose(encoder(x)[1], encoder.backbone.proj((padded - 0.5) / 0.25), atol=1e-5)


def test_frozen_means_frozen(embedded):
    wrapper = torch.nn.ModuleList([embedded]).train()
    assert wrapper.training and not any(m.training for m in embedded.modules())
    assert not any(p.requires_grad for p in embedded.parameters())
    x = planted.images(1, 64).requires_grad_()
    cls, patches = embedded(x)
    (cls.square().sum() + patches.square().sum()).backward()
    assert x.grad.abs().sum() > 0 and all(p.grad is None for p in embedded.parameters())


def test_hash_names_weights_normalisation_and_native_size():
    row = {"name": "e", "timm": "embedded_vit"}
    half = {"mean": [0.5] * 3, "std": [0.25] * 3}
    rows = [row, {**row, "normalise": half}, {**row, "normalise": {**half, "std": [0.5] * 3}}, {**row, "native": 96}]
    hashes = [encoders.load(EncoderRow(**r)).hash for r in rows]
    assert len(set(hashes)) == 4
    assert encoders.load(EncoderRow(**row)).hash == hashes[0]
    assert encoders.load(EncoderRow(**{**row, "name": "same"})).hash == hashes[0]


def test_random_initialisation_is_reproducible_and_not_the_trained_one(embedded):
    state = torch.random.get_rng_state()
    first, again, other = (encoders.random_init(EMBEDDED, seed).hash for seed in (0, 0, 1))
    assert first == again and len({first, other, embedded.hash}) == 3
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_copy_forgets_the_hash(embedded):
    assert embedded.hash
    trained = copy.deepcopy(embedded)
    trained.backbone.cls_token += 1
    assert trained.hash != embedded.hash == encoders.load(EMBEDDED).hash


@pytest.mark.parametrize(
    ("normalise", "mean", "std"),
    [
        ("model", 0.485, 0.229), ("imagenet", 0.485, 0.229), ("inception", 0.5, 0.5), ("none", 0.0, 1.0),
        ("clip", 0.48145466, 0.26862954), ({"mean": [0.1] * 3, "std": [0.2] * 3}, 0.1, 0.2),
    ],
)  # fmt: skip
def test_normalisation_is_the_models_or_the_rows(normalise, mean, std):
    encoder = encoders.load(EncoderRow(name="embedded_vit", normalise=normalise))
    assert float(encoder.mean[0]) == pytest.approx(mean) and float(encoder.std[0]) == pytest.approx(std)


# --- timm models ---

VIT = {"name": "vit", "timm": "test_vit", "normalise": "inception"}


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A timm model with a classifier, and the folder that holds its weights in two formats."""
    folder = tmp_path_factory.mktemp("weights")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(VIT["timm"], pretrained=False, num_classes=7).eval()
    save_file(model.state_dict(), folder / "vit.safetensors")
    torch.save(model.state_dict(), folder / "vit.pth")
    return model, folder


def test_a_local_timm_checkpoint_gives_timms_own_features(vit):
    model, folder = vit
    loaded = [
        encoders.load(EncoderRow(**VIT, checkpoint=f"vit.{kind}"), str(folder)) for kind in ("safetensors", "pth")
    ]
    assert loaded[0].hash == loaded[1].hash and (loaded[0].native, loaded[0].patch) == (160, 16)
    assert loaded[0].origin == "state dict vit.safetensors"
    x = planted.images(1, 160)
    with torch.no_grad():
        tokens = model.forward_features((x - 0.5) / 0.5)
        cls, patches = loaded[0](x)
    assert torch.allclose(cls, tokens[:, 0], atol=1e-5)
    assert torch.allclose(patches, tokens[:, 1:].reshape(1, 10, 10, 64).permute(0, 3, 1, 2), atol=1e-5)


def test_the_real_checkpoint_in_the_data_folder():
    file = DATA / "weights" / "vit_tiny_patch16_224.tinyimagenet200.fp16.safetensors"
    if not file.is_file():
        pytest.skip(f"{file.name} is not in {DATA.parent.name}/data/weights beside the project")
    row = EncoderRow(name="e", timm="vit_tiny_patch16_224", checkpoint=f"weights/{file.name}")
    encoder = encoders.load(row, str(DATA))
    assert torch.equal(encoder.backbone.cls_token, load_file(file)["cls_token"].float())
    cls, patches = encoder(planted.images(1, 96))
    assert cls.shape == (1, 192) and patches.shape == (1, 192, 6, 6) and patches.isfinite().all()


def _random(name, seed=0):
    """A timm model at random with lively positions and statistics."""
    encoder = encoders.random_init(EncoderRow(name=name), seed)
    for key, value in encoder.backbone.state_dict().items():
        if "pos_embed" in key or "running_mean" in key:
            value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(seed)))
    return encoder


@pytest.mark.parametrize(
    ("name", "patch", "dim"),
    [("test_vit", 16, 64), ("test_resnet", 32, 96), ("test_convnext", 32, 64), ("mobilenetv3_small_050", 32, 288)],
)
def test_models_with_tokens_or_a_map_give_tokens_on_the_grid(name, patch, dim):
    encoder = _random(name)
    assert (encoder.patch, encoder.dim) == (patch, dim) and encoder.name == f"{name}_random"
    x = planted.images(2, 70)[..., :45].requires_grad_()
    cls, patches = encoder(x)
    assert cls.shape == (2, dim) and patches.shape == (2, dim, -(-70 // patch), -(-45 // patch))
    assert encoder.unpad(torch.zeros(1, patches.shape[2] * patch, patches.shape[3] * patch), (70, 45)).shape == (
        1,
        70,
        45,
    )
    for values in (cls, patches):
        assert torch.autograd.grad(values.square().sum(), x, retain_graph=True)[0].abs().sum() > 0


def test_a_vit_without_cls_token_gives_its_pooled_output():
    encoder = _random("test_vit2")  # a register but no CLS token; pools the mean of patches, then normalises
    x = planted.images(2, 64)
    cls, patches = encoder(x)
    assert patches.shape == (2, 64, 4, 4)
    assert torch.allclose(cls, encoder.backbone.fc_norm(patches.flatten(2).mean(2)), atol=1e-5)


def test_the_cifar_stem_keeps_small_images_large():
    encoder = encoders.random_init(EncoderRow(name="simclr_resnet18_cifar"))
    conv = encoder.backbone.conv1
    assert (conv.kernel_size, conv.stride, conv.padding) == ((3, 3), (1, 1), (2, 2))  # as solo-learn has it
    assert isinstance(encoder.backbone.maxpool, torch.nn.Identity)
    assert (encoder.native, encoder.patch, encoder.dim) == (32, 8, 512)
    assert encoder.mean.flatten().tolist() == pytest.approx(encoders.CIFAR_MEAN)
    x = planted.images(1, 32)
    with torch.no_grad():
        cls, patches = encoder(x)
        features = encoder.backbone.forward_features((x - encoder.mean) / encoder.std)
    assert features.shape[2:] == (5, 5) and patches.shape == (1, 512, 4, 4)
    assert torch.allclose(cls, features.mean((2, 3)), atol=1e-5)
    assert torch.allclose(patches[0, :, 1, 2], features[0, :, 1:3, 2:4].mean((1, 2)), atol=1e-5)


@pytest.mark.parametrize(("name", "known"), encoders.KNOWN.items())
def test_known_names_stand_for_models_that_timm_has(name, known):
    row = EncoderRow(name=name)
    assert encoders.describe(row) == encoders.describe(EncoderRow(name="other", timm=name)) == known
    if known.timm:
        cfg = timm.get_pretrained_cfg(known.timm)
        family = "dinov2" in known.timm or known.timm.endswith(".dino")
        assert (known.positions is not None) == family
        if known.public:  # the same by timm's own name, positions included
            assert encoders.describe(EncoderRow(name=name, timm=known.timm)) == known and cfg.has_weights
            assert known.native == cfg.input_size[-1]
        else:
            with pytest.raises(BadInput, match=f"'{name}': there are no public weights of {name}; give a file"):
                encoders.load(row)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"name": "e"}, "'e': timm has no model 'e'; take one of .*KNOWN: embedded_vit, dinov2_vits14"),
        ({"timm": "embedded_vit", "checkpoint": "gone.safetensors"}, "data/gone.safetensors cannot be read"),
        ({"timm": "vit_tiny_patch61"}, "'e': timm has no model 'vit_tiny_patch61'"),
        ({"timm": "resnet50.nothing"}, "'e': timm has no model 'resnet50.nothing'"),
        (
            {"timm": "vit_small_patch16_18x2_224"},
            "'e': there are no public weights of vit_small_patch16_18x2_224",
        ),
    ],
)
def test_rows_that_cannot_be_loaded_are_named(row, words):
    with pytest.raises(BadInput, match=words):
        encoders.load(EncoderRow(**{"name": "e", **row}), "data")


@pytest.mark.parametrize("name", ["test_mixer", "cait_xxs24_224", "test_nothing"])
def test_models_without_a_token_grid_are_refused(name, monkeypatch):
    class Pooled(torch.nn.Module):
        def forward_features(self, x):
            return x.mean((2, 3))

    if name.startswith("test"):
        monkeypatch.setattr(encoders, "_create", lambda *args: Pooled())
        monkeypatch.setitem(encoders.KNOWN, name, encoders.Known(name, 64))
    with pytest.raises(BadInput, match=f"'{name}': {name} gives no grid of tokens for images of every size"):
        encoders.random_init(EncoderRow(name=name))


def test_weights_that_cannot_be_fetched_ask_for_a_file(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(BadInput, match=r"could not be fetched \(OSError\); download them elsewhere"):
        encoders.load(EncoderRow(name="dino_vitb16"))


def test_weights_that_overflow_are_refused(vit):
    model, folder = vit
    huge = {k: v * 1e30 if k.endswith("fc1.weight") else v for k, v in model.state_dict().items()}
    save_file(huge, folder / "huge.safetensors")
    with pytest.raises(BadInput, match="'vit': its tokens are NaN or infinite with these weights; fetch or train them"):
        encoders.load(EncoderRow(**VIT, checkpoint="huge.safetensors"), str(folder))


# --- rows that cannot be meant ---


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"normalise": {"mean": [123.7, 116.3, 103.5], "std": [0.2] * 3}}, "mean': [123.7, 116.3, 103.5] lies outside"),
        ({"normalise": {"mean": [0.5] * 3, "std": [0.0, 0.2, 0.2]}}, "std.0' is 0.0: input should be greater than 0"),
        ({"normalise": {"mean": [0.5] * 3, "std": [58.4, 57.1, 57.4]}}, "divide what is of 0..255 by 255"),
        ({"native": 10**6}, "native' is 1000000: input should be less than or equal to"),
        ({"name": ".."}, "name' is '..'"),
        ({"name": "x" * 300}, "at most 100 characters"),
    ],
)
def test_rows_that_cannot_be_meant_are_refused(row, words):
    with pytest.raises(BadInput) as refusal:
        check(profile="x", encoders=[{"name": "embedded_vit"} | row])
    assert f"Parameter 'encoders.0.{next(iter(row))}" in str(refusal.value) and words in str(refusal.value)


def test_names_that_are_one_file_on_some_systems_are_not_two_rows():
    with pytest.raises(BadInput, match="encoder names .'a', 'A'. are not unique .capitals do not count.; give each"):
        check(profile="x", encoders=[{"name": "a"}, {"name": "A"}])


# --- check ---


def test_check_lists_every_bad_row(vit):
    _, folder = vit
    rows = [
        {"name": "a", "timm": "embedded_vit"},
        {"name": "b", "timm": "nothing"},
        {"name": "c", "timm": "embedded_vit", "checkpoint": "gone.pth"},
        {"name": "dinov2_vits14"},
        {"name": "simclr_resnet50"},
        {**VIT, "name": "d", "checkpoint": "vit.pth", "defenses": ["standard", "deacl"], "deacl_checkpoint": "vit.pth"},
        {"name": "simclr_resnet18_cifar", "defenses": ["deacl"], "deacl_checkpoint": "robust.ckpt"},
        {**VIT, "name": "e", "checkpoint": "no.pth", "defenses": ["standard", "deacl"], "deacl_checkpoint": "no.ckpt"},
        {"name": "f", "call": "no_such_module:encode"},
    ]
    problems = encoders.check(check(profile="x", encoders=rows, data_root=str(folder)))
    words = ["'b'", "gone.pth", "'simclr_resnet50'", "robust.ckpt", "no.pth", "no.ckpt", "no_such_module"]
    assert len(problems) == len(words) and all(w in p for w, p in zip(words, problems, strict=True)), problems


def test_every_file_of_a_given_run_is_checked(tmp_path):
    for epoch in (1, 2):
        records.write_bytes(backbone.WEIGHTS.read_bytes(), tmp_path / "robust" / f"epoch_{epoch}.safetensors")
    row = {"name": "embedded_vit", "defenses": ["deacl"], "deacl_checkpoint": str(tmp_path / "robust")}
    assert encoders.check(check(profile="x", encoders=[row])) == []
    (tmp_path / "robust" / "epoch_1.safetensors").write_bytes(b"half a file")
    assert ["epoch_1.safetensors" in why for why in encoders.check(check(profile="x", encoders=[row]))] == [True]


def test_check_fetches_nothing(monkeypatch):
    monkeypatch.setattr(timm, "create_model", None)
    assert encoders.check(check(profile="x", encoders=[{"name": n} for n in ("dino_vitb16", "mae_vitb16")])) == []


# --- position embeddings: the formulas again, in numpy ---


def _cubic(distance, a):
    """Keys' cubic kernel."""
    d = np.abs(distance)
    near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * (d**3 - 5 * d**2 + 8 * d - 4)
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


def _plain(old, new, offset):
    """(new, old) weights: four neighbours, positions beyond the border count for the border (a = -0.75)."""
    weights = np.zeros((new, old))
    for i in range(new):
        centre = (i + 0.5) * old / (new + offset) - 0.5
        for j in range(math.floor(centre) - 1, math.floor(centre) + 3):
            weights[i, min(max(j, 0), old - 1)] += _cubic(centre - j, -0.75)
    return weights


def _smooth(old, new):
    """(new, old) weights: the kernel is as wide as the step when shrinking, cut at the borders (a = -0.5)."""
    step = max(old / new, 1.0)
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    weights = _cubic((np.arange(old)[None] - centres[:, None]) / step, -0.5)
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize(("old", "grid"), [(37, (16, 16)), (16, (37, 37)), (14, (30, 40)), (37, (37, 74)), (8, (3, 8))])
@pytest.mark.parametrize("positions", [encoders.DINO, encoders.REGISTERS])
def test_positions_are_resampled_as_their_authors_do(old, grid, positions):
    embedding = torch.randn(1, old**2, 5, generator=torch.Generator().manual_seed(0))
    down, across = (_plain(old, n, 0.1) if positions == encoders.DINO else _smooth(old, n) for n in grid)
    square = embedding[0].double().numpy().reshape(old, old, 5)
    expected = torch.from_numpy(np.einsum("ia,jb,abd->ijd", down, across, square).reshape(1, -1, 5)).float()
    found = resample(embedding, grid, *positions)
    assert torch.allclose(found, expected, atol=1e-4)
    if positions == encoders.DINO:
        assert not torch.allclose(found, resample_abs_pos_embed(embedding, grid, num_prefix_tokens=0), atol=1e-2)
    assert torch.equal(resample(embedding, (old, old), *positions), embedding)


@pytest.fixture
def dino(monkeypatch):
    """A small stand-in under the name dino_vitb16."""
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 0}
    monkeypatch.setattr(encoders, "_create", lambda *args: VisionTransformer(**small, dynamic_img_size=True))
    return encoders.random_init(EncoderRow(name="dino_vitb16"))


def test_a_loaded_model_uses_the_positions_of_its_authors(dino):
    dino.backbone.pos_embed.copy_(torch.randn(1, 17, 24, generator=torch.Generator().manual_seed(0)))
    embedded = torch.zeros(2, 3, 6, 24)
    with torch.no_grad():
        tokens = dino.backbone._pos_embed(embedded)
    expected = resample(dino.backbone.pos_embed[:, 1:], (3, 6), 0.1, False)
    assert torch.equal(tokens[1, 1:], expected[0])
    assert torch.equal(tokens[0, 0], (dino.backbone.cls_token + dino.backbone.pos_embed[:, :1])[0, 0])


def test_positions_of_a_copy_are_its_own_and_can_be_trained(dino):
    x, student = planted.images(1, 48), copy.deepcopy(dino)
    before = dino(x)[1]
    student.backbone.requires_grad_(True)
    student(x)[1].square().sum().backward()
    assert student.backbone.pos_embed.grad[:, 1:].abs().sum() > 0
    with torch.no_grad():
        student.backbone.pos_embed += torch.randn(1, 17, 24, generator=torch.Generator().manual_seed(0))
        assert not torch.allclose(student(x)[1], before, atol=1e-3)
    assert torch.equal(dino(x)[1], before)


def test_the_hash_knows_how_positions_are_resampled(dino):
    before = dino.hash
    other = copy.deepcopy(dino)
    other.backbone.positions = encoders.REGISTERS
    assert other.hash != before == copy.deepcopy(dino).hash


# --- callables ---

numbers = itertools.count()
GOOD = """
import torch
filters = torch.linspace(-1, 1, 5 * 3 * 4 * 4).reshape(5, 3, 4, 4)
def encode(images):
    patches = torch.nn.functional.conv2d(images, filters, stride=4)
    return patches.mean((2, 3)), patches
"""


@pytest.fixture
def write(root, monkeypatch):
    """Writes a module into notebooks/ of a project of its own and returns a row that calls `encode` of it."""
    monkeypatch.setattr(sys, "path", sys.path[:])
    (root / "notebooks").mkdir()

    def module(text, function="encode", **row):
        name = f"own_encoder_{next(numbers)}"
        (root / "notebooks" / f"{name}.py").write_text(text)
        return EncoderRow(name="mine", call=f"{name}:{function}", native=row.pop("native", 32), **row)

    return module


def test_a_function_becomes_an_encoder(write):
    row, path = write(GOOD, normalise="inception"), sys.path[:]
    encoder = encoders.load(row)
    assert sys.path == path
    assert (encoder.name, encoder.native, encoder.patch, encoder.dim) == ("mine", 32, 4, 5)
    assert encoder.origin == f"callable {row.call}"
    x = planted.images(2, 18)
    cls, patches = encoder(x)
    assert cls.shape == (2, 5) and patches.shape == (2, 5, 5, 5)
    padded = torch.nn.functional.pad((x - 0.5) / 0.5, (1, 1, 1, 1))
    assert torch.equal(patches, sys.modules[row.call.partition(":")[0]].encode(padded)[1])
    assert encoders.load(write(GOOD)).native == 32 and encoders.load(write(GOOD, native=None)).native == 224


def test_what_a_function_computes_counts_in_the_hash_and_no_word_of_its_source(write):
    rows = [write(GOOD), write(GOOD), write(GOOD.replace("-1, 1", "-1, 2")), write(f'"""Said."""\n{GOOD}  # more\n')]
    same, again, other, said = (encoders.load(row).hash for row in rows)
    assert same == again == said != other


def test_helper_modules_and_files_that_a_function_reads_count_in_the_hash(write, root):
    helper, weights = root / "notebooks" / "own_helper.py", root / "weights.pt"
    text = GOOD.replace("filters = ", f"import own_helper\nfilters = torch.load({str(weights)!r}) * ").replace(
        "images, filters", "own_helper.scaled(images), filters"
    )
    found = []
    for scale, weight in ((1, 1.0), (1, 1.0), (2, 1.0), (1, 1.001)):
        helper.write_text(f"def scaled(images): return {scale} * images")
        torch.save(torch.tensor(weight), weights)
        sys.modules.pop("own_helper", None)
        found.append(encoders.load(write(text)).hash)
    assert found[0] == found[1] and len(set(found)) == 3


def test_tokens_that_differ_by_rounding_are_the_same_function(write):
    first = encoders.load(write(GOOD)).hash
    rounded = GOOD.replace("return patches.mean((2, 3)), patches", "return patches.mean((2, 3)) * (1 + 2e-7), patches")
    assert encoders.load(write(rounded)).hash == first


def test_other_models_that_the_same_weights_fit_are_other_encoders(monkeypatch):
    hashes = []
    for model in ("vit_tiny_patch16_224", "deit_tiny_patch16_224"):
        monkeypatch.setitem(encoders.KNOWN, "tiny", encoders.Known(model, 224, public=True))
        hashes.append(encoders.random_init(EncoderRow(name="tiny"), 0).hash)
    assert hashes[0] != hashes[1]
    monkeypatch.setitem(encoders.KNOWN, "one_more", encoders.Known("resnet18", 64))
    assert encoders.random_init(EncoderRow(name="tiny"), 0).hash == hashes[1]


BAD = [
    ("def encode(images): return images.mean((2, 3))", "must give cls and patches .* gives \\(2, 3\\) for images"),
    ("def encode(images): return images.mean((1, 2, 3)), images", r"gives \(2,\) and"),
    ("def encode(images): return images.mean((2, 3))[:1], images[:1]", r"gives \(1, 3\) and \(1, 3, 32, 32\)"),
    ("def encode(images): return images.mean((2, 3)), images[:, :, :8, :4]", "gives 8 x 4 patch tokens for 32 x 32 px"),
    ("def encode(images): return images.mean((2, 3)), images.round()", "without a gradient of the image"),
    ("def encode(images): return images.nothing", r"fails on images \(2, 3, 32, 32\) \(AttributeError: .*; correct it"),
    # answers that vary
    ("import torch\nimport torch.nn.functional as F\n"
     "def encode(images): images = F.dropout(images, 0.1); return images.mean((2, 3)), images",
     "gives other tokens when asked again, or among other images; put its modules into eval mode"),
    ("import torch\ndef encode(images): x = images + torch.rand(()); return x.mean((2, 3)), x",
     "gives other tokens"),
    ("def encode(images): x = images - images.mean((0, 2, 3), keepdim=True); return x[..., 0].mean(2), x",
     "gives other tokens"),
    ("def encode(images): x = images * (images / 0); return x.mean((2, 3)), x", "gives tokens that are NaN or"),
    ("import torch\ndef encode(images): x = torch.cat([images[:1], images[1:].detach()]); return x.mean((2, 3)), x",
     "without a gradient of the image"),
    ("def encode(images): raise RuntimeError('two\\n  lines')", r"fails on .* \(RuntimeError: two lines\); correct it"),
    ("raise SystemExit('bye')", "cannot be imported .SystemExit: bye"),
    ("class encode: pass", ":encode is no function; correct it"),
    ("def other(images): return 1", ":encode cannot be imported .AttributeError: .* has no attribute 'encode'"),
    ("def encode(images) return 1", "cannot be imported .SyntaxError"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "words"), BAD)
def test_callables_that_cannot_be_used_say_why(write, text, words):
    with pytest.raises(BadInput, match=f"'mine': .*{words}") as refusal:
        encoders.load(write(text))
    assert "\n" not in str(refusal.value)


NET = """
import torch
torch.manual_seed(SEED)
net = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 8, 8), torch.nn.BatchNorm2d(5), torch.nn.Dropout(0.5))
class Object:
    def __init__(self, net):
        self.net = net
    def __call__(self, images):
        return self.encode(images)
    def encode(self, images):
        patches = self.net(images)
        return patches.mean((2, 3)), patches
def around(net):
    def encode(images):
        patches = net(images)
        return patches.mean((2, 3)), patches
    return encode
def encode(images):
    return around(net)(images)
"""


@pytest.mark.parametrize("more", ["", "encode = Object(net); del net", "encode = Object(net).encode; del net",
                                  "encode = around(net); del net"])  # fmt: skip
def test_modules_that_a_function_uses_are_part_of_the_encoder(write, more):
    first, again, other = (encoders.load(write(NET.replace("SEED", str(n)) + more)) for n in (1, 1, 2))
    assert len(first.state_dict()) == 2 + 7  # mean and std; two tensors of the convolution, five of batch norm
    assert not any(m.training for m in first.modules()) and not any(p.requires_grad for p in first.parameters())
    assert first.hash == again.hash != other.hash
    x = planted.images(3, 32)
    assert torch.equal(first(x)[1], first(x)[1]) and torch.allclose(first(x)[1][:1], first(x[:1])[1], atol=1e-5)


def test_weights_that_differ_at_each_import_are_found_by_check(write):
    rows = [write(NET.replace("torch.manual_seed(SEED)", "")), write(NET.replace("SEED", "1"))]
    (problem,), fine = ([*encoders.check(check(profile="x", encoders=[row.model_dump()]))] for row in rows)
    assert "'mine': own_encoder_" in problem and "has other weights each time that its module is imported" in problem
    assert fine == []


def test_a_callable_that_ignores_the_size_is_stopped_where_it_does(write):
    fixed = "def encode(images): return images.mean((2, 3)), torch.nn.functional.adaptive_avg_pool2d(images, 8)"
    encoder = encoders.load(write(f"import torch\n{fixed}"))
    with pytest.raises(BadInput, match=r"shapes \(B, D\) and \(B, D, 4, 8\) but gives \(1, 3\) and \(1, 3, 8, 8\)"):
        encoder(torch.rand(1, 3, 16, 32))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ("no_such_module:encode", "No module named 'no_such_module'.*; correct it, 'module:function' is looked up in"),
        ("my_encoder", "my_encoder cannot be imported .*; correct it, 'module:function' is looked up in notebooks/"),
        (":encode", ":encode cannot be imported"),
    ],
)
def test_calls_that_name_nothing_are_refused(call, words):
    with pytest.raises(BadInput, match=words):
        encoders.load(EncoderRow(name="mine", call=call))


def test_a_callable_has_no_random_version():
    with pytest.raises(BadInput, match="'mine' is a callable and cannot be initialised"):
        encoders.random_init(EncoderRow(name="mine", call="my_encoder:encode"))


def test_the_example_callable_sees_colours_slopes_and_places():
    row = EncoderRow(name="mine", call="my_encoder:encode", native=64)
    encoder = encoders.load(row)
    assert (encoder.native, encoder.patch, encoder.dim) == (64, 8, 114)
    ramp = torch.linspace(0, 1, 64).expand(1, 3, 64, 64)  # brighter to the right
    cls, patches = encoder(ramp)
    right, down = patches[0, 51, 3, 3], patches[0, 52, 3, 3]
    assert right > 0.1 and down < 0.011  # 8 times the slope a pixel; the root of 1e-4
    assert torch.equal(patches[0, 110, :, 5], torch.linspace(-1, 1, 8))  # from the upper row to the lower one
    assert torch.allclose(patches[0, 0, 0], ramp[0, 0, 0].unflatten(0, (8, 8)).mean(1), atol=1e-5)
    assert torch.allclose(cls, patches.amax((2, 3)) - patches.mean((2, 3)))
    assert records.ROOT.joinpath("notebooks/my_encoder.py").is_file()
