"""Weight files of every kind: the encoder's tensors are found by their keys, and no tensor goes unaccounted for."""

import argparse
import collections
import json
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
from timm.models.eva import Eva
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer

from ssl_robust import deacl as finetuning
from ssl_robust import encoders, records
from ssl_robust.formats import checkpoints
from ssl_robust.settings import BadInput, EncoderRow, check

DIM, HEADS, PATCH, NATIVE = 24, 3, 4, 20  # 5x5 patches


def vit(seed=0, **kwargs):
    """A small vision transformer; every tensor, LayerScale and tokens too, is far from what it is initialised with."""
    shape = {"img_size": NATIVE, "patch_size": PATCH, "embed_dim": DIM, "depth": 3, "num_heads": HEADS}
    model = VisionTransformer(**shape, num_classes=0, dynamic_img_size=True, **kwargs)
    return shaken(model, seed)


def resnet(seed=0):
    return shaken(ResNet(BasicBlock, (1, 1, 1, 1), num_classes=0, channels=(4, 8, 12, 16), stem_width=64), seed)


def eva(seed=0, **kwargs):
    """A small DINOv3: rotary positions, registers, LayerScale."""
    shape = {"img_size": NATIVE, "patch_size": PATCH, "embed_dim": DIM, "depth": 3, "num_heads": HEADS}
    rotary = {"use_rot_pos_emb": True, "use_abs_pos_emb": False, "rope_type": "dinov3", "rope_rotate_half": True}
    more = {"num_reg_tokens": 4, "init_values": 1.0, "use_fc_norm": False, "num_classes": 0, "dynamic_img_size": True}
    return shaken(Eva(**shape, **rotary, **more, **kwargs), seed)


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
    "dinov3": (eva, {"qkv_bias": False}, None), "dinov3_bias": (eva, {"qkv_bias": True}, None),
    "dinov3_swiglu": (eva, {"qkv_bias": False, "swiglu_mlp": True}, None),
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


def held(prefix, entry="", other="", beside=(), **more):
    """A file of tensors under `entry`, after `prefix`; another copy of them after `other`, and what is beside."""

    def layout(state):
        copy = {other + key: torch.ones_like(value) for key, value in state.items() if other}
        tensors = prefixed(state, prefix) | copy | {key: torch.ones(2) for key in beside}
        return {entry: tensors, **more} if entry else tensors

    return layout


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


def dinov3_official(state):
    """DINOv3's own names: a masked bias of the keys, which may hold anything, and what only training needs."""
    state = {re.sub(r"gamma_(\d)$", r"ls\1.gamma", k): v for k, v in state.items()}
    state["storage_tokens"] = state.pop("reg_token")
    swiglu = {"mlp.fc1_g.": "mlp.w1.", "mlp.fc1_x.": "mlp.w2.", "mlp.fc2.": "mlp.w3."}
    if any("fc1_g" in k for k in state):
        state = {re.sub("|".join(swiglu), lambda m: swiglu[m[0]], k): v for k, v in state.items()}
    for i in range(3):
        query, value = (state.pop(f"blocks.{i}.attn.{n}_bias", torch.zeros(DIM)) for n in "qv")
        state[f"blocks.{i}.attn.qkv.bias"] = torch.cat([query, torch.full([DIM], math.nan), value])
        state[f"blocks.{i}.attn.qkv.bias_mask"] = torch.cat([torch.ones(DIM), torch.zeros(DIM), torch.ones(DIM)])
    more = {"mask_token": torch.ones(1, DIM), "rope_embed.periods": torch.ones(2)}
    return state | more | {"local_cls_norm.weight": torch.ones(DIM)}


def dinov2_training(state):
    heads = ("teacher.dino_head.mlp.0.weight", "student.ibot_head.last_layer.weight_g", "dino_loss.center")
    layout = held("teacher.backbone.", "model", "student.backbone.", heads, iteration=12499)
    return layout(dinov2_official(state, chunks=True))


