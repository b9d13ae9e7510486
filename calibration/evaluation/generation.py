"""Greedy continuations by the model itself, and how it reads what another model has continued.

Reading costs one pass through the layers, whatever the model's size: shown a prompt and its continuation by another
model, the most probable token at each place tells where this model would first have gone another way. Generating keeps
the weights resident where they fit into half of the free memory. Where they do not, the layer stream guesses all tokens
at once and passes over them again until nothing changes: each pass settles one more token at least. When SETTLED_TOKENS
of every text are settled, that is enough.
"""

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any

import numpy as np

from bitwright.calibration.control import Interrupted, PassControl, ShouldStop
from bitwright.formats.files.disk import remove_tree
from bitwright.formats.files.seals import is_sound, write_sealed

if TYPE_CHECKING:
    import torch
    from transformers import DynamicCache

    from bitwright.calibration.stream.model import LayerwiseModel
    from bitwright.calibration.stream.streamable import StreamableModel

Text = tuple[Sequence[int], Sequence[int]]
"""A prompt and its continuation, both of tokens."""

SETTLED_TOKENS = 16
"""Of a longer text by a model that is streamed: so many at least, in a pass each and one that measures them."""
# Prompts that one core, or a GPU, takes through the resident model together.
_BATCH = {"cpu": 4, "cuda": 64, "mps": 16}


@dataclass(frozen=True)
class Generation:
    """What a model continued a prompt with, each token the most probable one.

    tokens: the continuation, with the token that ended it if it `ended`. entropies: of the distribution that each
    token was taken from, in nats. surprises: minus the log-probability of each token in it, in nats.
    finite: False where logits were not; the tokens before that are kept.
    """

    tokens: tuple[int, ...]
    entropies: tuple[float, ...]
    surprises: tuple[float, ...]
    ended: bool
    finite: bool = True

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Generation":
        return cls(
            tokens=tuple(data["tokens"]),
            entropies=tuple(data["entropies"]),
            surprises=tuple(data["surprises"]),
            ended=data["ended"],
            finite=data["finite"],
        )


class GreedyRecord:
    """Collects one Generation, step by step."""

    def __init__(self, n_tokens: int, end_tokens: frozenset[int]):
        self.n_tokens, self._end_tokens = n_tokens, end_tokens
        self._tokens: list[int] = []
        self._entropies: list[float] = []
        self._surprises: list[float] = []
        self._ended, self._finite = False, True

    def take(self, logits: np.ndarray) -> bool:
        """logits: float32 [vocabulary] of the next token. Returns whether there is more to come."""
        self._finite = bool(np.isfinite(logits).all())
        if not self._finite:
            return False
        token = int(logits.argmax())
        log_p = logits.astype(np.float64) - logits[token]
        log_p -= np.log(np.exp(log_p).sum())
        self._tokens.append(token)
        self._entropies.append(float(-(np.exp(log_p) * log_p).sum()))
        self._surprises.append(float(-log_p[token]))
        self._ended = token in self._end_tokens
        return not self._ended and len(self._tokens) < self.n_tokens

    def generation(self) -> Generation:
        tokens, entropies, surprises = tuple(self._tokens), tuple(self._entropies), tuple(self._surprises)
        return Generation(tokens, entropies, surprises, self._ended, self._finite)


