"""The page that ``evaluate.py`` writes: one HTML file with its pictures in it, no script."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from allpet import ParallelBeam, Radon
from allpet.evaluation import Evaluation, meaning
from allpet.evaluation.copies import aligned
from allpet.evaluation.verdicts import FEW
from allpet.io.atomic import replacing
from allpet.metrics import standard_image
from allpet.randomness import keyed_generator
from allpet.reports import hardware, versions
from callbacks.figures import Tile, draw_grid, top

COLUMNS = 8
REAL, FAKE = "#1f3a5f", "#c1440e"
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 72em; margin: 2em auto; padding: 0 1em; color: #1a1a1a; }
table { border-collapse: collapse; font-size: 13px; }
th, td { padding: .2em .8em .2em 0; text-align: left; border-bottom: 1px solid #ddd; vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
td.bad { color: #a02c00; } td.good { color: #22662e; }
img { max-width: 100%; display: block; margin: .5em 0; }
p.small, li { color: #444; }
"""


def write_page(
    path: Path,
    evaluation: Evaluation,
    real: Tensor,
    fake: Tensor,
    geometry: ParallelBeam,
    training: Tensor | None,
    found: list[str],
    seed: int,
) -> None:
    """Write the page, whole or not at all.

    Args:
        path: of the HTML file.
        evaluation: what is shown.
        real: ``(n, 1, views, bins)``.
        fake: ``(m, 1, views, bins)``.
        geometry: of all sinograms.
        training: what was trained on; None if not known.
        found: sentences on what the sets are.
        seed: keys which slices are shown.
    """
    radon = Radon(geometry)
    parts = [
        "<h1>Generated sinograms beside held-out ones</h1>",
        "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in found) + "</ul>",
        f"<p><b>{html.escape(summary(evaluation))}</b></p>",
        "<h2>Random slices</h2>",
        "<p>Drawn by lot, not chosen. Each sinogram (views downwards, bins across) stands above its OSEM image. Each "
        "picture goes from 0 to the number above it, in the data's units.</p>",
        picture(gallery(real, fake, radon, seed), "random slices of both sets"),
        "<h2>Spectra and histograms</h2>",
        picture(curves(evaluation), "power spectra and histograms of both sets"),
    ]
    if evaluation.nearest is not None and training is not None:
        parts += [
            "<h2>The samples most like a copy</h2>",
            "<p>Those with the smallest d1/d2, and beneath each the training slice nearest to it over all turns, "
            "mirrors, gains and positions, turned and mirrored to fit. A copy would look the same but for its place "
            "and brightness.</p>",
            picture(pairs(evaluation, fake, training, radon), "samples and the training slices nearest to them"),
        ]
    parts += [
        "<h2>Numbers</h2>",
        "<p>The floor is what real slices score against real ones, in sets of the same size; sd are standard "
        "deviations over random halves, of what classifiers name over patients. <i>As real</i> means within two of the "
        "difference: one number in twenty falls outside by chance. Small consistency numbers alone mean little: any "
        "mixture of sinograms, blurred or not, is consistent; read them with the spectra and the distances.</p>",
        number_table(evaluation),
        f'<p class="small">allpet {html.escape(versions().get("allpet", ""))}, '
        f"torch {html.escape(versions()['torch'])}, {html.escape(str(hardware()['processor']))}, seed {seed}.</p>",
    ]
    write_document(path, "ALL-PET evaluation", parts)