def lightning(state):
    """What Lightning keeps beside the weights, objects of its own included."""
    return {
        "epoch": 100, "global_step": 7, "pytorch-lightning_version": "1.6.4", "state_dict": state, "loops": {},
        "optimizer_states": [{"state": {0: {"momentum_buffer": torch.ones(3)}}}], "lr_schedulers": [{"last_epoch": 1}],
        "hyper_parameters": {"attack": argparse.Namespace(eps=4), "seen": collections.defaultdict(list, {"a": [1]})},
    }  # fmt: skip


def of_lightning(*names):
    """The same as held, as Lightning writes it."""
    return lambda state: lightning(held(*names)(state))


def compiled_parts(state):
    """Each block compiled, and checkpointed, on its own."""
    return {re.sub(r"^blocks\.(\d)", r"blocks.\1._orig_mod._checkpoint_wrapped_module", k): v for k, v in state.items()}


DINO = {
    "args": argparse.Namespace(arch="vit_base", momentum_teacher=np.float64(0.996)), "epoch": 100,
    "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": np.float64(0.1)}]},
    "dino_loss": {"center": torch.zeros(1, 5)}, "student": {"module.backbone.cls_token": torch.ones(1, 1, DIM)},
}  # fmt: skip
HEAD = ("head.mlp.0.weight", "head.last_layer.weight_v")
SOLO = ("projector.0.weight", "classifier.bias", "queue_ptr", "backbone.layer1.total_ops", "predictor.0.weight")
MAE = ("mask_token", "decoder_pos_embed", "decoder_blocks.0.a")
WRAPPED = ("backbone.", "module.backbone.", "backbone.module._orig_mod.", "_orig_mod.module.backbone.")
LAYOUTS = [  # where the tensors stand ("": nowhere but in the file itself) is what the origin says
    ("dino", held(""), ""),
    ("dino", held("module."), ""),
    ("dino", compiled_parts, ""),
    ("dino", held("backbone.", "teacher", "", HEAD, **DINO), "teacher"),  # which is what DINO publishes
    ("dino", held("module.backbone.", "student", "", HEAD), "student"),
    *(("dino", held(prefix, "teacher", "", HEAD), "teacher") for prefix in WRAPPED),
    ("dinov2", dinov2_official, ""),
    ("dinov2", lambda s: dinov2_official(s, chunks=True), ""),
    ("dinov2", dinov2_training, "model"),
    ("registers", dinov2_official, ""),
    ("registers", held(""), ""),  # timm's own names
    ("mae", held("", "model", "", MAE, optimizer={}, scaler={}), "model"),
    ("dino", of_lightning("backbone.encoder.", "", "momentum_backbone.encoder.", ("projector.a",)), "state_dict"),
    ("dino", of_lightning("backbone.encoder.model."), "state_dict"),
    ("resnet", of_lightning("backbone.", "", "momentum_backbone.", SOLO), "state_dict"),
    ("resnet", of_lightning("encoder.", "", "momentum_encoder.", SOLO), "state_dict"),
    ("resnet", held("module.encoder.", "state_dict", "", ("module.encoder.fc.0.weight",)), "state_dict"),
    ("resnet", held("module.encoder_q.", "state_dict", "module.encoder_k.", ("module.queue_ptr",)), "state_dict"),
    ("resnet", held("module.base_encoder.", "state_dict", "module.momentum_encoder."), "state_dict"),
    ("resnet", held("model.", "state_dict", "", ("fc.weight",)), "state_dict"),
    ("resnet", lambda s: without(s, "num_batches_tracked"), ""),  # written before there were such counters
    ("dinov3", held(""), ""),
    *((kind, dinov3_official, "") for kind in ("dinov3", "dinov3_bias", "dinov3_swiglu")),
    ("dinov3", lambda s: held("backbone.", "teacher", "", ("ibot_head.a",))(dinov3_official(s)), "teacher"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "layout", "origin"), LAYOUTS)
