"""A model type without a data file is refused with what others know of it, and with the ways that remain."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
from gguf import MODEL_ARCH_NAMES

from bitwright.converter.architectures import refusal
from bitwright.converter.architectures.architecture import architectures, find_architecture
from bitwright.converter.architectures.refusal import decoder_class, llama_cpp_name
from bitwright.formats.errors import ConvertError

TABLE: dict[str, dict[str, str]] = tomllib.loads(
    (Path(refusal.__file__).parent / "tables" / "refused.toml").read_text()
)


def refused(**config: Any) -> ConvertError:
    with pytest.raises(ConvertError) as caught:
        find_architecture(config, "config.json")
    return caught.value


@pytest.mark.parametrize("model_type", TABLE)
def test_every_row_of_the_table(model_type: str) -> None:
    assert not any(model_type in architecture.model_types for architecture in architectures())
    said = refused(model_type=model_type)
    assert f"the architecture {model_type!r} has no data file here: it needs " in said.what
    assert f"llama.cpp has it as {TABLE[model_type]['gguf']!r}" in said.what
    assert "BF16 GGUF" in said.remedy and "did you mean" not in str(said)
    assert ("--profile fp8, or w4a16" in said.remedy) == (decoder_class(model_type) is not None)
    by_name = TABLE[model_type]["gguf"] in MODEL_ARCH_NAMES.values()
    assert by_name != ("the gguf package does not have" in said.what or model_type == "deepseek_v4")


def test_names_that_gguf_has_are_found_without_a_table() -> None:
    assert llama_cpp_name("exaone_moe") == "exaone-moe"
    assert llama_cpp_name("gemma3n_text") == "gemma3n"
    assert llama_cpp_name("lamma") is None


def test_nobody_knows_it() -> None:
    said = refused(model_type="lamma")
    assert "nor is it known that llama.cpp has it; transformers does not have it" in said.what
    assert said.remedy == "docs/add-an-architecture.md tells how to add one"


def test_known_to_transformers_as_something_else_than_a_decoder() -> None:
    said = refused(model_type="vit")
    assert "transformers has it, and not as a decoder" in said.what and "--profile" not in said.remedy


def test_code_of_a_repository_is_not_run_and_llama_cpp_may_know_the_model() -> None:
    said = refused(model_type="plamo3", auto_map={"AutoModel": "modeling.Plamo"})
    assert "remote code is never run; llama.cpp has it as 'plamo3'" in said.what
    assert said.where == "config.json: auto_map" and "BF16 GGUF" in said.remedy
    own = refused(model_type="vit", auto_map={"AutoModel": "modeling.Vit"})
    assert "remote code" not in own.what, "transformers has the model itself"


def test_a_configuration_without_a_model_type() -> None:
    assert refused().what == "the configuration names no architecture (model_type)"