def write_document(path: Path, title: str, parts: list[str]) -> None:
    """Write an HTML file of some elements, whole or not at all.

    Args:
        path: of the file.
        title: of the window.
        parts: elements, one after another.
    """
    text = (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def summary(evaluation: Evaluation) -> str:
    """Say in one sentence how many numbers are as real."""
    judged = [row for row in evaluation.rows() if row["verdict"]]
    rows = [row for row in judged if row["verdict"] != FEW]
    fine = [row for row in rows if not is_fault(row["verdict"])]
    names = [row["number"] for row in rows if is_fault(row["verdict"])]
    rest = f"; not {', '.join(names)}" if names else ""
    few = len(judged) - len(rows)
    more = f" For {few} more there are too few slices to tell." if few else ""
    return (
        f"{len(fine)} of {len(rows)} numbers cannot be told from those of real slices, or lie on their good side{rest}."
        f"{more}"
    )


def is_fault(verdict: str) -> bool:
    """Whether a verdict says that samples are worse than real slices."""
    return verdict not in ("", "as real", "below real", "above real", FEW)


def number_table(evaluation: Evaluation) -> str:
    """Return the table as HTML."""
    head = "".join(
        f'<th class="{kind}">{name}</th>'
        for name, kind in (
            ("number", ""),
            ("fake", "n"),
            ("sd", "n"),
            ("floor", "n"),
            ("sd", "n"),
            ("verdict", ""),
            ("", ""),
        )
    )
    lines = [f"<tr>{head}</tr>"]
    for row in evaluation.rows():
        cells = [f"<td>{html.escape(row['number'])}</td>"]
        cells += [f'<td class="n">{row[name]:.3g}</td>' for name in ("fake", "std", "floor", "floor_std")]
        kind = "bad" if is_fault(row["verdict"]) else "good"
        cells += [f'<td class="{kind}">{html.escape(row["verdict"])}</td>']
        cells += [f"<td>{html.escape(meaning(row['number'])[1])}</td>"]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return "<table>" + "\n".join(lines) + "</table>"


def gallery(real: Tensor, fake: Tensor, radon: Radon, seed: int, columns: int = COLUMNS) -> Figure:
    """Draw random slices of both sets, two rows of sinograms with their OSEM images each."""
    rows, labels = [], []
    for name, sinograms in (("real", real), ("fake", fake)):
        order = torch.randperm(len(sinograms), generator=keyed_generator(seed, name, "gallery"))
        chosen = sinograms[order[: 2 * columns]]
        images = standard_image(radon, chosen)
        for begin in range(0, len(chosen), columns):
            for values, label in ((chosen, "sinogram"), (images, "OSEM image")):
                rows.append([Tile(v[0], (0, top(v)), f"{top(v):.3g}") for v in values[begin : begin + columns]])
                labels.append(f"{name}\n{label}")
    return draw_grid(rows, labels)


def pairs(evaluation: Evaluation, fake: Tensor, training: Tensor, radon: Radon, columns: int = COLUMNS) -> Figure:
    """Draw the samples most like a copy above the training slices that they are most like."""
    nearest = evaluation.nearest
    assert nearest is not None
    order = nearest.ratio.argsort()[:columns]
    chosen, twins = fake[order], aligned(nearest, training)[order]
    ratios = [f"d1/d2 {nearest.ratio[i]:.2f}\nd1 {nearest.d1[i]:.2f}" for i in order.tolist()]
    images = [standard_image(radon, sinograms) for sinograms in (chosen, twins)]
    kinds = (
        ("sample", chosen),
        ("sample\nOSEM", images[0]),
        ("nearest\ntraining", twins),
        ("nearest\nOSEM", images[1]),
    )
    rows = [
        # Gains do not count here, so every picture has its own range.
        [Tile(v[0], (0, top(v)), title if line == 0 else "") for v, title in zip(values, ratios, strict=True)]
        for line, (_, values) in enumerate(kinds)
    ]
    return draw_grid(rows, [name for name, _ in kinds])


def curves(evaluation: Evaluation) -> Figure:
    """Draw spectra of both sets with their ratio, and histograms of activity and of image values."""
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3)
    titles = {
        "image": ("power of FBP images", "cycles per cm"),
        "bins": ("power along the bins", "cycles per cm"),
        "angle": ("power of angular harmonics", "cycles per turn"),
    }
    for axis, (name, (title, unit)) in zip(axes[0], titles.items(), strict=True):
        spectrum = evaluation.spectra[name]
        x = spectrum.frequency * (1 if name == "angle" else 10)
        axis.semilogy(x, spectrum.real, color=REAL, label="real")
        axis.semilogy(x, spectrum.fake, color=FAKE, label="fake")
        if name != "angle":
            for period in (40, 30, 20):
                if 10 / period <= float(x[-1]):
                    axis.axvline(10 / period, color="#bbb", lw=0.7, zorder=0)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel(unit, fontsize=8)
        axis.legend(fontsize=8, frameon=False)
    ratio = axes[1, 0]
    spectrum = evaluation.spectra["image"]
    ratio.plot(spectrum.frequency * 10, spectrum.fake / spectrum.real, color=FAKE)
    ratio.axhspan(0.8, 1.2, color="#eee", zorder=0)
    ratio.axhline(1, color=REAL, lw=0.8)
    ratio.set_ylim(0, 2)
    ratio.set_title("power of FBP images, fake / real (band: 20 %)", fontsize=9)
    ratio.set_xlabel("cycles per cm", fontsize=8)
    activity = evaluation.activity
    low, high = (float(torch.cat(activity).quantile(q)) for q in (0.0, 1.0))
    for values, colour, label in zip(activity, (REAL, FAKE), ("real", "fake"), strict=True):
        axes[1, 1].hist(
            values.numpy(), bins=30, range=(low, high), density=True, histtype="step", color=colour, label=label
        )
    axes[1, 1].set_title("total activity of a slice", fontsize=9)
    axes[1, 1].set_xlabel("activity x mm^2", fontsize=8)
    axes[1, 1].legend(fontsize=8, frameon=False)
    real, fake, peak = evaluation.levels
    level = (torch.arange(len(real)) + 0.5) * peak / len(real)
    for values, colour, label in ((real, REAL, "real"), (fake, FAKE, "fake")):
        axes[1, 2].loglog(level, values.flip(0).cumsum(0).flip(0), color=colour, label=label)
    axes[1, 2].set_title("share of pixels above a value (FBP images)", fontsize=9)
    axes[1, 2].set_xlabel("activity", fontsize=8)
    axes[1, 2].legend(fontsize=8, frameon=False)
    for axis in axes.flat:
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def picture(figure: Figure, description: str) -> str:
    """Return a figure as an ``img`` element that holds it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img alt="{html.escape(description)}" src="data:image/png;base64,{data}">'
