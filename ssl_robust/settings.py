"""The schema of params/*.yaml and of every notebook's parameters cell; each refusal of a bad parameter is made here."""

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

TASKS = ("classification", "segmentation", "depth")
# where the authors' released code departs from the paper's text; ssl_robust/released.py says how, one entry each
DIFFERENCES = (
    "embed_mse", "pgd_scaled_logits", "segpgd_two_means", "window_probabilities", "class0_ignored", "depth_warmup",
    "depth_unmasked", "depth_flipped", "depth_mean_of_images", "head_recipe", "native_input", "dense_stride",
)  # fmt: skip


class BadInput(ValueError):
    """Something the user gave cannot be used; the message is one sentence that names the thing and the remedy."""


class _Strict(BaseModel):
    # strict: "8/255" or "1e-3" given as text is refused instead of being guessed at
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Normalise(_Strict):
    """Mean and standard deviation of each colour, in [0,1] pixel units."""

    mean: list[float] = Field(min_length=3, max_length=3)
    std: list[float] = Field(min_length=3, max_length=3)


class EncoderRow(_Strict):
    """One frozen encoder, a row in each of the three tables: a timm model or a Python callable."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$", description="the row's name in tables and file names")
    timm: str = Field("", description="timm model; default: the model that the name stands for (encoders.KNOWN)")
    call: str = Field("", description="'module:function' of an encoder of your own: images -> (cls, patches)")
    checkpoint: str = Field("", description="local weight file; a relative path is looked up in the data folder")
    normalise: Literal["model", "imagenet", "inception", "clip", "cifar", "none"] | Normalise = "model"
    native: int | None = Field(None, ge=8, description="native input side in px; default: model")
    defenses: list[Literal["standard", "deacl"]] = Field(["standard"], min_length=1)
    deacl_checkpoint: str = Field("", description="a robust encoder made elsewhere, in place of fine-tuning here")

    @property
    def tuned(self) -> bool:
        """Whether DeACL is run for this row: it is asked for and no checkpoint of it is given."""
        return "deacl" in self.defenses and not self.deacl_checkpoint

    @property
    def needs_standard(self) -> bool:
        """Whether the Standard encoder is used: as a row of its own, or as the teacher of DeACL."""
        return "standard" in self.defenses or not self.deacl_checkpoint

    @model_validator(mode="after")
    def _one_origin(self) -> "EncoderRow":
        if self.call and (self.timm or self.checkpoint or "deacl" in self.defenses):
            raise ValueError(f"'{self.name}' has a 'call'; remove its timm, checkpoint and defense deacl")
        if self.deacl_checkpoint and "deacl" not in self.defenses:
            raise ValueError(f"'{self.name}' has a deacl_checkpoint but not the defense deacl; add it to defenses")
        return self


class Attack(_Strict):
    """L-infinity PGD in [0,1] pixel space (section 3.1): eps 8/255, step 2/255, 20 steps in the paper."""

    eps: float = Field(8 / 255, ge=0, le=1, description="radius of the ball, in [0,1] pixel units")
    step: float = Field(2 / 255, ge=0, le=1, description="step size, in [0,1] pixel units")
    steps: int = Field(20, ge=1, le=10_000)
    best: bool = Field(False, description="return the iterate of the largest loss instead of the last")
    stop_when_broken: bool = Field(True, description="PGD on classes: images whose class is surely lost are finished")


class TaskSettings(_Strict):
    """Data subset, head training (appendix C) and evaluation of one task."""

    datasets: list[str] = Field(["scenes"], min_length=1)
    n_train: int = Field(1200, ge=1, description="training images of the head; fewer if the data set has fewer")
    n_val: int = Field(200, ge=1, description="images held out of train to select the head's epoch")
    n_test: int = Field(128, ge=1, description="test images, the same for clean and attacked evaluation")
    size: int | str = Field("native", description="short side of the images in px, 'native' or 'original'")
    epochs: int = Field(..., ge=1)
    batch: int = Field(..., ge=1)
    lr: float = Field(..., gt=0)
    weight_decay: float = Field(0.0, ge=0)
    attack_batch: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto", description="images attacked at a time: as many as suit the device, or a number; halved if memory lacks"
    )

    @field_validator("size")
    @classmethod
    def _size_usable(cls, size: int | str) -> int | str:
        if size not in ("native", "original") and (isinstance(size, str) or size < 8):
            raise ValueError(f"{size!r} is no size; write 'native', 'original' or a number of pixels from 8 on")
        return size


class Segmentation(TaskSettings):
    """Segmentation adds its augmentation and the sliding window, whose side is the encoder's native px.

    The other tasks need no views: their only augmentation is a flip, and the tokens of both sides are kept.
    """

    views: int = Field(2, ge=1, description="augmented copies of each training image; epoch e uses copy e mod views")
    stride: float = Field(341 / 518, gt=0, le=1, description="stride as a fraction of the window")


class Depth(TaskSettings):
    """Depth adds the part of the image on which the error counts."""

    crop: Literal["none", "eigen"] = Field("none", description="eigen: the centre crop of NYU-Depth-v2 by Eigen et al.")


class DeACL(_Strict):
    """Eq. 2 and appendix C.2; the defaults are the paper's."""

    dataset: str = "scenes"
    n_train: int = Field(1024, ge=1)
    n_val: int = Field(64, ge=1, description="held-out images on which robustness is watched")
    epochs: int = Field(100, ge=1)
    warmup_epochs: float = Field(10, ge=0)
    batch: int = Field(128, ge=1)
    lr: float = Field(0.05, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    gamma: float = Field(2.0, ge=0, description="weight of the robustness term of eq. 2")
    eps: float = Field(4 / 255, ge=0, le=1)
    step: float = Field(2 / 255, ge=0, le=1)
    steps: int = Field(5, ge=1)
    attack_on: Literal["trained", "original"] = Field("trained", description="the encoder on which x' is made")
    checkpoints: list[int] = Field([], description="epochs kept for Figure 2, besides the last")
    processes: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto", description="processes that share each batch; auto: one for each GPU of this machine"
    )

    @model_validator(mode="after")
    def _checkpoints_inside(self) -> "DeACL":
        outside = [e for e in self.checkpoints if not 0 < e <= self.epochs]
        if outside:
            raise ValueError(f"checkpoints {outside} lie outside 1..{self.epochs} epochs; remove them or train longer")
        return self


