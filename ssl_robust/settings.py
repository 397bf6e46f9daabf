"""The schema of params/*.yaml and of every notebook's parameters cell; each refusal of a bad parameter is made here."""

import math
import os
import re
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    SerializationInfo,
    ValidationError,
    field_validator,
    model_validator,
)

from .tasks import TASKS

# where the authors' released code departs from the paper's text; protocols/released.py says how, one entry each
DIFFERENCES = (
    "embed_mse", "pgd_scaled_logits", "segpgd_two_means", "window_probabilities", "class0_ignored", "depth_attack_loss",
    "unnormalised_evaluation", "depth_unmasked", "depth_flipped", "depth_mean_of_images", "head_recipe",
    "native_input", "depth_480x640", "dense_stride",
)  # fmt: skip
PACKAGE = Path(__file__).resolve().parent


def _root() -> Path:
    """The folder of results, figures and of what one writes oneself: the checkout, or with an installed package the
    current folder; ssl-robust --root and tests name another one.
    """
    checkout = PACKAGE.parent if (PACKAGE.parent / "notebooks").is_dir() else Path.cwd()
    return Path(os.environ.get("SSL_ROBUST_ROOT", checkout)).resolve()


def _folder(name: str) -> Path:
    """A folder of the root, else of the checkout, else what an installed package brings along."""
    places = (ROOT / name, PACKAGE.parent / name)
    return next((place for place in places if place.is_dir()), PACKAGE / f"_{name}")


ROOT = _root()
NOTEBOOKS, PARAMS = _folder("notebooks"), _folder("params")
NO_RESULT = {"profile", "data_root", "device"}  # parameters that say where, not what
# Bounds that no sensible value meets: what lies beyond them is a slip of the pen, found out after hours or not at all.
MANY, LONG, RATE, SIDE, SEED = 100_000_000, 1_000_000, 1000.0, 8192, 2**32 - 1


class BadInput(ValueError):
    """Something the user gave cannot be used; the message is one sentence that names the thing and the remedy."""


def listed(names: list[str]) -> str:
    """Names for a sentence, three of them at most: 'a, b, c, and 27 more'."""
    return ", ".join([*names[:3], *[f"and {len(names) - 3} more"] * (len(names) > 3)])


def _read_fraction(value: Any) -> Any:
    """'8/255', as people write eps, as the number that Python makes of it; anything else as it is."""
    parts = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*/\s*([1-9]\d*)\s*", value) if isinstance(value, str) else None
    return float(parts[1]) / int(parts[2]) if parts else value


def written(pixels: float) -> str:
    """A change of a pixel in [0,1] as people write it: 0.03137254901960784 -> '8/255'; 0.5/255 -> '0.5/255'."""
    return f"{255 * pixels:.3g}/255"


def _write_fraction(pixels: float, info: SerializationInfo) -> float | str:
    """The number; with the context "written" its text, where that says the same to the last bit."""
    text = written(pixels)
    return text if info.context == "written" and pixels and _read_fraction(text) == pixels else pixels


# a change of a pixel in [0,1]: a number, or text as '8/255'
Pixels = Annotated[float, BeforeValidator(_read_fraction), PlainSerializer(_write_fraction, return_type=float | str)]


class Strict(BaseModel):
    # strict: "1e-3" given as text is refused instead of being guessed at
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Normalise(Strict):
    """Mean and standard deviation of each colour, in [0,1] pixel units."""

    mean: list[float] = Field(min_length=3, max_length=3)
    std: list[Annotated[float, Field(gt=0)]] = Field(min_length=3, max_length=3)

    @field_validator("mean", "std")
    @classmethod
    def _of_pixels(cls, values: list[float]) -> list[float]:
        if not all(0 <= value <= 1 for value in values):
            raise ValueError(f"{values} lies outside 0..1; pixels do not, so divide what is of 0..255 by 255")
        return values


