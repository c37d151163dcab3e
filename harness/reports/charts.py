"""Charts of members and combinations: accuracies with intervals, reliability, confusion."""

from __future__ import annotations

import contextlib
import warnings

from harness.pictures import BLUE, GREY, drawable, font_families, save_picture

NAMED = 40  # classes up to which a confusion matrix has their names
COUNTED = 20  # classes up to which its cells have their counts


@contextlib.contextmanager
def _figure(path, size, names):
    """A figure that can draw these names, saved at the end."""
    import matplotlib.style
    from matplotlib.figure import Figure

    families = {"font.family": font_families("".join(names)), "text.parse_math": False}
    with matplotlib.style.context(["default", families]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figure = Figure(figsize=size, dpi=110, layout="constrained")
        yield figure
        save_picture(path, lambda file: figure.savefig(file, format="png"))


def _short(text, limit):
    return text if len(text) <= limit else f"{text[: limit - 1].rstrip()}…"


def save_accuracies(path, rows, title):
    """Accuracy of every member and combination with its interval; a line at the best member's.

    rows: of harness.ensembles.comparison.compare.
    """
    names = [_short(drawable(row["name"], n), 40) for n, row in enumerate(rows)]
    with _figure(path, (8, 1.6 + 0.36 * len(rows)), names) as figure:
        ax = figure.subplots()
        for y, row in enumerate(rows):
            colour = GREY if row["kind"] == "member" else BLUE
            low, high = (100 * value for value in row["interval"])
            centre = 100 * row["accuracy"]
            ax.plot([low, high], [y, y], color=colour, linewidth=2.5, solid_capstyle="butt")
            ax.plot([centre], [y], "o", color=colour, markersize=6)
            ax.annotate(f"{centre:.2f}", (centre, y), (0, 6), textcoords="offset points",
                        ha="center", fontsize=8, color=colour)  # fmt: skip
        best = max(row["accuracy"] for row in rows if row["kind"] == "member")
        ax.axvline(100 * best, color=GREY, linestyle=":", linewidth=1)
        ax.set_yticks(range(len(rows)), names)
        ax.set_ylim(len(rows) - 0.5, -0.7)
        ax.set_xlabel("accuracy, %, with 95 % bootstrap intervals; dotted: the best member")
        ax.set_title(_short(title, 60), loc="left", fontsize=10)
        ax.grid(axis="x", alpha=0.25)
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.tick_params(axis="y", length=0)


def save_reliability(path, tables, title):
    """Accuracy against confidence in bins, before and after the temperature.

    tables: {label: harness.reports.classes.reliability}. The bars show the images of a bin.
    """
    with _figure(path, (5.6, 6), [title, *tables]) as figure:
        ax, count_axes = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        ax.plot([0, 1], [0, 1], ":", color=GREY, linewidth=1)
        for (label, table), (colour, style) in zip(
            tables.items(), ((GREY, "--"), (BLUE, "-")), strict=False
        ):
            bins_in_use = [k for k, count in enumerate(table["counts"]) if count]
            points = [[table[key][k] for k in bins_in_use] for key in ("confidence", "accuracy")]
            ax.plot(*points, style, marker="o", markersize=4, color=colour, label=label)
            bins = len(table["counts"])
            edges = [k / bins for k in range(bins + 1)]
            count_axes.stairs(table["counts"], edges, color=colour, linestyle=style, linewidth=1.4)
        ax.set_ylabel("accuracy")
        ax.set_xlim(0, 1)
        ax.set_ylim(0, 1)
        ax.set_title(_short(title, 60), loc="left", fontsize=10)
        ax.legend(frameon=False, fontsize=9, loc="upper left")
        count_axes.set_ylabel("images")
        count_axes.set_xlabel("confidence: probability of the predicted class")
        for axes in (ax, count_axes):
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)


def save_confusion(path, matrix, classes, title):
    """The confusion matrix, rows the true classes, as shares of the row; counts where they fit.

    matrix: int64 (classes, classes).
    """
    size = len(classes)
    side = min(max(4.5, 1.8 + 0.42 * size), 14)
    names = [_short(drawable(name, k), 24) for k, name in enumerate(classes)]
    with _figure(path, (side + 0.8, side), [title, *names]) as figure:
        ax = figure.subplots()
        shares = (matrix.double() / matrix.sum(1, keepdim=True).clamp(min=1)).numpy()
        image = ax.imshow(shares, cmap="cividis", vmin=0, vmax=1)
        figure.colorbar(image, ax=ax, shrink=0.7, label="share of the true class")
        if size <= NAMED:
            ax.set_xticks(range(size), names, rotation=90)
            ax.set_yticks(range(size), names)
        for true, row in enumerate(matrix.tolist() if size <= COUNTED else []):
            for predicted, count in enumerate(row):
                if count:
                    dark = shares[true, predicted] < 0.5
                    ax.text(predicted, true, count, ha="center", va="center", fontsize=8,
                            color="white" if dark else "black")  # fmt: skip
        ax.set_xlabel("predicted")
        ax.set_ylabel("true")
        ax.set_title(_short(title, 60), loc="left", fontsize=10)
