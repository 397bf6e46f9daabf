"""Weight files of every kind: the encoder's tensors are found by their keys, and no tensor goes unaccounted for."""

import argparse
import collections
import math
import re
import tempfile
from pathlib import Path

import numpy as np
import planted
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save, save_file
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer

from ssl_robust import checkpoints, encoders
from ssl_robust.settings import BadInput, EncoderRow

DIM, HEADS, PATCH, NATIVE = 24, 3, 4, 20  # 5x5 patches


def vit(seed=0, **kwargs):
    """A small vision transformer; every tensor, LayerScale and tokens too, is far from what it is initialised with."""
    shape = {"img_size": NATIVE, "patch_size": PATCH, "embed_dim": DIM, "depth": 3, "num_heads": HEADS}
    model = VisionTransformer(**shape, num_classes=0, dynamic_img_size=True, **kwargs)
    return shaken(model, seed)


def resnet(seed=0):
    return shaken(ResNet(BasicBlock, (1, 1, 1, 1), num_classes=0, channels=(4, 8, 12, 16), stem_width=64), seed)


def shaken(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            value.copy_(0.3 * torch.randn(value.shape, generator=generator) + ("norm" in name or "bn" in name))
            if name.endswith("running_var"):
                value.abs_()
    return model.eval()


DINOV2 = {"init_values": 1.0}
REGISTERS = {"init_values": 1.0, "reg_tokens": 4, "no_embed_class": True}
MODELS = {
    "dino": (vit, {}, encoders.DINO), "dinov2": (vit, DINOV2, encoders.DINO),
    "registers": (vit, REGISTERS, encoders.REGISTERS), "mae": (vit, {}, None), "resnet": (resnet, {}, None),
}  # fmt: skip


@pytest.fixture
def small(monkeypatch):
    """Makes `encoders.load` build the small model of a kind; the row's name is the kind."""
    monkeypatch.setattr(encoders, "_create", lambda row, model, pretrained: MODELS[model][0](9, **MODELS[model][1]))
    for kind, (_, _, positions) in MODELS.items():
        monkeypatch.setitem(encoders.KNOWN, kind, encoders.Known(kind, NATIVE, positions=positions))


def made(kind, seed=0):
    build, kwargs, _ = MODELS[kind]
    return build(seed, **kwargs)


# --- the layouts, written from the model's own keys to those of the files ---


def prefixed(state, prefix):
    return {prefix + key: value for key, value in state.items()}


def head(prefix):
    keys = ("mlp.0.weight", "mlp.0.bias", "last_layer.weight_g", "last_layer.weight_v")
    return {f"{prefix}{key}": torch.ones(2) for key in keys}


def dino_training(state):
    """As written by DINO's training script: the teacher is what is published."""
    other = made("dino", 1).state_dict()
    options = argparse.Namespace(arch="vit_base", lr=0.0005, momentum_teacher=np.float64(0.996))
    return {
        "student": prefixed(other, "module.backbone.") | head("module.head."),
        "teacher": prefixed(state, "backbone.") | head("head."),
        "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": np.float64(0.1)}]},
        "epoch": 100, "args": options, "dino_loss": {"center": torch.zeros(1, 5)},
    }  # fmt: skip


def dinov2_official(state, chunks=False):
    """DINOv2's own names: a mask token, registers outside the position embedding, which has a place for CLS."""
    state = {**state, "mask_token": torch.ones(1, DIM)}
    if "reg_token" in state:
        cls_position = torch.randn(1, 1, DIM, generator=torch.Generator().manual_seed(5))
        state["register_tokens"] = state.pop("reg_token")
        state["cls_token"] = state["cls_token"] - cls_position
        state["pos_embed"] = torch.cat([cls_position, state["pos_embed"]], 1)
    if chunks:  # two blocks a chunk; the second number counts through
        state = {re.sub(r"^blocks\.(\d)", lambda m: f"blocks.{int(m[1]) // 2}.{m[1]}", k): v for k, v in state.items()}
    return state


def dinov2_training(state):
    teacher = prefixed(dinov2_official(state, chunks=True), "teacher.backbone.")
    student = prefixed(dinov2_official(made("dinov2", 1).state_dict()), "student.backbone.")
    heads = head("teacher.dino_head.") | head("teacher.ibot_head.") | head("student.dino_head.")
    return {"model": {**student, **teacher, **heads, "dino_loss.center": torch.zeros(2)}, "iteration": 12499}


