"""What the bench writes: both tables with their notes, as files and as pictures."""

import math
from collections.abc import Iterator

import bench
import pandas as pd
import seaborn as sns
from bench import Row
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from ssl_robust import compute, records
from ssl_robust.settings import Settings
from ssl_robust.show import layout, tiles

# What this project set out to reach against torchattacks, and of the matrix product's rate; the notes say what it did.
AIMS = {("cpu", "fp32"): 1.1, ("cpu", "bf16"): 2.2, ("cuda", "bf16"): 6.0}  # torchattacks computes in fp32
CEILING_AIM = 0.45


def notes(table: pd.DataFrame, picks: pd.DataFrame | None = None) -> list[str]:
    """Sentences below the tables: how it was measured, the weights, and what was reached of the aims."""
    device, rounds = table["device"].iloc[0], len(table["seconds"].iloc[0])
    found = [
        f"Rounds: {rounds}, after one that is dropped; each runs everything once. Ratios are of the same round, ± is "
        "the standard deviation over rounds.",
        "Speed: images x steps a second. Memory: the peak above what was held before. FLOPs: what the contender itself "
        "computes; the ceiling is the measured rate of an MLP's two matrix products in the same precision.",
        "Accuracy (1 when clean) and loss are evaluated in fp32. Torchattacks, foolbox and the plain loop get timm's "
        "own forward pass; torchattacks and foolbox cannot express EmbedAttack, so the plain loop stands in.",
    ]
    origins = table.drop_duplicates("encoder")
    found += [f"Weights of {r.encoder} at {r.size} px: {r.weights}." for r in origins.itertuples()]
    for _, rows in table.groupby(["encoder", "attack"], sort=False):
        found += _reached(rows.set_index("contender"), device)
    if not (table["precision"] == "bf16").any():
        found.append(_no_bf16(device, picks))
    return found


def _verdict(value: float, aim: float | None) -> str:
    return "" if aim is None else f" (aim: {aim:g}; {'reached' if value >= aim else 'not reached'})"


def _reached(rows: pd.DataFrame, device: str) -> Iterator[str]:
    """Sentences on one encoder and attack: speed and strength of ours beside the contender it is compared with."""
    first = rows.iloc[0]
    other, what = rows.loc[first["against"]], f"{first['encoder']}, {first['attack']}"
    for name in ("ours fp32", "ours") if first["precision"] == "bf16" else ("ours fp32",):
        own = rows.loc[name]
        aim = AIMS.get((device, own["precision"])) if first["against"] == "torchattacks" else None
        apart = abs(own["loss"] - other["loss"]) / max(own["loss_se"], other["loss_se"], 1e-12)
        yield (
            f"{what}: ours in {own['precision']} runs {own['ratio']:.2f} ± {own['ratio_sd']:.2f} times as fast as "
            f"{first['against']}{_verdict(own['ratio'], aim)}; its loss is {apart:.2f} standard errors away; "
            f"{own['identical']:.1%} of the values are bit-identical, {own['near']:.1%} equal up to rounding (1e-6)."
        )
    if first["precision"] == "bf16":
        share = first["ceiling_share"]
        yield f"{what}: ours reaches {share:.0%} of the bf16 matrix products{_verdict(share, CEILING_AIM)}."


def _no_bf16(device: str, picks: pd.DataFrame | None) -> str:
    """Why there is no row in bf16, and what is known of its strength."""
    words = "No row is in bf16: " + (
        "the setting precision is fp32."
        if compute.fast_bf16(device)
        else f"this {device.upper()} has no matrix instructions for it, so its speed could not be measured here."
    )
    known = [] if picks is None else picks[picks["choice"] == "precision"].itertuples()
    return " ".join([words, *(f"Strength, {r.encoder}, {r.note.partition('; ')[2]}." for r in known)])


def _contenders_text(table: pd.DataFrame) -> pd.DataFrame:
    """The table of contenders for people."""
    rows = [
        {
            "Encoder": r.encoder, "Attack": r.attack, "Contender": f"{r.contender} ({r.precision})",
            "Image steps/s": f"{r.speed:.3g} ± {r.speed_sd:.2g}",
            "Ratio": f"{r.ratio:.2f} ± {r.ratio_sd:.2f} × {r.against}", "Memory, MB": f"{r.memory_mb:.0f}",
            "GFLOP": f"{r.gflop:.3g}", "Of the ceiling": f"{r.ceiling_share:.0%} of {r.ceiling_gflops:.3g} GFLOP/s",
            "Accuracy": f"{r.accuracy:.2f}", "Loss": f"{r.loss:.4g} ± {r.loss_se:.2g}",
            "Largest change": f"{r.max_change * 255:.3g}/255", "Identical": f"{r.identical:.1%}",
            "Within 1e-6": f"{r.near:.1%}", "Largest difference": f"{r.largest:.1e}",
        }
        for r in table.itertuples()
    ]  # fmt: skip
    return pd.DataFrame(rows)


def _choices_text(picks: pd.DataFrame) -> pd.DataFrame:
    """The table of choices for people."""
    rows = [
        {
            "Encoder": r.encoder, "Choice": r.choice, "Option": r.option, "Against": r.against,
            "Ratio": "–" if math.isnan(r.ratio) else f"{r.ratio:.2f} ± {r.ratio_sd:.2f}",
            "Value": "–" if math.isnan(r.value) else f"{r.value:.3g} against {r.against_value:.3g} {r.unit}",
            "Remark": r.note,
        }
        for r in picks.itertuples()
    ]  # fmt: skip
    return pd.DataFrame(rows)