class EncoderRow(Strict):
    """One frozen encoder, a row in each of the three tables: a timm model or a Python callable."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$", max_length=100, description="the row's name in tables and file names"
    )
    timm: str = Field("", description="timm model; default: the model that the name stands for (encoders.KNOWN)")
    call: str = Field("", description="'module:function' of an encoder of your own: images -> (cls, patches)")
    checkpoint: str = Field("", description="local weight file; relative: in the data folder, else the project")
    normalise: Literal["model", "imagenet", "inception", "clip", "cifar", "none"] | Normalise = "model"
    native: int | None = Field(None, ge=8, le=SIDE, description="native input side in px; default: model")
    defenses: list[Literal["standard", "deacl"]] = Field(["standard"], min_length=1)
    deacl_checkpoint: str = Field(
        "", description="a robust encoder's file, or the folder of a DeACL run: nothing is tuned"
    )
    n_test: int | None = Field(None, ge=1, description="at most so many test images of each task")

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
        if self.call and (self.timm or self.checkpoint):
            raise ValueError(f"'{self.name}' has a 'call'; remove its timm and checkpoint")
        if self.deacl_checkpoint and "deacl" not in self.defenses:
            raise ValueError(f"'{self.name}' has a deacl_checkpoint but not the defense deacl; add it to defenses")
        return self


class Attack(Strict):
    """L-infinity PGD in [0,1] pixel space (section 3.1): eps 8/255, step 2/255, 20 steps in the paper."""

    eps: Pixels = Field(8 / 255, ge=0, le=1, description="radius of the ball, in [0,1] pixel units")
    step: Pixels = Field(2 / 255, ge=0, le=1, description="step size, in [0,1] pixel units")
    steps: int = Field(20, ge=1, le=10_000)
    best: bool = Field(False, description="return the iterate of the largest loss instead of the last")
    stop_when_broken: bool = Field(True, description="PGD on classes: images whose class is surely lost are finished")


class AttackRow(Strict):
    """An attack of your own, a column of the tables: a Python callable, see attacks.kinds."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_-]*$", max_length=50, description="the column's name, also in file names")
    call: str = Field(
        description="'module:function' of the attack: (model=, x=, target=, start=, attack=, **) -> x_adv"
    )
    tasks: list[Literal[tuple(TASKS)]] = Field([*TASKS], min_length=1, description="the tasks whose tables get it")


class TaskSettings(Strict):
    """Data subset, head training (appendix C) and evaluation of one task."""

    datasets: list[str] = Field(["scenes"], min_length=1)
    n_train: int = Field(1200, ge=1, le=MANY, description="training images of the head; fewer if there are fewer")
    n_val: int = Field(200, ge=1, le=MANY, description="images held out of train to select the head's epoch")
    n_test: int = Field(128, ge=1, le=MANY, description="test images, the same for clean and attacked evaluation")
    size: int | str | tuple[int, int] = Field(
        "native", description="short side of the images in px, 'native' or 'original'; depth also [height, width]"
    )
    epochs: int = Field(..., ge=1, le=LONG)
    batch: int = Field(..., ge=1, le=LONG)
    lr: float = Field(..., gt=0, le=RATE)
    weight_decay: float = Field(0.0, ge=0, le=RATE)
    attack_batch: Literal["auto"] | Annotated[int, Field(ge=1, le=LONG)] = Field(
        "auto", description="images attacked at a time: as many as suit the device, or a number; halved if memory lacks"
    )
    tokens: Literal["fp32", "tf32", "bf16"] = Field(
        "fp32", description="precision of the tokens that heads are trained on; tf32 and bf16: faster on GPUs, rounded"
    )

    @field_validator("size", mode="before")
    @classmethod
    def _size_usable(cls, size: Any) -> Any:
        pair = issubclass(cls, Depth) and isinstance(size, list | tuple) and len(size) == 2
        sides = size if pair else [size]
        if size not in ("native", "original") and not all(isinstance(s, int) and 8 <= s <= SIDE for s in sides):
            raise ValueError(f"{size!r} is no size; write 'native', 'original' or a number of pixels from 8 to {SIDE}")
        return tuple(size) if pair else size


class Segmentation(TaskSettings):
    """Segmentation adds its augmentation and the sliding window, whose side is the encoder's native px.

    The other tasks need no views: their only augmentation is a flip, and the tokens of both sides are kept.
    """

    views: int = Field(2, ge=1, le=LONG, description="augmented copies of each image; epoch e uses copy e mod views")
    stride: float = Field(341 / 518, gt=0, le=1, description="stride as a fraction of the window")


