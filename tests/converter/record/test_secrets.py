"""What is written down holds no secret."""

import pytest

from bitwright.converter.record.secrets import redacted

SECRET = "s3cretS3cret"


@pytest.mark.parametrize(
    "text",
    [
        f"token hf_{SECRET} was refused",
        f"Authorization: Bearer {SECRET}",
        f"GET https://user:{SECRET}@hub.example/org/model",
        f"https://cdn.example/file?X-Amz-Signature={SECRET}&x=1",
        f"https://cdn.example/file?Policy={SECRET}",
        f"HF_TOKEN={SECRET} bitwright org/model",
        f"password={SECRET}",
    ],
)
def test_secrets_are_taken_out(text):
    assert SECRET not in redacted(text) and "***" in redacted(text)


def test_the_users_own_token_is_taken_out_wherever_it_is(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    assert redacted(f"a header with {SECRET} in it") == "a header with *** in it"


@pytest.mark.parametrize(
    "text",
    [
        "bitwright --profile Q4_K_M --set 'mlp_down=Q6_K' --output out/m.gguf org/model@main",
        "the tokenizer has no chat template: tokenizer_config.json",
        "https://huggingface.co/org/model?not-for-all-audiences=true",
        "8 of 8 tokens; key alike, bits=4.5",
    ],
)
def test_nothing_else_is(text):
    assert redacted(text) == text