def markdown(table: pd.DataFrame, picks: pd.DataFrame) -> str:
    """Both tables with their notes."""
    return "\n".join(
        [
            layout.markdown("Contenders", _contenders_text(table), {"": notes(table, picks)}),
            layout.markdown("Choices", _choices_text(picks), {"": remarks(picks)}),
        ]
    )


def remarks(picks: pd.DataFrame) -> list[str]:
    """Sentences below the choices: how to read them, and which brought nothing."""
    found = [
        "A ratio above 1 favours the option; of memory, below 1. Loading: above 1, images come faster than a 20-step "
        "attack takes them, so the attack never waits.",
    ]
    speeds = picks[(picks["unit"] != "MB") & picks["ratio"].notna()]
    slower, faster = speeds["ratio_min"] < 1, speeds["ratio_max"] >= 1
    for words, rows in (
        ("Slower in every round", speeds[~faster]),
        ("Faster in some rounds and slower in others", speeds[slower & faster]),
    ):
        named = ", ".join(f"{r.choice} ({r.option}, {r.encoder})" for r in rows.itertuples())
        found.append(f"{words}: {named or 'none'}.")
    return found


def write(settings: Settings, table: pd.DataFrame, picks: pd.DataFrame) -> str:
    """Write figures/<profile>/bench.{csv,md,json,png,pdf}, choices.{csv,png,pdf}; returns the Markdown."""
    folder, text = records.figures_dir(settings.profile), markdown(table, picks)
    for name, rows in (("bench", table.drop(columns="seconds")), ("choices", picks)):
        content = rows.to_csv(index=False, float_format="%.6g", lineterminator="\n")
        records.write_bytes(content.encode(), folder / f"{name}.csv")
    records.write_bytes(text.encode(), folder / "bench.md")
    asked = bench.section(settings).model_dump()
    content = {
        "settings": {"seed": settings.seed, "precision": settings.precision, "bench": asked},
        "provenance": records.provenance(records.pick_device(settings.device)),
        "notes": notes(table, picks), "contenders": _plainly(table), "choices": _plainly(picks),
    }  # fmt: skip
    records.write_json(content, folder / "bench.json")
    tiles.save(picture(table), folder / "bench")
    tiles.save(choices_picture(picks), folder / "choices")
    return text


def _plainly(rows: pd.DataFrame) -> list[Row]:
    """Rows as JSON can hold them: null for what was not measured."""
    return rows.astype(object).where(rows.notna(), None).to_dict("records")


@plt.rc_context(tiles.STYLE)
def picture(table: pd.DataFrame) -> Figure:
    """Image steps a second of every contender, a panel for each encoder; bars: standard deviation over rounds."""
    long = table.assign(speed=[[r.images * r.steps / s for s in r.seconds] for r in table.itertuples()])
    long = long.explode("speed").astype({"speed": float})
    colours = {"PGD": tiles.COLOURS["task"], "EmbedAttack": tiles.COLOURS["embed"]}
    fig, axes = tiles.panels(table["encoder"].nunique(), 4.4, 3.2)
    for ax, (name, rows) in zip(axes, long.groupby("encoder", sort=False), strict=True):
        look = {"errorbar": "sd", "capsize": 0.3, "err_kws": {"linewidth": 1}, "palette": colours}
        sns.barplot(rows, x="speed", y="contender", hue="attack", ax=ax, legend=ax is axes[-1], **look)
        first = rows.iloc[0]
        ax.set(title=f"{name}, {first['size']} px, {first['device'].upper()}", xlabel="image steps / s", ylabel="")
        sns.despine(ax=ax)
    if legend := axes[-1].get_legend():
        sns.move_legend(axes[-1], "upper left", bbox_to_anchor=(1, 1), title=None)
        legend.set_in_layout(True)
    return fig


@plt.rc_context(tiles.STYLE)
def choices_picture(picks: pd.DataFrame) -> Figure:
    """The ratio of every choice that was timed, a panel for each encoder; at the line a choice brings nothing."""
    shown = picks.dropna(subset="ratio")
    # loading is no choice: its ratio says whether the attack has to wait
    shown = shown[(shown["unit"] != "MB") & (shown["choice"] != "loading")].assign(
        what=lambda rows: rows["choice"] + ": " + rows["option"]
    )
    names = list(shown["encoder"].unique())
    most = max(shown["encoder"].value_counts(), default=1)
    fig, axes = tiles.panels(max(1, len(names)), 5.2, 0.8 + 0.27 * most)
    for ax, name in zip(axes, names, strict=False):
        rows = shown[shown["encoder"] == name]
        look = {"color": tiles.COLOURS["clean"], "ecolor": "0.4", "capsize": 2}
        bars = ax.barh(rows["what"], rows["ratio"] - 1, left=1, xerr=rows["ratio_sd"], **look)
        ax.bar_label(bars, [f"{r:.2f}" for r in rows["ratio"]], padding=4, fontsize=8)
        ax.axvline(1, color="0.3", linewidth=0.8)
        ax.invert_yaxis()
        ax.set(title=name, xlabel="times as fast as without the choice")
        ax.margins(x=0.15)
        sns.despine(ax=ax)
    return fig