class Sanity(_Strict):
    """How hard the attacks are checked (notebook 07_sanity), on the first `n` test images of each data set."""

    n: int = Field(16, ge=2, description="test images of each check")
    more_steps: int = Field(5, ge=1, description="the task attack with so many times its steps")
    restarts: int = Field(2, ge=1, description="the task attack from so many further random starts")
    eps: list[Annotated[float, Field(ge=0, le=1)]] = Field(
        [0, 2 / 255, 4 / 255, 8 / 255, 16 / 255, 32 / 255, 64 / 255],
        min_length=2, description="radii of the sweep, in [0,1] pixel units",
    )  # fmt: skip

    def rounds(self, attack: Attack) -> int:
        """How many times the steps of the tables' attack the checks of a row take: longer, restarted, swept, moved."""
        return self.more_steps + self.restarts + len(set(self.eps) - {0.0, attack.eps}) + 1


class Bench(_Strict):
    """What `make bench` times: frozen encoders under PGD and EmbedAttack, side by side with other implementations."""

    encoders: list[str] = Field(["embedded_vit", "dinov2_vits14"], min_length=1, description="names or timm models")
    gpu_encoders: list[str] = Field(["dino_vitb16"], description="further ones, where there is a GPU")
    size: int = Field(224, ge=8, description="side of the images in px, but not above the encoder's native px")
    images: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto", description="attacked at a time: as many as the package would, or a smaller number"
    )
    steps: int = Field(2, ge=1)
    repeats: int = Field(3, ge=2, description="rounds, each of which times everything once")


class Settings(_Strict):
    """Everything a profile can set; sections that a notebook does not use stay None."""

    profile: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    seed: int = Field(0, ge=0)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    data_root: str = Field("", description="folder that holds the real data sets; not needed for the scenes")
    protocol: Literal["paper", "released"] | list[Literal[DIFFERENCES]] = Field(
        "paper", description="the paper's text, its released code, or single differences of the latter"
    )
    counts: Literal["official", "any"] = Field("official", description="any: data sets that were cut down are accepted")
    missing: Literal["stop", "skip"] = Field("stop", description="stop at missing data or weights, or skip those rows")
    damaged: Literal["stop", "skip"] = Field(
        "stop", description="stop at an unreadable image, or leave it out and count"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="of attack steps: auto is bf16 where the device computes it fast; predictions are fp32"
    )
    strong: bool = Field(False, description="also AutoAttack, APGD, CosPGD and losses of SEA, see ssl_robust/strong.py")
    data_seed: int | None = Field(None, ge=0, description="draws the images of data sets; default: seed")
    seeds: list[Annotated[int, Field(ge=0)]] = Field(
        [], description="further seeds: heads and attacks are repeated with each, tables give mean and spread"
    )
    encoders: list[EncoderRow] = Field(min_length=1)
    classification: TaskSettings | None = None
    segmentation: Segmentation | None = None
    depth: Depth | None = None
    attack: Attack | None = None
    deacl: DeACL | None = None
    sanity: Sanity | None = None
    bench: Bench | None = None

    @model_validator(mode="after")
    def _names_unique(self) -> "Settings":
        names = [row.name for row in self.encoders]
        if len(set(names)) < len(names):
            raise ValueError(f"encoder names {names} are not unique; give each row its own name")
        return self

    @property
    def more_seeds(self) -> list[int]:
        """The seeds besides `seed` itself, each once."""
        return [seed for seed in dict.fromkeys(self.seeds) if seed != self.seed]

    def again(self, seed: int) -> "Settings":
        """These settings for another seed of heads and attacks, with results of their own, on the same images."""
        place = {"profile": f"{self.profile}/seeds/{seed}", "seed": seed}
        return self.model_copy(update=place | {"data_seed": self.seed if self.data_seed is None else self.data_seed})

    def task(self, name: str) -> TaskSettings:
        """Section of the task `name`; raises BadInput if this notebook did not set it."""
        section = getattr(self, name, None) if name in TASKS else None
        if section is None:
            raise BadInput(f"The settings have no section '{name}'; add one (params/demo.yaml shows how).")
        return section


