"""What a part of a calibration leaves: sums over its groups of samples, in one file, and large ones in another.

safetensors   metadata "bitwright.group_sums": JSON with "version", the part, the fingerprint, the options of the job,
              the words of the command, the SHA-256 of the arrays, what its second moments and its activations are of,
              trials of super weights, and what is in the file of data
              "importance/GROUP/KIND/TENSOR"   sums float64, counts int64, by GGUF tensor
              "gradients/GROUP/KIND/PARAMETER" float64, as calibration/sensitivity/gradient_sums.py has them
              "activations/GROUP/KIND/TENSOR", "inputs/KIND/TENSOR"   as ActivationSums has them in
                                               calibration/passes/activation_pass.py
data          written before it: "moments/NAME", npz, as partial ones are in calibration/statistics/second_moments.py;
              "rows/TENSOR", npz, as InputRows has them

Groups are those of calibration/stream/micro_batches.py, of the text of each of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitwright.converter.job.cache import arrays_identity
from bitwright.converter.machines.measuring.bundle import Bundle, Member, data_of
from bitwright.converter.machines.part import Part
from bitwright.formats.files.record import RecordKind

Groups = Mapping[int, Mapping[str, Mapping[str, np.ndarray]]]
"""Group -> kind -> name -> sum."""

_KIND = RecordKind("bitwright.group_sums", 2, "part of a calibration", "bitwright imatrix --part")
_FIELDS: dict[str, tuple[type, ...]] = {
    "part": (list,),
    "fingerprint": (dict,),
    "options": (dict,),
    "identity": (dict,),
    "command": (list,),
    "moments": (dict,),
    "observed": (list,),
    "trials": (list,),
    "data": (dict,),
    "sha256": (str,),
}
_GROUPS, _INPUTS = ("importance", "gradients", "activations"), "inputs"


@dataclass(frozen=True, eq=False)
class GroupSumsOfPart:
    """fingerprint: what has to be the same of all parts. options: of the job, as of build_job; identity: of model and
    text, as ImportanceMatrix has it. command: the words that computed the part. importance, gradients, activations: of
    its groups, empty where nobody asked for them; inputs: of all its groups, as of ActivationSums.

    moments: what the partial moments in its data are of, as plain JSON data: "shared", see InputMoments, and "fed": for
    every GGUF tensor the "columns" of the inputs that it is about, null for all, and its "matrices", [matrix,
    parameter, matrix of it]; empty without any. observed: GGUF tensors of which activations tell the importance.
    trials: of super weights, as lines of the journal of removals.
    """

    part: Part
    fingerprint: dict[str, Any]
    options: dict[str, Any]
    identity: dict[str, Any]
    command: list[str]
    importance: Groups
    gradients: Groups
    activations: Groups
    inputs: Mapping[str, Mapping[str, np.ndarray]]
    moments: dict[str, Any]
    observed: list[str]
    trials: list[dict[str, Any]]
    data: Bundle


def save_part(path: Path, part: GroupSumsOfPart) -> None:
    """The file appears whole or not at all; the same sums give the same bytes."""
    arrays = {
        f"{what}/{group}/{kind}/{name}": np.ascontiguousarray(array)
        for what in _GROUPS
        for group, kinds in getattr(part, what).items()
        for kind, of_kind in kinds.items()
        for name, array in of_kind.items()
    }
    for kind, of_kind in part.inputs.items():
        arrays |= {f"{_INPUTS}/{kind}/{name}": np.ascontiguousarray(array) for name, array in of_kind.items()}
    plain = ("fingerprint", "options", "identity", "command", "moments", "observed", "trials")
    header = {
        "part": [part.part.index, part.part.count],
        "sha256": arrays_identity(arrays),
        "data": part.data.members,
        **{name: getattr(part, name) for name in plain},
    }
    _KIND.save(path, header, arrays)


def load_part(path: Path) -> GroupSumsOfPart:
    """Raises ConvertError for a file that is missing, cut short, changed or of another kind, and for data beside it
    that are missing or of another size."""
    header, arrays = _KIND.load(path)
    stored = _KIND.fields(str(path), header, _FIELDS)
    if stored.pop("sha256") != arrays_identity(arrays):
        raise _KIND.damaged(str(path), "its sums are not what was written")
    groups: dict[str, dict[int, dict[str, dict[str, np.ndarray]]]] = {what: {} for what in _GROUPS}
    inputs: dict[str, dict[str, np.ndarray]] = {}
    for full, array in arrays.items():
        what, _, rest = full.partition("/")
        if what == _INPUTS:
            kind, _, name = rest.partition("/")
            inputs.setdefault(kind, {})[name] = array
        else:
            group, kind, name = rest.split("/", 2)
            groups[what].setdefault(int(group), {}).setdefault(kind, {})[name] = array
    stored["part"] = Part(*stored["part"])
    members = {name: Member(*member) for name, member in stored["data"].items()}
    stored["data"] = Bundle(data_of(path) if members else path, members)
    stored["data"].check()
    return GroupSumsOfPart(**stored | groups, inputs=inputs)