class Depth(TaskSettings):
    """Depth adds the part of the image on which the error counts."""

    crop: Literal["none", "eigen"] = Field("none", description="eigen: the centre crop of NYU-Depth-v2 by Eigen et al.")


class DeACL(Strict):
    """Eq. 2 and appendix C.2; the defaults are the paper's."""

    dataset: str = "scenes"
    n_train: int = Field(1024, ge=1, le=MANY)
    n_val: int = Field(64, ge=1, le=MANY, description="held-out images on which robustness is watched")
    epochs: int = Field(100, ge=1, le=LONG)
    warmup_epochs: float = Field(10, ge=0, le=LONG)
    batch: int = Field(128, ge=1, le=LONG)
    lr: float = Field(0.05, gt=0, le=RATE)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0, le=RATE)
    gamma: float = Field(2.0, ge=0, le=LONG, description="weight of the robustness term of eq. 2")
    eps: Pixels = Field(4 / 255, ge=0, le=1)
    step: Pixels = Field(2 / 255, ge=0, le=1)
    steps: int = Field(5, ge=1, le=10_000)
    attack_on: Literal["trained", "original"] = Field("trained", description="the encoder on which x' is made")
    compiled: bool = Field(False, description="torch.compile of the encoders; faster on GPUs (unmeasured), rounded")
    checkpoints: list[int] = Field([], description="epochs kept for Figure 2, besides the last")
    processes: Literal["auto"] | Annotated[int, Field(ge=1, le=LONG)] = Field(
        "auto", description="processes that share each batch; auto: one for each GPU of this machine"
    )

    @model_validator(mode="after")
    def _checkpoints_inside(self) -> "DeACL":
        outside = [e for e in self.checkpoints if not 0 < e <= self.epochs]
        if outside:
            raise ValueError(f"checkpoints {outside} lie outside 1..{self.epochs} epochs; remove them or train longer")
        return self


class Sanity(Strict):
    """How hard the attacks are checked (notebook 07_sanity), on the first `n` test images of each data set."""

    n: int = Field(16, ge=2, le=MANY, description="test images of each check")
    more_steps: int = Field(5, ge=1, le=1000, description="the task attack with so many times its steps")
    restarts: int = Field(2, ge=1, le=1000, description="the task attack from so many further random starts")
    eps: list[Annotated[Pixels, Field(ge=0, le=1)]] = Field(
        [0.0, 2 / 255, 4 / 255, 8 / 255, 16 / 255, 32 / 255, 64 / 255],
        min_length=2, description="radii of the sweep, in [0,1] pixel units",
    )  # fmt: skip

    def rounds(self, attack: Attack) -> int:
        """How many times the steps of the tables' attack the checks of a row take: longer, restarted, swept, moved."""
        return self.more_steps + self.restarts + len(set(self.eps) - {0.0, attack.eps}) + 1