class Cluster(_Strict):
    """A file of params/cluster/: what each job of `make paper EXECUTOR=slurm` asks for."""

    partition: str = Field("", description="Slurm partition; empty: the cluster's default")
    account: str = ""
    gpus: int = Field(1, ge=0, description="GPUs of a job")
    deacl_gpus: int = Field(1, ge=0, description="GPUs of a DeACL job, which shares its batches among them")
    cpus: int = Field(8, ge=1, description="CPU cores of a job")
    memory: int = Field(64, ge=1, description="main memory of a job in GB")
    hours: float = Field(24, gt=0, description="time limit of a job; one that meets it is taken up again")
    setup: list[str] = Field([], description="shell lines before each job, e.g. 'module load cuda'")
    at_once: int = Field(2, ge=1, description="EXECUTOR=local: jobs that run at the same time")


def sentence(error: dict[str, Any]) -> str:
    """One pydantic error as one sentence: the parameter, what is wrong, the remedy."""
    name = ".".join(str(part) for part in error["loc"] if not _is_union_tag(part))
    given, kind = error.get("input"), error["type"]
    if kind == "extra_forbidden":
        return f"Unknown parameter '{name}'; remove it or correct its spelling (ssl_robust/settings.py lists all)."
    if kind == "missing":
        return f"Parameter '{name}' is missing; add it (params/demo.yaml shows how)."
    if kind == "value_error":
        return f"Parameter '{name or 'encoders'}': {error['ctx']['error']}."
    if isinstance(given, str) and kind in ("float_type", "int_type"):
        return f"Parameter '{name}' must be a number but is the text '{given}'; {_number_hint(given)}."
    return f"Parameter '{name}' is {given!r}: {error['msg'][0].lower() + error['msg'][1:]}; correct it."


def _is_union_tag(part: int | str) -> bool:
    """Whether pydantic put `part` into an error's place to say which alternative of a union it tried."""
    return isinstance(part, str) and (not part.isidentifier() or part == Normalise.__name__)


def _number_hint(text: str) -> str:
    """How to write the number that `text` seems to mean: '8/255' -> 'write 0.031372549'."""
    try:
        top, _, bottom = text.partition("/")
        return f"write {float(top) / float(bottom or 1):.9g} instead"
    except (ValueError, ZeroDivisionError):
        return "write it as a plain decimal"


def check(**parameters: Any) -> Settings:
    """The validated settings of these parameters; raises BadInput with one sentence for the first bad one."""
    try:
        return Settings(**parameters)
    except ValidationError as error:
        # of a union's alternatives the one that came furthest is the one that was meant: the deepest place
        first = error.errors()[0]
        same = [e for e in error.errors() if e["loc"][: len(first["loc"]) - 1] == first["loc"][:-1]]
        meant = max(same, key=lambda e: len(e["loc"])) if first["loc"] and _is_union_tag(first["loc"][-1]) else first
        raise BadInput(sentence(meant)) from None


def read_params(path: Path) -> dict[str, Any]:
    """The raw parameters of one YAML file; raises BadInput if it is missing or not a mapping of parameters."""
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml"))) or "none"
        raise BadInput(f"There is no profile '{path.stem}': {path.name} is not in params/; choose one of: {known}.")
    try:
        parameters = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        line = getattr(getattr(error, "problem_mark", None), "line", 0) + 1
        raise BadInput(f"params/{path.name} is not valid YAML near line {line}; correct that line.") from None
    if not isinstance(parameters, dict):
        raise BadInput(f"params/{path.name} holds no parameters; write 'name: value' lines as in params/demo.yaml.")
    if parameters.get("profile") != path.stem:
        raise BadInput(f"params/{path.name} must say 'profile: {path.stem}', its own name, so that results do not mix.")
    return parameters
