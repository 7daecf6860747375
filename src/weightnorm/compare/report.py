"""The report: results.json, curves.png and a page that needs nothing else, written so that none is ever half there."""

import base64
import io
import json
from pathlib import Path

import matplotlib
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from weightnorm.checkpoints.files import replacing
from weightnorm.compare.view import Summary


def write_report(summary: Summary, folder: Path) -> None:
    """Write a comparison's results for machines and for people.

    Args:
        summary: what was found.
        folder: where; it exists.

    Raises:
        OSError: if a file cannot be written; those there before are untouched then.
    """
    _write(folder / "results.json", json.dumps(summary.record, indent=1, allow_nan=False).encode())
    _write(folder / "curves.png", _image(summary.view.curves, "png"))
    for name, content in summary.pictures.items():
        _write(folder / f"{name}.png", content)
    _write(folder / "report.html", page(summary).encode())


def page(summary: Summary) -> str:
    """Return the report as one HTML page, curves and pictures included, that loads nothing."""
    svg = _image(summary.view.curves, "svg").decode()
    environment = Environment(
        loader=PackageLoader("weightnorm.compare", "."), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template("report.html.j2").render(
        results=summary.record,
        view=summary.view,
        pictures={name: base64.b64encode(content).decode() for name, content in summary.pictures.items()},
        curves=svg[svg.index("<svg") :],  # without the XML header, which names a DTD elsewhere
    )


def _image(figure: Figure, kind: str) -> bytes:
    buffer = io.BytesIO()
    unnamed = {"Creator": None, "Date": None, "Format": None, "Type": None} if kind == "svg" else {}
    # Text stays text, and ids come out the same for the same curves.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "weightnorm"}):
        figure.savefig(buffer, format=kind, dpi=130, metadata=unnamed)
    return buffer.getvalue()


def _write(path: Path, content: bytes) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(content)
