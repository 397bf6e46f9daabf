"""The paper's protocol, and where another one is asked: `names` are those of settings.DIFFERENCES that are followed."""

from typing import Any

from .parts import part
from .settings import DIFFERENCES, Settings

Names = frozenset[str]


def active(settings: Settings) -> Names:
    """Names of the differences to the paper's text that `settings.protocol` switches on; none: the paper."""
    named = {"paper": (), "released": DIFFERENCES}
    return frozenset(named[settings.protocol] if isinstance(settings.protocol, str) else settings.protocol)


def label(names: Names) -> str | list[str]:
    """How records write a protocol: 'paper', 'released', or the sorted names in between."""
    return {0: "paper", len(DIFFERENCES): "released"}.get(len(names), sorted(names))


def adjusted(settings: Settings, native: int) -> Settings:
    """`settings` with the head recipe, input size and stride of their protocol, for an encoder of `native` px."""
    names = active(settings)
    return part("protocols.released").adjusted(settings, native) if names else settings


def ask(names: Names, question: str, paper: Any, *about: Any) -> Any:
    """The paper's answer, or where differences are followed what the function `question` of released.py answers."""
    return getattr(part("protocols.released"), question)(*about, names) if names else paper
