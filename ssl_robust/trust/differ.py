"""In what results differ, in words: a result from the nearest one stored beside it, a record from another."""

from pathlib import Path
from typing import Any

from ..records import Made, beside

# what of a record can change numbers, in this order, and how sentences call it
SAID = {name: f"the {name}" for name in (
    "schema", "task", "dataset", "encoder", "defense", "epoch", "attack", "protocol", "counts", "settings", "seed",
    "seeds", "precision", "batch", "n", "hashes", "loops", "git", "versions", "device", "threads", "numerics",
)} | {
    "schema": "the version of the record", "dataset": "the data set", "epoch": "the epochs of DeACL",
    "counts": "the setting counts", "settings": "the setting", "n": "the number of images",
    "hashes": "the hash of the", "loops": "the code's version of", "git": "the commit",
    "versions": "the version of", "threads": "the number of threads", "numerics": "the CPU's or GPU's",
}  # fmt: skip


def why(path: Path, made: Made) -> list[str]:
    """In what the result that `made` asks for differs from the nearest of those stored beside it; see nearest."""
    return nearest([before for _, before in beside(path)], made)


def nearest(others: list[Made], made: Made) -> list[str]:
    """In what `made` differs from that of `others` which is most like it, in words; [] if there are no others.

    Settings say what they were and are: 'the setting attack.eps (0.0314, now 0.0627)'.
    """
    told = [_apart(*({**m["inputs"], "loops": m["loops"]} for m in (before, made))) for before in others]
    least = min(told, key=len, default={})
    return [w if "hash" in w else f"{w} ({_short(a)}, now {_short(b)})" for w, (a, b) in least.items()]


def differing(one: dict[str, Any], other: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What differs between two records and can change numbers, in words -> both values: settings, inputs, machine."""
    return _apart(*({k: r[k] for k in SAID if r.get(k) not in (None, {})} for r in (one, other)))


def _apart(one: dict[str, Any], other: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Where two nested dicts differ, in words -> both values."""
    flat, found = (_flat(one), _flat(other)), {}
    for name in dict.fromkeys([*flat[0], *flat[1]]):
        first, second = (side.get(name, "none") for side in flat)
        if first != second:
            # what is made from several cells differs as they do
            top, _, rest = (name.split(".", 2)[2] if name.startswith("cells.") else name).partition(".")
            found[f"{SAID.get(top, f'the {top}')} {rest}".strip()] = first, second
    return found


def _flat(content: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Nested dicts as one: {"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flat(value, f"{above}{key}.") if isinstance(value, dict) else {f"{above}{key}": value}
    return flat


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "none" if value is None else str(value)
