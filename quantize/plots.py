"""`--plot`: the divergence by place in the window, and its histogram. Alone in using matplotlib, which is an extra."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np

from localmoe.errors import StorageError, UsageError
from quantize.positions import Positions

_BINS = 64  # places are drawn this many at most, each the mean of those around it
_LEAST = 1e-9  # nats: below it a divergence is rounding, and has no place on a logarithmic axis


def check_plot(path: Path) -> None:
    """Find out before the work whether a plot can be written. Raises UsageError."""
    if path.suffix.lower() != ".png":
        raise UsageError(f"--plot: {path} does not end in .png")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"--plot: the directory of {path} does not exist")
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot draws with matplotlib, which is not installed: pip install 'localmoe[plot]'")


def plot_divergence(found: Positions, path: Path, title: str) -> None:
    """Draw `found`, which has a reference, into the PNG file `path`. Raises StorageError."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    by_place, histogram = figure.subplots(1, 2)
    places, means, high = by_position(found)
    by_place.plot(places, means, label="mean")
    by_place.plot(places, high, label="90th percentile", linewidth=0.8)
    by_place.set(xlabel="place in the window, tokens", ylabel="KLD, nats", ylim=(0, None))
    by_place.legend()
    kld = np.maximum(found.kld.numpy(), _LEAST)
    edges = np.geomspace(kld.min() / 1.01, kld.max() * 1.01, 61)
    histogram.hist(kld, bins=edges)
    histogram.axvline(float(kld.mean()), color="black", linewidth=0.8, label=f"mean {kld.mean():.5f}")
    histogram.set(xscale="log", xlabel="KLD, nats", ylabel="tokens")
    histogram.legend()
    figure.suptitle(title)
    temporary = path.with_name(f".{path.name}.new")
    try:
        figure.savefig(temporary, format="png", dpi=120)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StorageError(f"{path}: cannot be written ({error.strerror or error})") from error


def by_position(found: Positions) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(place, mean divergence, its 90th percentile) [bins]: bins of equal width over the places in a window."""
    places, kld = found.places.numpy(), found.kld.numpy()
    width = -(-int(places.max()) // _BINS)
    bins = (places - 1) // width
    used = np.unique(bins)
    parts = [kld[bins == index] for index in used]
    middles = 1 + used * width + (width - 1) / 2
    return middles, np.array([part.mean() for part in parts]), np.array([np.quantile(part, 0.9) for part in parts])
