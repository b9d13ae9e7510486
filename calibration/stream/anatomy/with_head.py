"""A text model with its output head, where transformers has one only as a part of a larger model."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def with_head(build: Callable[[Any, torch.dtype, str], Any], config: Any, dtype: torch.dtype, attention: str) -> Any:
    """The body that `build` makes of these, on the meta device, and a linear head, as a model of transformers' own.

    Its parameters are called as those of other language models: `model.` and the body's names, and `lm_head.weight`.
    """
    from transformers.modeling_outputs import CausalLMOutputWithPast

    body = build(config, dtype, attention)
    base: Any = type(body).__mro__[1]  # the body's own PreTrainedModel, which knows what its modules accept

    class TextModelWithHead(base):  # type: ignore[misc]
        base_model_prefix = "model"

        def __init__(self) -> None:
            super().__init__(body.config)
            self.model = body
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype, device="meta")

        def get_input_embeddings(self) -> nn.Module:
            table: nn.Module = self.model.get_input_embeddings()
            return table

        def get_output_embeddings(self) -> nn.Module:
            return self.lm_head

        def forward(
            self, input_ids: torch.Tensor | None = None, logits_to_keep: int = 0, **options: Any
        ) -> CausalLMOutputWithPast:
            outputs = self.model(input_ids=input_ids, **options)
            logits = self.lm_head(outputs.last_hidden_state[:, -logits_to_keep:])
            return CausalLMOutputWithPast(logits=logits, past_key_values=outputs.past_key_values)

    return TextModelWithHead()
