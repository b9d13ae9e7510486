"""What a model loses with some of its weights at zero."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import inf, sqrt
from typing import Any, NamedTuple

import numpy as np
import torch

from bitwright.calibration.control import PassControl, say
from bitwright.calibration.evaluation.quality import check_scorable, score_positions
from bitwright.calibration.stream.forward import LayerStream
from bitwright.calibration.stream.streamable import StreamableModel
from bitwright.calibration.super_weights.removal_stream import Removal, RemovalStream
from bitwright.calibration.text.corpus import Corpus
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.disk import make_directory, remove_tree
from bitwright.formats.files.journal import append_line, read_lines

# Copies of the model that go through the layers together: each has hidden states of its own on the disk.
_COPIES = 32


class Part(NamedTuple):
    """Sums over the scored positions of a part of the text: negative log-likelihood of the true next token by the
    source and by the model without the weights, KL divergence, and its square."""

    positions: int
    source_loss: float
    loss: float
    divergence: float
    squares: float


@dataclass(frozen=True)
class Effect:
    """What it does to set weights to zero, over the parts of the text on which it has been measured, the first ones."""

    parts: tuple[Part, ...] = ()

    def over(self, n_parts: int) -> "Effect":
        """The same over the first so many parts, by which it compares with what was measured on no more."""
        return Effect(self.parts[:n_parts])

    @property
    def loss(self) -> float:
        """The increase of the mean cross-entropy, in nats per token."""
        total = self._total
        return (total.loss - total.source_loss) / total.positions

    @property
    def divergence(self) -> float:
        """The mean KL divergence from the model as it is, in nats per token."""
        return self._total.divergence / self._total.positions

    @property
    def error(self) -> float:
        """The standard error of the divergence, from its spread over the positions; infinite of a single one."""
        total, mean = self._total, self.divergence
        if total.positions == 1:
            return inf
        return sqrt(max(total.squares / total.positions - mean**2, 0) / (total.positions - 1))

    @property
    def _total(self) -> Part:
        return Part(*(sum(values) for values in zip(*self.parts, strict=True)))


Enough = Callable[[Effect], bool]
"""Whether an effect has been measured on enough of the text."""

Line = Mapping[str, Any]
"""What a removal does on a part of the text, as plain JSON data."""

# From states after the last layer, [n, width], to logits [n, vocabulary].
Head = Callable[[torch.Tensor], torch.Tensor]


class Removals:
    """Measures what it costs to set weights to zero, on no more of a text than it takes to tell, and each set once.

    It is measured on parts of 1, 1, 2, 4 ... samples; as of Baseline, the second half of each sample is scored.
    removals.jsonl: JSON lines {"removed", "part", fields of Part}. What was measured of a model of another identity, or
    on another corpus, is not taken. known: such lines of others, as `lines` has them.
    Raises ConvertError as Baseline does.
    """

    def __init__(
        self, streamable: StreamableModel, corpus: Corpus, control: PassControl, known: Iterable[Line] = ()
    ) -> None:
        check_scorable(corpus)
        make_directory(control.work_dir)
        self._model, self._corpus, self._control = streamable, corpus, control.within("removals")
        self._journal = control.work_dir / "removals.jsonl"
        self._measures = f"{streamable.identity} {hashlib.sha256(corpus.tokens.tobytes()).hexdigest()}"
        n_samples, last = len(corpus.tokens), 1
        ends = [0, last]
        while last < n_samples:
            ends.append(last := min(2 * last, n_samples))
        self._spans = [slice(start, stop) for start, stop in pairwise(ends)]
        self._sources: dict[int, LayerStream] = {}
        self._source_losses: dict[int, tuple[float, int]] = {}
        self._known: dict[tuple[str, int], Part] = {}
        for line in (*known, *read_lines(self._journal, partial(say, control.progress))):
            entry = dict(line)
            key = entry.pop("removed"), entry.pop("part")
            self._known[key] = Part(**entry)

    @property
    def lines(self) -> list[Line]:
        """Everything that has been measured, as lines of the journal."""
        return [_line(name, part, known) for (name, part), known in sorted(self._known.items())]

    def stream_effects(self, wanted: Sequence[tuple[Removal, Enough]], stage: str) -> list[Effect]:
        """The effects of these removals, each measured on parts of the text until that is enough, or on all of it.
        stage: of the progress. Runs the model where the journal has not all of it. Raises Interrupted when the control
        says so."""
        for part in range(len(self._spans)):
            missing = sorted({removal for removal, enough in wanted if self._needs(removal, enough, part)})
            for first in range(0, len(missing), _COPIES):
                self._measure(missing[first : first + _COPIES], part, stage)
        effects = [self._effect(removal, enough) for removal, enough in wanted]
        for effect in effects:
            self._source_losses |= {i: (part.source_loss, part.positions) for i, part in enumerate(effect.parts)}
        return effects

    @property
    def perplexity(self) -> float | None:
        """The model's own over what was read of the text; None before the first removal."""
        if not self._source_losses:
            return None
        losses, positions = zip(*self._source_losses.values(), strict=True)
        return float(np.exp(sum(losses) / sum(positions)))

    @property
    def samples(self) -> int:
        """How many of the text's samples were read."""
        return self._spans[max(self._source_losses)].stop if self._source_losses else 0

    def discard(self) -> None:
        """Delete what is large."""
        remove_tree(self._control.work_dir)

    def _name(self, removal: Removal) -> str:
        return hashlib.sha256(json.dumps([self._measures, removal.weights]).encode()).hexdigest()[:16]

    def _effect(self, removal: Removal, enough: Enough) -> Effect:
        """As far as it is known."""
        effect, name = Effect(), self._name(removal)
        while not (effect.parts and enough(effect)) and (name, len(effect.parts)) in self._known:
            effect = Effect((*effect.parts, self._known[name, len(effect.parts)]))
        return effect

    def _needs(self, removal: Removal, enough: Enough, part: int) -> bool:
        """Whether it takes this part of the text to tell, and it is not known yet."""
        effect = self._effect(removal, enough)
        return len(effect.parts) == part and not (effect.parts and enough(effect))

    def _source(self, part: int) -> LayerStream:
        """The model as it is, through which this part of the text has gone."""
        if part not in self._sources:
            control = self._control.within(f"source-{part}")
            stream = LayerStream(self._model, self._corpus.tokens[self._spans[part]], control, keep=True)
            stream.require_head()
            stream.run("super weights: run source")
            self._sources[part] = stream
        return self._sources[part]

    def _measure(self, removals: Sequence[Removal], part: int, stage: str) -> None:
        source, names = self._source(part), [self._name(removal) for removal in removals]
        copies = hashlib.sha256(" ".join(names).encode()).hexdigest()[:16]
        control = self._control.within(f"copies-{part}-{copies}")
        stream = RemovalStream(source, self._model, removals, control)
        stream.run(stage)
        for name, scores in zip(names, _scores(source, stream, len(removals)), strict=True):
            if not np.isfinite(scores).all():
                raise ConvertError(
                    "the model's predictions are not finite",
                    self._corpus.name,
                    "check the weights; on a GPU try --device cpu",
                )
            of_source, loss, divergence = scores
            sums = (float(values.sum()) for values in (of_source, loss, divergence, np.square(divergence)))
            known = Part(len(divergence), *sums)
            append_line(self._journal, _line(name, part, known))
            self._known[name, part] = known
        remove_tree(control.work_dir)