@dataclass(frozen=True)
class Reading:
    """How a model reads another's continuation. agreed: the tokens before the first at which its own greedy choice is
    another; all of them when there is none. surprises: minus the log-probability of each token, in nats."""

    agreed: int
    surprises: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _stream_over(
    streamable: "StreamableModel", texts: Sequence[Text], control: PassControl, stage: str
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each text the logits that every token of the continuation was chosen by, reduced: (float64 [3, n]: greedy
    choice, entropy, surprise of the token that stands there; bool [n]: finite)."""
    import torch

    from bitwright.calibration.stream.forward import LayerStream

    tokens = np.zeros((len(texts), max(len(p) + len(c) for p, c in texts)), np.int32)
    for row, (prompt, continuation) in zip(tokens, texts, strict=True):
        row[: len(prompt) + len(continuation)] = [*prompt, *continuation]
    stream = LayerStream(streamable, tokens, control)
    stream.require_head()
    stream.run(stage)
    with stream.head() as head, torch.inference_mode():
        return [
            _reduced(head(stream.hidden_states(i, i + 1)[0, len(p) - 1 : len(p) + len(c) - 1]), c)
            for i, (p, c) in enumerate(texts)
        ]


def _reduced(logits: "torch.Tensor", following: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    import torch

    log_p = logits.float().log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    surprise = -log_p.gather(-1, torch.tensor(list(following), device=log_p.device)[:, None])[:, 0]
    finite = logits.isfinite().all(-1)
    return torch.stack([log_p.argmax(-1).float(), entropy, surprise]).cpu().double().numpy(), finite.cpu().numpy()


def stream_readings(streamable: "StreamableModel", texts: Sequence[Text], control: PassControl) -> list[Reading]:
    """How the model reads each text, whose prompt is not empty. The caller deletes the work directory. Raises
    Interrupted."""
    readings = [Reading(0, ())] * len(texts)
    read = [i for i, (_, continuation) in enumerate(texts) if len(continuation)]
    passed = _stream_over(streamable, [texts[i] for i in read], control, "read") if read else []
    for i, ((choices, _, surprises), _) in zip(read, passed, strict=True):
        continuation = texts[i][1]
        disagreeing = np.flatnonzero(choices != np.asarray(continuation))
        readings[i] = Reading(int(disagreeing[0]) if len(disagreeing) else len(continuation), tuple(surprises.tolist()))
    return readings


def generate_greedily(
    streamable: "StreamableModel",
    prompts: Sequence[Sequence[int]],
    n_tokens: int,
    end_tokens: frozenset[int],
    control: PassControl,
    *,
    resident: bool | None = None,
) -> list[Generation]:
    """Continue each prompt (tokens, not empty) by up to n_tokens, ending with one of end_tokens where it comes, or,
    where the model is streamed, with what is settled when SETTLED_TOKENS of all texts are.

    resident: whether to hold all weights in memory; None decides by the free memory. Results are the same for any
    number of threads. The caller deletes the work directory. Raises Interrupted.
    """
    from bitwright.calibration.stream.model import LayerwiseModel

    model = LayerwiseModel(streamable)
    if resident is None:
        needed = sum(p.numel() for p in model.model.parameters()) * model.dtype.itemsize
        resident = needed <= _free_memory(model.device) // 2
    if resident:
        return _generate_resident(model, prompts, n_tokens, end_tokens, control)
    return _generate_streamed(streamable, prompts, n_tokens, end_tokens, control)


def _free_memory(device: "torch.device") -> int:
    import psutil

    from bitwright.calibration.stream.device.memory import free_bytes

    of_gpu = free_bytes(device)
    return psutil.virtual_memory().available if of_gpu is None else of_gpu


def _generate_resident(
    model: "LayerwiseModel",
    prompts: Sequence[Sequence[int]],
    n_tokens: int,
    end_tokens: frozenset[int],
    control: PassControl,
) -> list[Generation]:
    modules = [*model.layers, model.require_head()]
    size = _BATCH[model.device.type]
    batches = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    generations: list[Generation] = []
    with ExitStack() as stack:
        weights = stack.enter_context(model.resident_surroundings(tables=True))
        for module in modules:
            weights |= stack.enter_context(model.resident(module))
        pool = stack.enter_context(model.workers())

        def continued(batch: Sequence[Sequence[int]]) -> list[Generation]:
            with model.computing(weights):
                return _continue(model, batch, n_tokens, end_tokens, control.should_stop)

        for of_batch in pool.map(continued, batches):
            generations += of_batch
            control.progress("generate", len(generations), len(prompts), "prompts")
    return generations


def _continue(
    model: "LayerwiseModel",
    prompts: Sequence[Sequence[int]],
    n_tokens: int,
    end_tokens: frozenset[int],
    should_stop: ShouldStop,
) -> list[Generation]:
    """Prompts of any lengths side by side without padding: as long as one has tokens left, those are fed to it."""
    import torch

    from bitwright.calibration.stream.anatomy.body import CACHES
    from bitwright.calibration.stream.key_values import HandledCache

    records = [GreedyRecord(n_tokens, end_tokens) for _ in prompts]
    more = [True] * len(prompts)
    n_fed = min(map(len, prompts))
    pending = [list(prompt[:n_fed]) for prompt in prompts]
    # State spaces call it otherwise.
    cached = next((name for name in CACHES if name in signature(model.model.forward).parameters), CACHES[0])
    cache: DynamicCache | None = None
    if model.arithmetic is not None:
        cache = HandledCache(model.arithmetic.cached, model.config)
    with torch.inference_mode():
        while any(more):
            if should_stop():
                raise Interrupted("stopped while generating")
            tokens = torch.tensor(pending, device=model.device)
            output = model.model(input_ids=tokens, use_cache=True, logits_to_keep=1, **{cached: cache})
            cache, logits = output[cached], output.logits[:, -1].float().cpu().numpy()
            pending = []
            for i, prompt in enumerate(prompts):
                if n_fed >= len(prompt) and more[i]:
                    more[i] = records[i].take(logits[i])
                pending.append([prompt[n_fed] if n_fed < len(prompt) else int(logits[i].argmax())])
            n_fed += 1
    return [record.generation() for record in records]


def _generate_streamed(
    streamable: "StreamableModel",
    prompts: Sequence[Sequence[int]],
    n_tokens: int,
    end_tokens: frozenset[int],
    control: PassControl,
) -> list[Generation]:
    # Replaced whole after every pass, each of which has a directory of its own.
    state = control.work_dir / "guesses.json"
    guesses = [[[0] * n_tokens for _ in prompts]] if not is_sound(state) else json.loads(state.read_bytes())
    while True:
        of_pass = control.within(f"pass-{len(guesses)}")
        passed = _stream_over(streamable, list(zip(prompts, guesses[-1], strict=True)), of_pass, "generate")
        chosen = [_up_to_end(choices.astype(int).tolist(), end_tokens) for (choices, _, _), _ in passed]
        if chosen == guesses[-1] or len(guesses) > SETTLED_TOKENS:
            return [
                _as_generation(reduced, finite, _settled(of, guess), end_tokens)
                for (reduced, finite), of, guess in zip(passed, chosen, guesses[-1], strict=True)
            ]
        guesses.append(chosen)
        write_sealed(state, "guesses", json.dumps(guesses).encode())
        remove_tree(of_pass.work_dir)


def _up_to_end(tokens: list[int], end_tokens: frozenset[int]) -> list[int]:
    """The tokens with zeros after the first that ends the text: what would follow has not to be settled."""
    length = _length(tokens, end_tokens)
    return tokens[:length] + [0] * (len(tokens) - length)


def _length(tokens: list[int], end_tokens: frozenset[int]) -> int:
    return next((i + 1 for i, token in enumerate(tokens) if token in end_tokens), len(tokens))


def _settled(chosen: list[int], guessed: list[int]) -> int:
    """How many tokens were guessed rightly, so that the pass has measured them."""
    return next((i for i, (a, b) in enumerate(zip(chosen, guessed, strict=True)) if a != b), len(chosen))


def _as_generation(reduced: np.ndarray, finite: np.ndarray, settled: int, end_tokens: frozenset[int]) -> Generation:
    """What a pass has shown of one text, as far as it is settled."""
    tokens, entropies, surprises = (of[:settled].tolist() for of in (reduced[0].astype(int), *reduced[1:]))
    length = _length(tokens, end_tokens)
    broken = np.flatnonzero(~finite[:length])
    kept = int(broken[0]) if len(broken) else length
    ended = not len(broken) and tokens[length - 1] in end_tokens
    return Generation(tuple(tokens[:kept]), tuple(entropies[:kept]), tuple(surprises[:kept]), ended, not len(broken))
