"""The logits of a text by weights that are streamed a layer at a time."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from calibration.control import Progress, ShouldStop, never, silent
from formats.files import remove_tree

if TYPE_CHECKING:
    from calibration.arithmetic import Arithmetic
    from calibration.weights import WeightSource


def last_logits(
    source: "WeightSource",
    config_dir: Path,
    tokens: np.ndarray,
    n_last: int,
    *,
    work_dir: Path,
    identity: str = "",
    device: str = "auto",
    threads: int | None = None,
    arithmetic: "Arithmetic | None" = None,
    progress: Progress = silent,
    should_stop: ShouldStop = never,
) -> np.ndarray:
    """float32 [n_last, vocabulary]: what these weights predict after each of the last n_last of the tokens.

    tokens: int [n_tokens]. arithmetic: how products with matrices are computed. work_dir: checkpoints; a second call
    continues there, and it is deleted at the end. Raises Interrupted.
    """
    import torch

    from calibration.stream import LayerStream

    stream = LayerStream(
        source,
        config_dir,
        tokens[None],
        work_dir,
        identity=identity,
        device=device,
        threads=threads,
        arithmetic=arithmetic,
    )
    stream.run(progress, should_stop, stage="run the artifact")
    states = stream.hidden_states(0, 1)[0, -n_last:]
    with stream.head() as head, torch.inference_mode():
        logits = np.concatenate([head(states[span]).float().cpu().numpy() for span in stream.logit_spans(n_last)])
    remove_tree(work_dir)
    return logits
