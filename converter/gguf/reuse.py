"""Tensors that another artifact of the same source holds already, as a ladder's rungs share many: copied, not encoded.

The journal of an artifact keeps beside every tensor a key, of all that decides its bytes. A later artifact whose tensor
has the same key takes the bytes, once their hash is what the journal says.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Self

import numpy as np

from bitwright.calibration.control import OnProgress, say
from bitwright.converter.artifact.feedback import wants_feedback
from bitwright.converter.artifact.run import EarlierArtifact, Run
from bitwright.converter.gguf.encode import Encoder
from bitwright.converter.job.identity import job_fingerprint
from bitwright.converter.smoothing.view import foldings_of
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.gguf import EncodedTensor, read_gguf
from bitwright.formats.files.journal import read_lines
from bitwright.profiles.planning.plan import PlannedTensor

_KEY, _FEEDBACK = "key", "feedback"
_CHUNK_BYTES = 1 << 24


@dataclass(frozen=True)
class _Donor:
    """A finished tensor of another artifact. feedback: what its journal says of it, None without any."""

    stored: EncodedTensor
    sha256: str
    feedback: object


class ReusingEncoder:
    """An encoder that copies what the run's earlier artifacts have; otherwise as converter.gguf.encode.Encoder."""

    def __init__(self, encoder: Encoder, run: Run):
        self.encoder, self.run = encoder, run
        self._source = _digest(_of_source(run))
        self._donors = {key: donor for each in run.earlier for key, donor in _donors(each, run.progress).items()}
        self._keys: dict[str, str] = {}
        self._taken: dict[str, _Donor] = {}

    @property
    def rows(self) -> tuple[PlannedTensor, ...]:
        return self.encoder.rows

    def encode(self, planned: PlannedTensor) -> Iterator[np.ndarray]:
        """As Encoder.encode."""
        name = planned.tensor.name
        self._keys[name] = self._key(planned)
        donor = self._donors.get(self._keys[name])
        if donor is None or not _is_sound(donor):
            yield from self.encoder.encode(planned)
            return
        self._taken[name] = donor
        yield from _chunks(donor)

    def remarks(self, name: str) -> dict[str, object]:
        """As Encoder.remarks, and the key."""
        if name not in self._taken:
            return {**self.encoder.remarks(name), _KEY: self._keys[name]}
        feedback = self._taken[name].feedback
        return {_KEY: self._keys[name]} | ({} if feedback is None else {_FEEDBACK: feedback})

    def was_copied(self, name: str) -> bool:
        """As PlanEncoder.was_copied."""
        return name in self._taken

    def __enter__(self) -> Self:
        self.encoder.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.encoder.__exit__(*error)
        if self._taken:
            n_bytes = sum(donor.stored.n_bytes for donor in self._taken.values())
            say(self.run.progress, f"{len(self._taken)} tensors ({n_bytes:,} bytes) are those of earlier artifacts")

    def _key(self, planned: PlannedTensor) -> str:
        """Of what decides the bytes of a tensor; a second-level scale, which is cheap, goes with its matrix."""
        plan, encoder, name = self.encoder.plan, self.encoder, planned.tensor.name
        importance, foldings = encoder.importance.get(name), foldings_of(encoder.checkpoint)
        fed = encoder.feedback is not None and wants_feedback(planned)
        matrix = encoder.planned(f"{name.removesuffix('.scale')}.weight") if planned.tensor.origin == "scale" else None
        return _digest(
            {
                "source": self._source,
                "tensor": asdict(planned.tensor),
                "format": planned.format,
                "format of the matrix": None if matrix is None else matrix.format,
                "pins": [asdict(pin) for pin in planned.pins],
                "effort": plan.effort,
                "feedback": plan.error_feedback if fed else None,
                "folding": [foldings[name].identity() for name in planned.tensor.sources if name in foldings],
                "importance": None if importance is None else hashlib.sha256(importance.tobytes()).hexdigest(),
            }
        )


def _of_source(run: Run) -> Mapping[str, object]:
    """Of the fingerprint what is the source's, the tool's, and the text's that second moments are of."""
    fingerprint = job_fingerprint(run.job, run.checkpoint)
    source = ("tool", "model", "revision", "files", "mtp", "base")
    text = ("calibration", "calibration_file", "chat", "samples", "sequence_length", "calibration_dtype")
    return {name: fingerprint[name] for name in (*source, *text, "device", "seed")}


def _digest(plain: object) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()


def _donors(finished: EarlierArtifact, progress: OnProgress) -> dict[str, _Donor]:
    """The tensors of an artifact by key; none of one that cannot be read any more."""
    try:
        stored = {tensor.name: tensor for path in finished.files for tensor in read_gguf(path).tensors}
    except ConvertError as error:
        say(progress, f"{error.where}: nothing is copied from it: {error.what}")
        return {}
    entries = {entry["tensor"]: entry for entry in read_lines(finished.journal)}
    return {
        entry[_KEY]: _Donor(stored[name], entry["sha256"], entry.get(_FEEDBACK))
        for name, entry in entries.items()
        if _KEY in entry and name in stored
    }


def _is_sound(donor: _Donor) -> bool:
    digest = hashlib.sha256()
    for data in _chunks(donor):
        digest.update(data.data)
    return digest.hexdigest() == donor.sha256


def _chunks(donor: _Donor) -> Iterator[np.ndarray]:
    stored = donor.stored
    step = max(1, _CHUNK_BYTES * stored.n_rows // stored.n_bytes)
    for start in range(0, stored.n_rows, step):
        yield stored.read(start, min(start + step, stored.n_rows)).reshape(-1)