class Settings(Strict):
    """Everything a profile can set; sections that a notebook does not use stay None."""

    profile: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_-]*$", max_length=100)
    seed: int = Field(0, ge=0, le=SEED)
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
    attacks: list[str | AttackRow] = Field(
        ["embed", "task"], description="columns of the tables: the paper's, those of ssl_robust/strong, or your own"
    )
    data_seed: int | None = Field(None, ge=0, le=SEED, description="draws the images of data sets; default: seed")
    seeds: list[Annotated[int, Field(ge=0, le=SEED)]] = Field(
        [], description="further seeds: heads and attacks are repeated with each, tables give mean and spread"
    )
    encoders: list[EncoderRow] = Field(min_length=1)
    classification: TaskSettings | None = None
    segmentation: Segmentation | None = None
    depth: Depth | None = None
    attack: Attack | None = None
    deacl: DeACL | None = None
    sanity: Sanity | None = None

    @field_validator("profile")
    @classmethod
    def _folder_free(cls, profile: str) -> str:
        if profile.lower() == "lab":
            raise ValueError("'lab' is what parameters that are tried are filed under; choose another name")
        if profile.lower() == "committed":  # on some systems names differ by more than capitals
            raise ValueError(f"'{profile}' is the folder of the committed examples in figures/; choose another name")
        return profile

    @model_validator(mode="after")
    def _names_unique(self) -> "Settings":
        names = [row.name for row in self.encoders]
        if len({name.lower() for name in names}) < len(names):  # where capitals do not count, they name the same files
            raise ValueError(f"encoder names {names} are not unique (capitals do not count); give each row its own")
        return self

    @field_validator("attacks")
    @classmethod
    def _columns(cls, attacks: list[str | AttackRow]) -> list[str | AttackRow]:
        names = [own if isinstance(own, str) else own.name for own in attacks]
        if len(set(names)) < len(names) or {"clean", "worst"} & set(names) or not {"embed", "task"} <= set(names):
            raise ValueError(f"{names} must hold embed and task and no name twice; clean and worst are there anyway")
        return attacks

    def of(self, encoder: str) -> "Settings":
        """These settings for one row: no more test images than it asks for."""
        few = next((row.n_test for row in self.encoders if row.name == encoder), None)
        sections = {task: getattr(self, task) for task in TASKS if few and getattr(self, task)}
        fewer = {task: s.model_copy(update={"n_test": min(few, s.n_test)}) for task, s in sections.items()}
        return self.model_copy(update=fewer)

    @property
    def more_seeds(self) -> list[int]:
        """The seeds besides `seed` itself, each once."""
        return [seed for seed in dict.fromkeys(self.seeds) if seed != self.seed]

    def again(self, seed: int) -> "Settings":
        """These settings for another seed of heads and attacks, with results of their own, on the same images."""
        place = {"profile": f"{self.profile}/seeds/{seed}", "seed": seed}
        return self.model_copy(update=place | {"data_seed": self.seed if self.data_seed is None else self.data_seed})

    def section(self, name: str) -> Any:
        """The section `name`: a task's, 'attack', 'deacl' or 'sanity'; raises BadInput if it is not set."""
        found = getattr(self, name, None)
        if found is None:
            raise BadInput(f"The settings have no section '{name}'; add one (params/demo.yaml shows how).")
        return found

    def task(self, name: str) -> TaskSettings:
        """The section of a task; raises BadInput if it is not set."""
        return self.section(name)


@contextmanager
def skipping(settings: Settings, lost: list[dict[str, str]], rows: list[dict[str, str]]) -> Iterator[None]:
    """With missing: skip, a BadInput inside ends the block and adds `rows` with the reason `why` to `lost`."""
    try:
        yield
    except BadInput as problem:
        if settings.missing == "stop":
            raise
        lost += [{**row, "why": str(problem)} for row in rows]


def _shown(value: Any) -> str:
    """A value as Python writes it, in one line of bearable length, whatever it holds."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother = 1, 80, 80
    return short.repr(value)


def sentence(error: dict[str, Any]) -> str:
    """One pydantic error as one sentence: the parameter, what is wrong, the remedy."""
    given, kind, loc = error.get("input"), error["type"], error["loc"]
    last = loc[-1:] if kind == "extra_forbidden" else ()  # the user's own word, which may look like a tag
    above = [str(part) for part in loc[: len(loc) - len(last)] if not _is_union_tag(part)]
    name = ".".join([*above, *(_shown(part)[1:-1] for part in last)])
    if kind == "extra_forbidden":
        return f"Unknown parameter '{name}'; remove it or correct its spelling (ssl_robust/settings.py lists all)."
    if kind == "missing":
        return f"Parameter '{name}' is missing; add it (params/demo.yaml shows how)."
    if kind == "value_error":
        return f"Parameter '{name or 'encoders'}': {error['ctx']['error']}."
    if isinstance(given, str) and kind in ("float_type", "int_type"):
        return f"Parameter '{name}' must be a number but is the text {_shown(given)}; {_number_hint(given)}."
    remedy = "write true or false" if kind == "bool_type" else "correct it"
    return f"Parameter '{name}' is {_shown(given)}: {error['msg'][0].lower() + error['msg'][1:]}; {remedy}."


def _is_union_tag(part: int | str) -> bool:
    """Whether pydantic put `part` into an error's place to say which alternative of a union it tried."""
    return isinstance(part, str) and (not part.isidentifier() or part == Normalise.__name__)