def _line(name: str, part: int, known: Part) -> dict[str, Any]:
    return {"removed": name, "part": part, **known._asdict()}


def _scores(source: LayerStream, stream: RemovalStream, n_copies: int) -> list[np.ndarray]:
    """For every copy float64 [3, n_positions]: the negative log-likelihood of the true next token by the source and by
    the copy, and the KL divergence. The source's logits are computed once for all copies."""
    parts: list[list[np.ndarray]] = [[] for _ in range(n_copies)]
    with source.head() as head, source.workers() as pool:
        for i in range(source.n_samples):
            samples = [stream.copy(k)[0] + i for k in range(n_copies)]
            following = source.token_tensor(i, i + 1)[0, source.sequence_length // 2 + 1 :]
            for span in source.logit_spans(len(following)):
                of_source = _logits(head, source, i, span)
                score = partial(_score_copy, head, stream, of_source, following[span], span)
                for of_copy, scores in zip(parts, pool.map(score, samples), strict=True):
                    of_copy.append(scores)
    return [np.concatenate(of_copy, axis=1) for of_copy in parts]


@torch.inference_mode()
def _logits(head: Head, stream: LayerStream, sample: int, span: slice) -> torch.Tensor:
    """float [n, vocabulary]. span: of the scored positions."""
    return head(stream.hidden_states(sample, sample + 1)[0, stream.sequence_length // 2 : -1][span])


@torch.inference_mode()
def _score_copy(
    head: Head, stream: LayerStream, of_source: torch.Tensor, following: torch.Tensor, span: slice, sample: int
) -> np.ndarray:
    return score_positions(of_source, _logits(head, stream, sample, span), following)[:3]
