"""What a part of a calibration leaves: sums over its groups of samples, in one file.

safetensors   metadata "bitwright.group_sums": JSON with "version", the part, the fingerprint, the options of the job,
              the words of the command, and the SHA-256 of the arrays
              "importance/GROUP/KIND/TENSOR"   sums float64, counts int64, by GGUF tensor
              "gradients/GROUP/KIND/PARAMETER" float64, as calibration/sensitivity/gradient_sums.py has them

Groups are those of calibration/stream/micro_batches.py, of the text of each of the two.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitwright.converter.job.cache import arrays_identity
from bitwright.converter.machines.part import Part
from bitwright.formats.files.record import RecordKind

Groups = Mapping[int, Mapping[str, Mapping[str, np.ndarray]]]
"""Group -> kind -> name -> sum."""

_KIND = RecordKind("bitwright.group_sums", 1, "part of a calibration", "bitwright imatrix --part")
_FIELDS: dict[str, tuple[type, ...]] = {
    "part": (list,),
    "fingerprint": (dict,),
    "options": (dict,),
    "identity": (dict,),
    "command": (list,),
    "sha256": (str,),
}


@dataclass(frozen=True, eq=False)
class GroupSumsOfPart:
    """fingerprint: what has to be the same of all parts. options: of the job, as of build_job; identity: of model and
    text, as ImportanceMatrix has it. command: the words that computed the part. importance, gradients: of its groups;
    gradients are empty where nobody asked for them."""

    part: Part
    fingerprint: dict[str, Any]
    options: dict[str, Any]
    identity: dict[str, Any]
    command: list[str]
    importance: Groups
    gradients: Groups


def save_part(path: Path, part: GroupSumsOfPart) -> None:
    """The file appears whole or not at all; the same sums give the same bytes."""
    arrays = {
        f"{what}/{group}/{kind}/{name}": np.ascontiguousarray(array)
        for what, groups in (("importance", part.importance), ("gradients", part.gradients))
        for group, kinds in groups.items()
        for kind, of_kind in kinds.items()
        for name, array in of_kind.items()
    }
    header = {
        "part": [part.part.index, part.part.count],
        "sha256": arrays_identity(arrays),
        **{name: getattr(part, name) for name in ("fingerprint", "options", "identity", "command")},
    }
    _KIND.save(path, header, arrays)


def load_part(path: Path) -> GroupSumsOfPart:
    """Raises ConvertError for a file that is missing, cut short, changed or of another kind."""
    header, arrays = _KIND.load(path)
    stored = _KIND.fields(str(path), header, _FIELDS)
    if stored.pop("sha256") != arrays_identity(arrays):
        raise _KIND.damaged(str(path), "its sums are not what was written")
    found: dict[str, dict[int, dict[str, dict[str, np.ndarray]]]] = {"importance": {}, "gradients": {}}
    for full, array in arrays.items():
        what, group, kind, name = full.split("/", 3)
        found[what].setdefault(int(group), {}).setdefault(kind, {})[name] = array
    stored["part"] = Part(*stored["part"])
    return GroupSumsOfPart(**stored, importance=found["importance"], gradients=found["gradients"])