def _number_hint(text: str) -> str:
    """How to write the number that `text` seems to mean: '8/255' -> 'write 0.031372549'."""
    try:
        top, _, bottom = text.partition("/")
        number = float(top) / float(bottom or 1)
        return f"write {number:.9g} instead" if math.isfinite(number) else "write a number that is finite"
    except (ValueError, ZeroDivisionError, OverflowError):
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


_YAML = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """YAML 1.2, where 010 is no octal 8, 1:30 no 90 and no no false: what is no decimal or true or false is text."""

    yaml_implicit_resolvers = {
        first: [(tag, form) for tag, form in pairs if tag in (_YAML + "null", _YAML + "merge")]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As the base class, but names are text and none stands twice."""
        names = set()
        for key in (key for key, _ in node.value if key.tag != _YAML + "merge"):
            if key.tag != _YAML + "str" or key.value in names:
                what = "is no name" if key.tag != _YAML + "str" else "stands there twice"
                raise yaml.MarkedYAMLError(problem=f"{_shown(key.value)} {what}", problem_mark=key.start_mark)
            names.add(key.value)
        return super().construct_mapping(node, deep)


for _tag, _form, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9]{0,99})", "-+0123456789"),
    ("float", r"[-+]?(([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.inf)|\.nan", "-+.0123456789"),
):
    _Loader.add_implicit_resolver(_YAML + _tag, re.compile(f"^({_form})$"), [*_first])


def read_yaml(path: Path, shown: str) -> Any:
    """What a YAML file holds, which sentences call `shown`; BadInput if it cannot be read."""
    try:
        return yaml.load(path.read_bytes(), _Loader)  # noqa: S506, a SafeLoader
    except OSError as error:
        raise BadInput(f"{shown} cannot be read ({error.strerror}); make it readable.") from None
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        why = getattr(error, "problem", None) or "no text, or nested too far"
        near = f" near line {mark.line + 1}" if mark else ""
        raise BadInput(f"{shown} is not valid YAML{near} ({why}); correct it.") from None


def read_params(path: Path) -> dict[str, Any]:
    """The raw parameters of one YAML file; raises BadInput if it is missing or not a mapping of parameters."""
    if not os.path.isfile(path):  # unlike Path's own, it takes a name of any length
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml"))) or "none"
        raise BadInput(f"There is no profile '{path.stem}': {path.name} is not in params/; choose one of: {known}.")
    parameters = read_yaml(path, f"params/{path.name}")
    if not isinstance(parameters, dict):
        raise BadInput(f"params/{path.name} holds no parameters; write 'name: value' lines as in params/demo.yaml.")
    if parameters.get("profile") != path.stem:
        raise BadInput(f"params/{path.name} must say 'profile: {path.stem}', its own name, so that results do not mix.")
    return parameters


def of_notebook(**parameters: Any) -> Settings:
    """`check`, and a place of their own for parameters that are tried: those that differ from params/<profile>.yaml.

    Their profile is '<profile>/lab': results and figures go there, heads, checkpoints and all that was ever computed
    for the profile are used again. One line says so. A profile without a file in params/ is as it is given.
    """
    given = check(**parameters)
    if differing := _tried(given, parameters):
        place = f"{given.profile}/lab"
        print(
            f"Not the parameters of params/{given.profile}.yaml ({', '.join(differing)}): results go to "
            f"results/{place} and figures/{place}; heads and checkpoints of '{given.profile}' are used again."
        )
        return given.model_copy(update={"profile": place})
    return given


def _tried(given: Settings, parameters: dict[str, Any]) -> list[str]:
    """The parameters that are not those of the profile's file, of a section the ones in it."""
    path = PARAMS / f"{given.profile}.yaml"
    if not path.is_file():
        return []
    filed, found = check(**read_params(path)).model_dump(), []
    for name, value in given.model_dump(include=set(parameters) - NO_RESULT).items():
        if isinstance(value, dict) and isinstance(filed[name], dict):
            found += [f"{name}.{key}" for key in value if value[key] != filed[name][key]]
        elif value != filed[name]:
            found.append(name)
    return found