def lightning(state):
    """What Lightning keeps beside the weights, objects of its own included."""
    return {
        "epoch": 100, "global_step": 7, "pytorch-lightning_version": "1.6.4", "state_dict": state, "loops": {},
        "optimizer_states": [{"state": {0: {"momentum_buffer": torch.ones(3)}}}], "lr_schedulers": [{"last_epoch": 1}],
        "hyper_parameters": {"attack": argparse.Namespace(eps=4), "seen": collections.defaultdict(list, {"a": [1]})},
    }  # fmt: skip


def deacl(prefix):
    def layout(state):
        teacher = prefixed(made("dino", 1).state_dict(), f"momentum_{prefix}")
        return lightning(prefixed(state, prefix) | teacher | head("projector."))

    return layout


def solo(prefix, predictor):
    def layout(state):
        momentum = prefixed(made("resnet", 1).state_dict(), f"momentum_{prefix}")
        others = {"projector.0.weight": torch.ones(2), "classifier.bias": torch.ones(2), "queue_ptr": torch.ones(1)}
        others |= {f"{prefix}normalize.mean": torch.ones(3), f"{prefix}layer1.total_ops": torch.ones(1)}
        others |= {"predictor.0.weight": torch.ones(2)} if predictor else {}
        return lightning(prefixed(state, prefix) | others | momentum)

    return layout


def simsiam(state):
    fc = {"module.encoder.fc.0.weight": torch.ones(2), "module.predictor.0.weight": torch.ones(2)}
    return {"epoch": 100, "arch": "resnet50", "state_dict": prefixed(state, "module.encoder.") | fc, "optimizer": {}}


def mae(state):
    decoder = {
        "mask_token": torch.ones(1, 1, 8),
        "decoder_pos_embed": torch.ones(1, 8),
        "decoder_blocks.0.a": torch.ones(1),
    }
    return {"model": state | decoder, "optimizer": {}, "epoch": 5, "scaler": {}, "args": argparse.Namespace(lr=1.0)}


LAYOUTS = [
    ("dino", lambda s: s, "state dict"),
    ("dino", lambda s: prefixed(s, "module."), "state dict"),
    ("dino", dino_training, "DINO teacher checkpoint"),
    ("dino", lambda s: {"student": prefixed(s, "module.backbone.") | head("module.head.")}, "DINO student checkpoint"),
    ("dino", lambda s: {"teacher": prefixed(s, "module.backbone.")}, "DINO teacher checkpoint"),
    ("dinov2", dinov2_official, "DINOv2 state dict"),
    ("dinov2", lambda s: dinov2_official(s, chunks=True), "DINOv2 state dict"),
    ("dinov2", dinov2_training, "DINOv2 training checkpoint (teacher)"),
    ("dinov2", lambda s: {"teacher": prefixed(dinov2_official(s), "backbone.") | head("dino_head.")},
     "DINOv2 teacher checkpoint"),
    ("registers", dinov2_official, "DINOv2 state dict"),
    ("registers", lambda s: s, "state dict"),  # timm's own names
    ("mae", mae, "MAE checkpoint with decoder"),
    ("mae", lambda s: {"model": s}, "state dict in 'model'"),
    ("dino", deacl("backbone.encoder."), "DeACL checkpoint of the paper's code"),
    ("dino", deacl("backbone.model."), "DeACL checkpoint of the paper's code"),
    ("dino", deacl("backbone.encoder.model."), "DeACL checkpoint of the paper's code"),
    ("resnet", solo("backbone.", False), "solo-learn checkpoint"),
    ("resnet", solo("backbone.", True), "solo-learn checkpoint"),
    ("resnet", solo("encoder.", True), "solo-learn checkpoint (early)"),
    ("resnet", simsiam, "SimSiam checkpoint"),
    ("resnet", lambda s: {"state_dict": {**s, "fc.weight": torch.ones(2)}}, "state dict in 'state_dict'"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "layout", "origin"), LAYOUTS)
