"""Encoders are frozen functions of pixels in [0,1]; weights that are not exactly the model's are refused."""

from pathlib import Path

import planted
import pytest
import timm
import torch
from safetensors.torch import load_file, save, save_file

from ssl_robust import encoders
from ssl_robust.settings import BadInput, EncoderRow, check

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
    stored = load_file(encoders.EMBEDDED_WEIGHTS)
    assert all(torch.equal(embedded.backbone.state_dict()[k], v.float()) for k, v in stored.items())
    assert stored.keys() == embedded.backbone.state_dict().keys()
    assert encoders.EMBEDDED_WEIGHTS.stat().st_size < 12e6
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


@pytest.mark.parametrize("size", [(70, 51), (64, 64), (1, 9)])
def test_unpad_undoes_the_padding(size):
    encoder, x = planted.encoder(patch=8), torch.rand(2, 3, *size)
    padded = torch.nn.functional.pad(x, encoder.padding(*size))
    assert padded.shape[-2] % 8 == padded.shape[-1] % 8 == 0
    assert torch.equal(encoder.unpad(padded, size), x)


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
    rows = [row, {**row, "mean": [0.5] * 3}, {**row, "std": [0.5] * 3}, {**row, "native": 96}]
    hashes = [encoders.load(EncoderRow(**r)).hash for r in rows]
    assert len(set(hashes)) == 4
    assert encoders.load(EncoderRow(**row)).hash == hashes[0]
    assert encoders.load(EncoderRow(**{**row, "name": "same"})).hash == hashes[0]


def test_random_initialisation_is_reproducible_and_not_the_trained_one(embedded):
    state = torch.random.get_rng_state()
    first, again, other = (encoders.random_init(EMBEDDED, seed).hash for seed in (0, 0, 1))
    assert first == again and len({first, other, embedded.hash}) == 3
    assert torch.equal(torch.random.get_rng_state(), state)


# --- local checkpoints ---

VIT = {"name": "vit", "timm": "vit_tiny_patch16_224", "normalise": "inception"}


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
    assert loaded[0].hash == loaded[1].hash and (loaded[0].native, loaded[0].patch) == (224, 16)
    x = planted.images(1, 224)
    with torch.no_grad():
        tokens = model.forward_features((x - 0.5) / 0.5)
        cls, patches = loaded[0](x)
    assert torch.allclose(cls, tokens[:, 0], atol=1e-5)
    assert torch.allclose(patches, tokens[:, 1:].reshape(1, 14, 14, 192).permute(0, 3, 1, 2), atol=1e-5)


def test_the_real_checkpoint_in_the_data_folder():
    file = DATA / "weights" / "vit_tiny_patch16_224.tinyimagenet200.fp16.safetensors"
    if not file.is_file():
        pytest.skip(f"{file.name} is not in {DATA.parent.name}/data/weights beside the project")
    encoder = encoders.load(EncoderRow(**VIT, checkpoint=f"weights/{file.name}"), str(DATA))
    assert torch.equal(encoder.backbone.cls_token, load_file(file)["cls_token"].float())
    cls, patches = encoder(planted.images(1, 96))
    assert cls.shape == (1, 192) and patches.shape == (1, 192, 6, 6) and patches.isfinite().all()


def _planted_state(**changes):
    state = planted.encoder().backbone.state_dict() | changes
    return {k: v for k, v in state.items() if v is not None}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"proj.bias": None}, "missing proj.bias"),
        ({"blocks.0.gamma": torch.zeros(1)}, "left over blocks.0.gamma"),
        ({"proj.bias": torch.zeros(7)}, r"proj.bias has shape \(7,\), not \(6,\)"),
        ({f"more.{i}": torch.zeros(1) for i in range(5)}, "left over more.2 and 2 more; name its own model"),
    ],
)
def test_tensors_that_are_not_the_models_are_named(changes, words):
    backbone = planted.encoder().backbone
    before = backbone.proj.weight.clone()
    with pytest.raises(BadInput, match=f"does not fit the file: .*{words}"):
        encoders.load_weights(backbone, _planted_state(**changes, **{"proj.weight": before + 1}), "the file")
    assert torch.equal(backbone.proj.weight, before)  # refused before anything is copied


def test_a_classifier_is_ignored_and_half_precision_is_widened():
    backbone = planted.encoder(seed=1).backbone
    state = {k: v.half() for k, v in _planted_state(**{"head.weight": torch.zeros(9, 6)}).items()}
    encoders.load_weights(backbone, state, "the file")
    assert backbone.proj.weight.dtype == torch.float32
    assert torch.equal(backbone.proj.weight, state["proj.weight"].float())


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("share", [0, 0.3, 0.99])
def test_truncated_weight_files_are_refused(tmp_path, suffix, share):
    path = tmp_path / f"w.{suffix}"
    torch.save(_planted_state(), path)
    data = save(_planted_state()) if suffix == "safetensors" else path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(BadInput, match=rf"w\.{suffix} "):
        encoders.read_weights(path)


class _Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickled_code_is_refused_and_not_executed(tmp_path):
    torch.save({"proj.bias": _Code(tmp_path / "executed")}, tmp_path / "w.pth")
    with pytest.raises(BadInput, match="w.pth is no plain state dict"):
        encoders.read_weights(tmp_path / "w.pth")
    assert not (tmp_path / "executed").exists()


def test_a_file_of_something_else_is_refused(tmp_path):
    torch.save([torch.zeros(1)], tmp_path / "w.pth")
    with pytest.raises(BadInput, match="w.pth is no plain state dict but a list"):
        encoders.read_weights(tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"checkpoint": "gone.safetensors"}, "data/gone.safetensors does not exist"),
        ({"timm": "vit_tiny_patch61"}, "'e': timm has no model 'vit_tiny_patch61'"),
        ({"timm": "resnet18"}, "'e': resnet18 gives no patch tokens"),
        ({"timm": "test_vit2", "checkpoint": "gone.pth"}, "test_vit2 has no CLS token"),  # a register token instead
    ],
)
def test_rows_that_cannot_be_loaded_are_named(row, words):
    with pytest.raises(BadInput, match=words):
        encoders.load(EncoderRow(name="e", **row), "data")


def test_weights_that_cannot_be_fetched_ask_for_a_file(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(BadInput, match=r"could not be fetched \(OSError\); download them elsewhere"):
        encoders.load(EncoderRow(name="e", timm="vit_tiny_patch16_224"))


def test_check_lists_every_bad_row():
    rows = [
        {"name": "a", "timm": "embedded_vit"},
        {"name": "b", "timm": "nothing"},
        {"name": "c", "timm": "embedded_vit", "checkpoint": "gone.pth"},
    ]
    problems = encoders.check(check(profile="x", encoders=rows))
    assert len(problems) == 2 and "'b'" in problems[0] and "gone.pth" in problems[1]
