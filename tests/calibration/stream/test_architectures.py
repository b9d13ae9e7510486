"""Every architecture is streamed as transformers computes it: logits, matrix products and gradients."""

from pathlib import Path

import pytest
import torch

from bitwright.formats.errors import ConvertError
from tests import tiny_models
from tests.calibration.stream.whole_models import (
    Streamed,
    load_text_model,
    relative_error,
    streamed,
    whole_gradients,
    whole_outputs,
)
from tests.tiny_architectures import TINY_ARCHITECTURES

# Architecture -> why it is refused.
REFUSED = {
    "deepseek_v4": "they keep 'layers' in their cache",
    "glm_moe_dsa": "takes more from a layer than hidden states",
    "hy_v4": "takes more from a layer than hidden states",
    "qwen4_exp_text": "they take samples one by one",
    "mt5": "an encoder with a decoder",
    "t5": "an encoder with a decoder",
}
# Other forms of what is here: of many layers, and one with another head, which is never converted.
_OTHER_FORMS = {"exaone4-sliding", "deepseek_v2-lite", "llama-reward"}
# Which gates a sparse layer keeps is a matter of the last bit.
LARGEST_ERROR = {"gemma3n_text": 1e-3}
STREAMED = sorted(TINY_ARCHITECTURES.keys() - REFUSED.keys() - _OTHER_FORMS)


@pytest.fixture(scope="module", params=STREAMED)
def built(request, tmp_path_factory) -> tuple[Path, Streamed, torch.nn.Module]:
    directory = tiny_models.checkpoint(request.param, TINY_ARCHITECTURES[request.param])
    return directory, streamed(directory, tmp_path_factory.mktemp("work")), load_text_model(directory)


def test_logits_are_those_of_transformers(built):
    directory, of_stream, whole = built
    reference = whole_outputs(whole, directory, of_stream.has_head)
    assert relative_error(of_stream.outputs(), reference) < 1e-5


def test_every_matrix_of_the_layers_is_seen(built):
    _, of_stream, _ = built
    assert not of_stream.unseen()


def test_gradients_are_those_of_autograd(built):
    directory, of_stream, whole = built
    if not of_stream.has_head:
        with pytest.raises(ConvertError, match="predicts no tokens"):
            of_stream.gradients()
        return
    observed, expected = of_stream.gradients(), whole_gradients(whole, directory)
    table = of_stream.stream.parameters.embedding
    if not any(name.endswith("lm_head.weight") for name in expected):
        observed[table] += observed.pop("lm_head.weight")
    for parameter, gradients in observed.items():
        reference = next(values for name, values in expected.items() if _same(name, parameter))
        assert _error(gradients, reference) < LARGEST_ERROR.get(directory.name, 1e-4), parameter


def _same(name: str, parameter: str) -> bool:
    """Whether a name in the whole model is the text model's parameter: it may have a prefix."""
    return name == parameter or name.endswith("." + parameter.removeprefix("model."))


def _error(gradients: torch.Tensor, reference: torch.Tensor) -> float:
    """Of gradients in the product's orientation; a parameter may be stored in the other one."""
    candidates = [values for values in (reference, reference.mT) if values.shape[-2:] == gradients.shape[-2:]]
    return min(relative_error(gradients, values.reshape(gradients.shape)) for values in candidates)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_streamed_is_refused_by_name(name, tmp_path):
    model = tiny_models.checkpoint(name, TINY_ARCHITECTURES[name])
    with pytest.raises(ConvertError, match=REFUSED[name]) as refused:
        streamed(model, tmp_path / "work")
    assert "--imatrix" in refused.value.remedy
