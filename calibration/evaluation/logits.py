"""The logits of a text by weights that are streamed a layer at a time."""

from typing import TYPE_CHECKING

import numpy as np

from bitwright.calibration.control import PassControl
from bitwright.formats.files.disk import remove_tree

if TYPE_CHECKING:
    from bitwright.calibration.stream.streamable import StreamableModel


def stream_last_logits(
    streamable: "StreamableModel", tokens: np.ndarray, n_last: int, control: PassControl
) -> np.ndarray:
    """float32 [n_last, vocabulary]: what the model predicts after each of the last n_last of the tokens.

    tokens: int [n_tokens]. The work directory is deleted at the end. Raises Interrupted.
    """
    import torch

    from bitwright.calibration.stream.forward import LayerStream

    stream = LayerStream(streamable, tokens[None], control)
    stream.run("run the artifact")
    states = stream.hidden_states(0, 1)[0, -n_last:]
    with stream.head() as head, torch.inference_mode():
        logits = np.concatenate([head(states[span]).float().cpu().numpy() for span in stream.logit_spans(n_last)])
    remove_tree(control.work_dir)
    return logits