def test_every_layout_gives_the_models_own_features(kind, layout, origin, small, tmp_path):
    model = made(kind)
    torch.save(layout(model.state_dict()), tmp_path / "w.pth")
    encoder = encoders.load(EncoderRow(name=kind, checkpoint="w.pth"), str(tmp_path))
    assert encoder.origin == f"state dict in '{origin}' w.pth".replace(" in ''", "")
    x = planted.images(2, 64 if kind == "resnet" else NATIVE)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (encoders.IMAGENET_MEAN, encoders.IMAGENET_STD))
    cls, patches = encoder(x)
    with torch.no_grad():
        features = model.forward_features((x - mean) / std)
    if kind == "resnet":
        assert torch.allclose(cls, features.mean((2, 3)), atol=1e-5) and torch.allclose(patches, features, atol=1e-5)
        return
    prefix = 5 if kind == "registers" or kind.startswith("dinov3") else 1
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
    assert found.keys() - {"mask_token"} == own.keys()
    assert all(found[key].shape == own[key].shape for key in ("cls_token", "pos_embed"))
    assert not dinov2 or found["pos_embed"].shape[1] == (1369 if name.endswith("reg") else 1370)


# --- what does not fit ---


def without(state, *words):
    return {k: v for k, v in state.items() if not any(w in k for w in words)}


