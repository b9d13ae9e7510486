"""`convert inspect FILE --plot OUT`: pictures of an importance matrix, a sensitivity table or an artifact."""

import os
from pathlib import Path

from calibration.imatrix_file import load_imatrix
from calibration.sensitivity import is_sensitivity, load_sensitivity
from calibration.super_weights import SuperWeightReport
from converter.importance import is_imatrix
from converter.ownership import Replaceable, check_places, occupied
from converter.page import figures_page
from converter.pictures import bits_figures, importance_figures, sensitivity_figures
from converter.super_weights import RESULT
from converter.svg import MARK, Figure, svg_file
from converter.verify import artifact_files, artifact_tensors
from formats.errors import ConvertError
from formats.whole_file import whole_file

SUFFIXES = (".svg", ".html")


def plot_file(path: Path, output: Path) -> None:
    """Write the pictures of a file as an .svg, or as a page. Pictures that an earlier call has written are replaced,
    and nothing else. Raises ConvertError for what has none."""
    if output.suffix not in SUFFIXES:
        raise ConvertError(f"{output.suffix or 'no suffix'} is no kind of picture", str(output), "write .svg or .html")
    figures = figures_of(path)
    if not figures:
        raise ConvertError("there is nothing to draw: no tensor of a layer", str(path), "name another file")
    check_places([path], [output])
    replaceable = Replaceable()
    if _is_picture(output):
        replaceable.allow([output])
    elif os.path.lexists(output):
        raise occupied(output, "name another file with --plot, or remove this one")
    text = svg_file(figures) if output.suffix == ".svg" else figures_page(path.name, figures)
    with whole_file(output, "picture", place=replaceable.put) as file:
        file.write(text.encode())


def _is_picture(path: Path) -> bool:
    """Whether plot_file has written this: a picture says so in its beginning."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return MARK.encode() in file.read(4096)


def figures_of(path: Path) -> list[Figure]:
    if is_imatrix(path):
        matrix = load_imatrix(path)
        found = matrix.super_weights or _found_beside(path, matrix.model)
        return importance_figures(matrix, found.weights if found is not None else ())
    if is_sensitivity(path):
        return sensitivity_figures(load_sensitivity(path).losses)
    tensors = artifact_tensors(artifact_files(path)).values()
    return bits_figures(
        {t.name: (t.ggml_type.name, 8 * t.n_bytes / (t.n_rows * t.shape[-1])) for t in tensors if len(t.shape) > 1}
    )


def _found_beside(path: Path, model: str | None) -> SuperWeightReport | None:
    """What was found of the same model's super weights in the work directory that the file lies in."""
    result = path.with_name(RESULT)
    if not result.exists():
        return None
    report = SuperWeightReport.from_json(result.read_text(encoding="utf-8"), str(result))
    return report if report.model == model else None