def test_every_layout_gives_the_models_own_features(kind, layout, origin, small, tmp_path):
    model = made(kind)
    torch.save(layout(model.state_dict()), tmp_path / "w.pth")
    encoder = encoders.load(EncoderRow(name=kind, checkpoint="w.pth"), str(tmp_path))
    assert encoder.origin == f"{origin} w.pth"
    x = planted.images(2, 64 if kind == "resnet" else NATIVE)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (encoders.IMAGENET_MEAN, encoders.IMAGENET_STD))
    cls, patches = encoder(x)
    with torch.no_grad():
        features = model.forward_features((x - mean) / std)
    if kind == "resnet":
        assert torch.allclose(cls, features.mean((2, 3)), atol=1e-5) and torch.allclose(patches, features, atol=1e-5)
        return
    prefix = 5 if kind == "registers" else 1
    assert torch.allclose(cls, features[:, 0], atol=1e-5)
    assert torch.allclose(patches.flatten(2), features[:, prefix:].transpose(1, 2), atol=1e-5)


# --- DINOv2's forward pass by hand, from a file in its own names ---


def by_hand(state, x, offset, antialias):
    """Tokens of a DINOv2 file: the steps of its architecture one by one, without any library model."""
    grid = [side // PATCH for side in x.shape[-2:]]
    t = F.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=PATCH).flatten(2).mT
    old = math.isqrt(state["pos_embed"].shape[1] - 1)
    positions = state["pos_embed"][:, 1:].mT.reshape(1, DIM, old, old)
    if grid != [old, old]:
        size = {"scale_factor": tuple((g + offset) / old for g in grid)} if offset else {"size": grid}
        positions = F.interpolate(positions, mode="bicubic", antialias=antialias, **size)
    t = t + positions.flatten(2).mT
    first = [(state["cls_token"] + state["pos_embed"][:, :1]).expand(len(x), -1, -1)]
    first += [state["register_tokens"].expand(len(x), -1, -1)] if "register_tokens" in state else []
    t = torch.cat([*first, t], 1)
    for i in range(3):
        block = {k.removeprefix(f"blocks.{i}."): v for k, v in state.items() if k.startswith(f"blocks.{i}.")}
        n = F.layer_norm(t, (DIM,), block["norm1.weight"], block["norm1.bias"], 1e-6)
        qkv = F.linear(n, block["attn.qkv.weight"], block["attn.qkv.bias"])
        q, k, v = qkv.unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        a = ((q @ k.mT) / math.sqrt(DIM // HEADS)).softmax(-1) @ v
        a = F.linear(a.transpose(1, 2).flatten(2), block["attn.proj.weight"], block["attn.proj.bias"])
        t = t + block["ls1.gamma"] * a
        n = F.layer_norm(t, (DIM,), block["norm2.weight"], block["norm2.bias"], 1e-6)
        m = F.gelu(F.linear(n, block["mlp.fc1.weight"], block["mlp.fc1.bias"]))
        t = t + block["ls2.gamma"] * F.linear(m, block["mlp.fc2.weight"], block["mlp.fc2.bias"])
    return F.layer_norm(t, (DIM,), state["norm.weight"], state["norm.bias"], 1e-6)


@pytest.mark.parametrize("size", [(20, 20), (8, 8), (28, 12), (40, 40)])
@pytest.mark.parametrize(("kind", "offset", "antialias"), [("dinov2", 0.1, False), ("registers", 0.0, True)])
def test_a_dinov2_file_gives_what_dinov2_computes_at_every_size(kind, offset, antialias, size, small, tmp_path):
    state = dinov2_official(made(kind).state_dict())
    torch.save(state, tmp_path / "w.pth")
    encoder = encoders.load(EncoderRow(name=kind, checkpoint="w.pth", normalise="none"), str(tmp_path))
    x = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = by_hand(state, x, offset, antialias)
        cls, patches = encoder(x)
    assert torch.allclose(cls, expected[:, 0], atol=2e-5)
    assert torch.allclose(patches.flatten(2), expected[:, 5 if kind == "registers" else 1 :].mT, atol=2e-5)


LAYERS = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")  # of one block; each a weight and a bias


@pytest.mark.parametrize("name", ["dino_vits16", "dino_vitb16", "mae_vitb16", "dinov2_vits14", "dinov2_vitb14_reg"])
def test_the_papers_models_have_the_tensors_of_the_official_files(name):
    dinov2, known = name.startswith("dinov2"), encoders.KNOWN[name]
    dim, patch = 384 if "vits" in name else 768, 14 if dinov2 else 16
    block = [f"{layer}.{part}" for layer in LAYERS for part in ("weight", "bias")] + ["ls1.gamma", "ls2.gamma"] * dinov2
    keys = [f"blocks.{i}.{key}" for i in range(12) for key in block] + ["norm.weight", "norm.bias"]
    keys += ["patch_embed.proj.weight", "patch_embed.proj.bias"] + ["mask_token"] * dinov2
    file = {key: torch.empty(0) for key in keys}
    file |= {"cls_token": torch.zeros(1, 1, dim), "pos_embed": torch.zeros(1, 1 + (known.native // patch) ** 2, dim)}
    file |= {"register_tokens": torch.zeros(1, 4, dim)} if name.endswith("reg") else {}
    with torch.device("meta"):
        own = encoders._create(EncoderRow(name=name), known.timm, False).state_dict()
    found = checkpoints.recognise(file, Path("w.pth"))[0]
    assert found.keys() == own.keys()
    assert all(found[key].shape == own[key].shape for key in ("cls_token", "pos_embed"))
    assert not dinov2 or found["pos_embed"].shape[1] == (1369 if name.endswith("reg") else 1370)


# --- what does not fit ---


def without(state, *words):
    return {k: v for k, v in state.items() if not any(w in k for w in words)}


REFUSED = [
    # weights of DINOv2 in a model without LayerScale, and the other way round
    ("dino", lambda: dinov2_official(made("dinov2").state_dict()), r"left over blocks.0.ls1.gamma; .*ls2.gamma; name"),
    ("dinov2", lambda: made("dino").state_dict(), r"missing blocks.0.ls1.gamma; .*ls2.gamma; name"),
    ("dinov2", lambda: dinov2_official(without(made("dinov2").state_dict(), "ls1", "ls2")), "missing blocks.0.ls1"),
    ("dinov2", lambda: {"model": without(dinov2_training(made("dinov2").state_dict())["model"], "norm2")},
     "missing blocks.0.norm2.bias"),
    ("dinov2", lambda: {"model": dinov2_training(made("dinov2").state_dict())["model"] | {"ema.a": torch.ones(1)}},
     r"left over ema.a \(outside the encoder\); name"),
    # no square grid, so of no image size
    ("dinov2", lambda: dinov2_official(vit(0, **DINOV2).state_dict()) | {"pos_embed": torch.ones(1, 18, DIM)},
     r"pos_embed has shape \(1, 18, 24\), not \(1, 26, 24\); name"),
    ("dinov2", lambda: dinov2_official(made("registers").state_dict()), "left over reg_token; pos_embed has shape"),
    ("resnet", lambda: made("dino").state_dict(), "left over blocks.0.attn.proj.bias; .* more"),
    ("dino", lambda: {"teacher": prefixed(made("dino").state_dict(), "backbone.") | {"queue": torch.ones(1)}},
     "left over queue"),
    ("resnet", lambda: solo("backbone.", True)(made("resnet").state_dict() | {"extra.weight": torch.ones(1)}),
     "left over extra.weight"),
    ("resnet", lambda: lightning(prefixed(made("resnet").state_dict(), "backbone.") | {"neck.0.bias": torch.ones(1)}),
     r"left over neck.0.bias \(outside the encoder\)"),
    ("dino", lambda: {"model": made("dino").state_dict(), "model_ema": made("dino", 1).state_dict()},
     r"left over model_ema.blocks.0.attn.proj.bias \(outside 'model'\)"),
    ("dino", lambda: mae(made("dino").state_dict())["model"], "left over decoder_blocks.0.a; left over decoder_pos"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "content", "words"), REFUSED)
def test_every_tensor_is_accounted_for(kind, content, words, small, tmp_path):
    torch.save(content(), tmp_path / "w.pth")
    with pytest.raises(BadInput, match=rf"does not fit {kind} \(w.pth\): {words}"):
        encoders.load(EncoderRow(name=kind, checkpoint="w.pth"), str(tmp_path))


def test_positions_of_another_native_size_are_taken_as_they_are(small, tmp_path):
    """Trained at a smaller size: the authors interpolate from the checkpoint's own grid, so it must be kept."""
    positions = torch.randn(1, 17, DIM, generator=torch.Generator().manual_seed(5))
    torch.save(dinov2_official(made("dinov2").state_dict()) | {"pos_embed": positions}, tmp_path / "w.pth")
    encoder = encoders.load(EncoderRow(name="dinov2", checkpoint="w.pth"), str(tmp_path))
    assert torch.equal(encoder.backbone.pos_embed, positions)
    cls, patches = encoder(torch.rand(2, 3, encoder.native, encoder.native))
    assert cls.isfinite().all() and patches.shape[-1] == encoder.native // encoder.patch


def _planted_state(**changes):
    state = planted.encoder().backbone.state_dict() | changes
    return {k: v for k, v in state.items() if v is not None}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"proj.bias": None}, "missing proj.bias"),
        ({"blocks.0.gamma": torch.zeros(1)}, "left over blocks.0.gamma"),
        ({"proj.bias": torch.zeros(7)}, r"proj.bias has shape \(7,\), not \(6,\)"),
        ({f"more.{i:02d}": torch.zeros(1) for i in range(23)}, "left over more.19; and 3 more; name as timm the model"),
    ],
)
def test_tensors_that_are_not_the_models_are_named(changes, words):
    backbone = planted.encoder().backbone
    before = backbone.proj.weight.clone()
    with pytest.raises(BadInput, match=f"does not fit the file: .*{words}"):
        checkpoints.load_weights(backbone, _planted_state(**changes, **{"proj.weight": before + 1}), "the file")
    assert torch.equal(backbone.proj.weight, before)  # refused before anything is copied


def test_a_classifier_is_ignored_and_half_precision_is_widened():
    backbone = planted.encoder(seed=1).backbone
    state = {k: v.half() for k, v in _planted_state(**{"head.weight": torch.zeros(9, 6)}).items()}
    checkpoints.load_weights(backbone, state, "the file")
    assert backbone.proj.weight.dtype == torch.float32
    assert torch.equal(backbone.proj.weight, state["proj.weight"].float())


# --- files that cannot be read ---


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("share", [0, 0.3, 0.99])
def test_truncated_weight_files_are_refused(tmp_path, suffix, share):
    path = tmp_path / f"w.{suffix}"
    torch.save(_planted_state(), path)
    data = save(_planted_state()) if suffix == "safetensors" else path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(BadInput, match=rf"w\.{suffix} "):
        checkpoints.read_weights(path)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_text_file_is_refused(tmp_path, suffix):
    (tmp_path / f"w.{suffix}").write_text("<html>404 Not Found</html>")
    with pytest.raises(BadInput, match=rf"w\.{suffix} (cannot be read|is no plain state dict)"):
        checkpoints.read_weights(tmp_path / f"w.{suffix}")


class _Code:
    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return tempfile.mkdtemp, (None, "executed", self.folder)


@pytest.mark.parametrize(
    ("legacy", "words"), [(False, "holds tempfile.mkdtemp, which could run code"), (True, "save one")]
)
@pytest.mark.parametrize("place", ["weights", "options"])
def test_pickled_code_is_refused_and_not_executed(tmp_path, legacy, words, place):
    code = _Code(tmp_path)
    content = {"proj.bias": code} if place == "weights" else {"state_dict": _planted_state(), "hyper_parameters": code}
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(BadInput, match=f"w.pth is no plain state dict.*{words}"):
        checkpoints.read_weights(tmp_path / "w.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["w.pth"]


def test_options_are_left_unread_not_imported(tmp_path):
    content = lightning(_planted_state())
    torch.save(content, tmp_path / "w.ckpt")
    read = checkpoints.read(tmp_path / "w.ckpt")
    assert isinstance(read["hyper_parameters"]["attack"], checkpoints.Unread)
    assert torch.equal(checkpoints.read_weights(tmp_path / "w.ckpt")["proj.bias"], _planted_state()["proj.bias"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([torch.zeros(1)], "no plain state dict but a list"),
        ({}, "it holds nothing; save the model's state_dict"),
        ({"epoch": 3, "loss": 0.5}, "it holds epoch, loss; save"),
        ({"state_dict": {"a": torch.zeros(1), "b": [1, 2]}}, "its b is a list, not a tensor"),
        ({"a": torch.zeros(1), "notes": "hello"}, "its notes is a str, not a tensor"),
        ({"model": {"module": {"a": torch.zeros(1)}}}, "it holds model; save"),
    ],
)
def test_files_of_something_else_are_refused(tmp_path, content, words):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(BadInput, match=f"w.pth is .*{words}"):
        checkpoints.read_weights(tmp_path / "w.pth")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(BadInput, match="gone.pth does not exist; correct the path"):
        checkpoints.read_weights(tmp_path / "gone.pth")


def test_own_files_are_read_in_both_formats(tmp_path):
    save_file(_planted_state(), tmp_path / "w.safetensors")
    torch.save(_planted_state(), tmp_path / "w.pth")
    for path in tmp_path.iterdir():
        state, kind = checkpoints.recognise(checkpoints.read(path), path)
        assert kind == "state dict" and state.keys() == _planted_state().keys()