REFUSED = [
    # weights of DINOv2 in a model without LayerScale, and the other way round
    ("dino", lambda: dinov2_official(made("dinov2").state_dict()),
     r"left over blocks.0.ls1.gamma, left over blocks.0.ls2.gamma, left over blocks.1.ls1.gamma, and 3 more; name"),
    ("dinov2", lambda: made("dino").state_dict(),
     r"missing blocks.0.ls1.gamma, missing blocks.0.ls2.gamma, missing blocks.1.ls1.gamma, and 3 more; name"),
    ("dinov3", lambda: dinov3_official(made("dinov3_bias").state_dict()), "left over blocks.0.attn.q_bias, "),
    ("resnet", lambda: without(made("resnet").state_dict(), "running_mean"), "missing bn1.running_mean, "),
    ("resnet", lambda: {"state_dict": made("resnet").state_dict() | {"normalize.mean": torch.ones(3)}},
     "left over normalize.mean; name"),
    ("dinov2", lambda: {"model": dinov2_training(made("dinov2").state_dict())["model"] | {"ema.a": torch.ones(1)}},
     "left over ema.a; name"),
    # no square grid, so of no image size
    ("dinov2", lambda: dinov2_official(vit(0, **DINOV2).state_dict()) | {"pos_embed": torch.ones(1, 18, DIM)},
     r"pos_embed has shape \(1, 18, 24\), not \(1, 26, 24\); name"),
    ("dinov2", lambda: dinov2_official(made("registers").state_dict()), "left over reg_token, pos_embed has shape"),
    ("resnet", lambda: made("dino").state_dict(), "left over blocks.0.attn.proj.bias, [^;]*, and [0-9]+ more; name"),
    ("resnet", lambda: lightning(prefixed(made("resnet").state_dict(), "backbone.") | {"neck.0.bias": torch.ones(1)}),
     "left over neck.0.bias; name"),
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


def test_nothing_is_copied_from_a_file_that_does_not_fit():
    backbone = planted.encoder().backbone
    before = backbone.proj.weight.clone()
    with pytest.raises(BadInput, match="does not fit the file: missing proj.bias; name as timm the model it was made"):
        checkpoints.load_weights(backbone, _planted_state(**{"proj.bias": None, "proj.weight": before + 1}), "the file")
    assert torch.equal(backbone.proj.weight, before)


def test_a_classifier_is_ignored_and_half_precision_is_widened():
    backbone = planted.encoder(seed=1).backbone
    state = {k: v.half() for k, v in _planted_state(**{"head.weight": torch.zeros(9, 6)}).items()}
    checkpoints.load_weights(backbone, state, "the file")
    assert backbone.proj.weight.dtype == torch.float32
    assert torch.equal(backbone.proj.weight, state["proj.weight"].float())


def test_two_copies_of_the_encoder_are_refused():
    state = made("dino").state_dict() | {"module.cls_token": torch.ones(1, 1, DIM)}
    with pytest.raises(BadInput, match=r"w.pth is no plain state dict but holds cls_token twice; save the model's"):
        checkpoints.recognise(state, Path("w.pth"))


# --- files that cannot be read ---


def _read(path):
    return checkpoints.recognise(checkpoints.read(path), path)[0]


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("share", [0, 0.3, 0.99])
def test_truncated_weight_files_are_refused(tmp_path, suffix, share):
    path = tmp_path / f"w.{suffix}"
    torch.save(_planted_state(), path)
    data = save(_planted_state()) if suffix == "safetensors" else path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(BadInput, match=rf"w\.{suffix} cannot be read .*fetch (it again|or make)"):
        checkpoints.read(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "half a file, or objects that could run code"),
        (b"<!DOCTYPE html>", "half a file, or objects that could run code"),
        (b"{'a'}: {}", "half a file, or objects that could run code"), (None, "No such file"),
    ],
)  # fmt: skip
def test_what_is_no_weight_file_is_to_be_fetched_again(tmp_path, content, words):
    if content:
        (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(BadInput, match=rf"w\.pth cannot be read \({words}.*\); correct the path or fetch it again"):
        checkpoints.read(tmp_path / "w.pth")


def test_formats_are_known_by_content_not_by_name(tmp_path):
    save_file(_planted_state(), tmp_path / "w.pth")
    torch.save(_planted_state(), tmp_path / "w.safetensors")
    for path in tmp_path.iterdir():
        assert torch.equal(_read(path)["proj.bias"], _planted_state()["proj.bias"])


class _Code:
    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return tempfile.mkdtemp, (None, "executed", self.folder)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("place", ["weights", "options", "all"])
def test_pickled_code_is_not_executed(tmp_path, legacy, place):
    code = _Code(tmp_path)
    content = {"weights": {"proj.bias": code}, "options": {"model": _planted_state(), "args": code}, "all": code}[place]
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    if place == "options" and not legacy:
        assert torch.equal(_read(tmp_path / "w.pth")["proj.bias"], _planted_state()["proj.bias"])
    else:
        words = "could run code" if legacy else "holds (proj.bias|a single UnreadObject); save the model's state_dict"
        with pytest.raises(BadInput, match=words):
            _read(tmp_path / "w.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["w.pth"]


OPTIONS = {
    "namespace": argparse.Namespace(lr=0.1), "scalar": np.float64(71.3), "array": np.arange(3.0), "path": Path("/x"),
    "dicts": collections.defaultdict(list, {"a": [1]}), "plain": {"a": (1, 2.5, None, "b")},
}  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS)
def test_options_are_left_unread_not_imported(tmp_path, option):
    torch.save(lightning(_planted_state()) | {"args": OPTIONS[option]}, tmp_path / "w.ckpt")
    read = checkpoints.read(tmp_path / "w.ckpt")
    assert isinstance(read["hyper_parameters"]["attack"], checkpoints.UnreadObject)
    assert torch.equal(_read(tmp_path / "w.ckpt")["proj.bias"], _planted_state()["proj.bias"])


def test_files_from_before_pytorch_1_6_are_read(tmp_path):
    torch.save({"state_dict": _planted_state(), "epoch": 3}, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(_read(tmp_path / "w.pth")["proj.bias"], _planted_state()["proj.bias"])


OTHERS = {
    "a single list": [torch.zeros(1)], "nothing": {}, "epoch, loss": {"epoch": 3, "loss": 0.5},
    "a, b, c, and 2 more": dict.fromkeys("abcde", 0),
    "model": {"model": {"module": {"a": torch.zeros(1)}}},
}  # fmt: skip


@pytest.mark.parametrize("said", OTHERS)
def test_files_of_something_else_are_refused(tmp_path, said):
    torch.save(OTHERS[said], tmp_path / "w.pth")
    with pytest.raises(BadInput, match=f"w.pth is no plain state dict but holds {said}; save the model's state_dict"):
        _read(tmp_path / "w.pth")


def test_one_rule_says_where_a_file_lies(root, monkeypatch):
    monkeypatch.setenv("HOME", str(root / "home"))
    assert checkpoints.locate("~/w.pth", "/data") == root / "home" / "w.pth"
    brought = "embedded_vit.safetensors"
    assert checkpoints.locate(brought, str(root)) == checkpoints.BROUGHT / brought
    assert checkpoints.locate(f"weights/{brought}", "/data") == Path("/data/weights") / brought
    (root / brought).touch()
    assert checkpoints.locate(brought, str(root)) == root / brought  # one's own comes first
    assert checkpoints.locate("/a/w.pth", "/data") == Path("/a/w.pth")
    assert checkpoints.locate("weights/w.pth", "/data") == Path("/data/weights/w.pth")
    assert checkpoints.locate("weights/w.pth", "~/data") == root / "home" / "data" / "weights" / "w.pth"


def test_paths_mean_the_same_for_both_checkpoints_from_every_folder(root, small, monkeypatch):
    """Without a data folder they start in the project: a check at the top finds what notebooks below it find."""
    (root / "notebooks").mkdir()
    torch.save(made("dino").state_dict(), root / "w.pth")
    row = {"name": "dino", "defenses": ["standard", "deacl"]}
    good, bad = (
        check(profile="x", encoders=[row | {"checkpoint": file, "deacl_checkpoint": file}])
        for file in ("w.pth", "~nobody_here/w")
    )
    for place in (root, root / "notebooks"):
        monkeypatch.chdir(place)
        assert encoders.check(good) == []
        assert [v[2] for v in finetuning.variants(good.encoders[0], "x")] == [None, root / "w.pth"]
        assert encoders.load(good.encoders[0]).hash == encoders.load(good.encoders[0], weights=root / "w.pth").hash
        (said,) = encoders.check(bad)
        assert f"{root}/~nobody_here/w cannot be read" in said


# --- what no model can compute with ---


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "change", [lambda v: v.char(), lambda v: v + 0j, lambda v: v * math.nan, lambda v: v.double() * 1e300]
)
def test_tensors_without_usable_numbers_are_named(change, small, tmp_path):
    state = made("dino").state_dict()
    torch.save(state | {"norm.weight": change(state["norm.weight"])}, tmp_path / "w.pth")
    with pytest.raises(BadInput, match=r"dino \(w.pth\) holds no finite plain numbers in norm.weight; fetch or make"):
        encoders.load(EncoderRow(name="dino", checkpoint="w.pth"), str(tmp_path))


# --- the normalisation that a file keeps ---

MEAN, STD = (0.25, 0.5, 0.125), (0.5, 0.25, 0.125)


def colours(mean_key, std_key, mean=MEAN, std=STD):
    return {mean_key: torch.tensor(mean).view(3, 1, 1), std_key: torch.tensor(std).view(3, 1, 1)}


def robustness(state):
    attacker = prefixed(state, "module.attacker.model.") | colours("module.attacker.normalize.new_mean",
                                                                   "module.attacker.normalize.new_std")  # fmt: skip
    own = prefixed(state, "module.model.") | colours("module.normalizer.new_mean", "module.normalizer.new_std")
    return {"model": own | attacker, "epoch": 90, "schedule": None}


NORMALISED = {
    "deacl": lambda s: lightning(
        prefixed(s, "backbone.") | colours("backbone.normalize.mean", "backbone.normalize.std")
    ),
    "robustness": robustness,
    "wrapper": lambda s: prefixed(s, "model.") | colours("normalize.mean", "normalize.std"),
    "sequence": lambda s: {"state_dict": prefixed(s, "module.1.") | colours("module.0.mean", "module.0.std")},
    "buffers": lambda s: {"model": s | colours("mean", "std")},
    "pixels": lambda s: s | colours("pixel_mean", "pixel_std"),
    "timm": lambda s: {"state_dict": s, "pretrained_cfg": {"mean": MEAN, "std": list(STD), "url": ""}},
}


@pytest.mark.parametrize("place", NORMALISED)
def test_a_files_own_normalisation_is_used(place, small, tmp_path):
    model = made("resnet")
    torch.save(NORMALISED[place](model.state_dict()), tmp_path / "w.pth")
    row, x = EncoderRow(name="resnet", checkpoint="w.pth"), planted.images(2, 64)
    encoder = encoders.load(row, str(tmp_path))
    with torch.no_grad():
        expected = model.forward_features((x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1))
    assert torch.allclose(encoder(x)[1], expected, atol=1e-5)
    assert encoder.origin.endswith(" w.pth, normalised by its own mean and std")
    said = row.model_copy(update={"normalise": "inception"})
    other = encoders.load(said, str(tmp_path))
    assert other.mean.flatten().tolist() == other.std.flatten().tolist() == [0.5] * 3
    assert other.origin.endswith(" w.pth, normalised as the row says, not as the file does")


def test_what_timm_says_of_a_model_is_read_from_metadata(small, tmp_path):
    about = {"format": "pt", "pretrained_cfg": json.dumps({"mean": MEAN, "std": STD})}
    save_file(made("dino").state_dict(), tmp_path / "w.safetensors", about)
    save_file(made("dino").state_dict(), tmp_path / "damaged.safetensors", about | {"pretrained_cfg": "{"})
    rows = [EncoderRow(name="dino", checkpoint=file) for file in ("damaged.safetensors", "w.safetensors")]
    means = [encoders.load(row, str(tmp_path)).mean.flatten().tolist() for row in rows]
    assert means == [pytest.approx(encoders.IMAGENET_MEAN), list(MEAN)]


def test_options_of_training_say_nothing_about_the_model(small, tmp_path):
    options = {"hyper_parameters": {"mean": MEAN, "std": STD}, "args": {"mean": MEAN, "std": STD}}
    torch.save({"state_dict": made("dino").state_dict()} | options, tmp_path / "w.pth")
    encoder = encoders.load(EncoderRow(name="dino", checkpoint="w.pth"), str(tmp_path))
    assert encoder.mean.flatten().tolist() == pytest.approx(encoders.IMAGENET_MEAN)
    assert encoder.origin == "state dict in 'state_dict' w.pth"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (colours("mean", "std", (124, 116, 104), (58, 57, 57)), r"keeps as mean and std of pixels in .* \(\(124.0"),
        (colours("mean", "std", MEAN, (0.0, 0.5, 0.5)), r"\(0.0, 0.5, 0.5\)\)"),
        (colours("mean", "std", MEAN, (math.nan, 0.5, 0.5)), r"\(nan, 0.5, 0.5\)\)"),
        (colours("mean", "std") | colours("a.mean", "a.std", STD), r"\)\), \(\("),
    ],
)
def test_a_normalisation_that_cannot_be_meant_asks_for_the_rows(more, words, small, tmp_path):
    torch.save(made("dino").state_dict() | more, tmp_path / "w.pth")
    row = EncoderRow(name="dino", checkpoint="w.pth")
    with pytest.raises(BadInput, match=f"w.pth .*{words}.*; give the encoder's"):
        encoders.load(row, str(tmp_path))
    assert encoders.load(row.model_copy(update={"normalise": "clip"}), str(tmp_path)).hash


def test_weights_of_deacl_keep_the_normalisation_they_were_trained_with(small, tmp_path):
    torch.save(made("dino").state_dict() | colours("mean", "std", encoders.CIFAR_MEAN), tmp_path / "w.pth")
    row = EncoderRow(name="dino", checkpoint="w.pth")
    teacher = encoders.load(row, str(tmp_path))
    finetuning.save_backbone(teacher, tmp_path / "epoch_1.safetensors")
    assert encoders.load(row, str(tmp_path), tmp_path / "epoch_1.safetensors").hash == teacher.hash
    assert records.read_tensors(tmp_path / "epoch_1.safetensors")[0].keys() == teacher.backbone.state_dict().keys()
