"""What a step reads and computes, against Llama-3.1-8B by hand."""

import pytest

from bitwright.profiles.advice.cache import AttentionLayer, Cache, cache_format
from bitwright.profiles.advice.operators import (
    GROUPS,
    Experts,
    OperatorType,
    Row,
    operator_formats,
    prompt_operations,
    step_operators,
)
from bitwright.profiles.vocabulary import Role

LAYERS, HIDDEN, MLP, VOCAB, KV = 32, 4096, 14336, 128256, 1024
F16 = cache_format("F16")
CACHE = Cache((AttentionLayer(32, 8, 128, 128),) * LAYERS)
IN_LAYERS = LAYERS * (2 * HIDDEN * HIDDEN + 2 * KV * HIDDEN + 3 * MLP * HIDDEN)


def rows(bits: float = 16, tied: bool = False) -> list[Row]:
    sizes = {
        Role.ATTENTION_QUERY: HIDDEN * HIDDEN,
        Role.ATTENTION_KEY: KV * HIDDEN,
        Role.ATTENTION_VALUE: KV * HIDDEN,
        Role.ATTENTION_OUTPUT: HIDDEN * HIDDEN,
        Role.MLP_GATE: MLP * HIDDEN,
        Role.MLP_UP: MLP * HIDDEN,
        Role.MLP_DOWN: MLP * HIDDEN,
    }
    found = [Row(role, LAYERS * n, round(LAYERS * n * bits / 8), LAYERS * HIDDEN) for role, n in sizes.items()]
    outside = [Role.EMBEDDING] if tied else [Role.EMBEDDING, Role.OUTPUT]
    return found + [Row(role, VOCAB * HIDDEN, 2 * VOCAB * HIDDEN, VOCAB) for role in outside]


def total(operators, field="n_bytes"):
    return sum(getattr(operator, field) for operator in operators)


def test_a_step_at_4096_tokens_reads_fifteen_and_a_half_gigabytes():
    """6.98e9 weights in layers and 0.525e9 in the head, in 16 bits, and 131072 bytes of keys and values a token."""
    operators = step_operators(rows(), CACHE, Experts(), F16, 4096, 1)
    expected = 2 * (IN_LAYERS + VOCAB * HIDDEN) + 4096 * 131072 + 2 * HIDDEN
    assert total(operators) == expected == pytest.approx(15.55e9, rel=0.002)
    assert total(operators, "operations") == pytest.approx(2 * (IN_LAYERS + VOCAB * HIDDEN), rel=0.2)


def test_an_embedding_is_looked_up_unless_it_is_the_head():
    by_type = {o.type: o for o in step_operators(rows(), CACHE, Experts(), F16, 100, 3)}
    assert by_type[OperatorType.EMBEDDINGS].n_bytes == 3 * 2 * HIDDEN
    tied = {o.type: o for o in step_operators(rows(tied=True), CACHE, Experts(), F16, 100, 3)}
    assert OperatorType.EMBEDDINGS not in tied
    assert tied[OperatorType.LM_HEAD].n_bytes == by_type[OperatorType.LM_HEAD].n_bytes == 2 * VOCAB * HIDDEN


def test_products_of_one_text_have_an_operation_a_byte():
    for operator in step_operators(rows(), CACHE, Experts(), F16, 100, 1):
        if operator.type in (OperatorType.Q_PROJ, OperatorType.FFN_UP, OperatorType.LM_HEAD):
            assert operator.intensity == 1
    four_bits = step_operators(rows(4.5), CACHE, Experts(), F16, 100, 1)
    assert next(o for o in four_bits if o.type is OperatorType.FFN_UP).intensity == pytest.approx(16 / 4.5)


def test_a_batch_reads_weights_once_and_caches_each():
    one, eight = (step_operators(rows(), CACHE, Experts(), F16, 1000, batch) for batch in (1, 8))
    sizes = [{o.type: o.n_bytes for o in operators} for operators in (one, eight)]
    assert sizes[0][OperatorType.FFN_UP] == sizes[1][OperatorType.FFN_UP]
    assert 8 * sizes[0][OperatorType.KV_CACHE] == sizes[1][OperatorType.KV_CACHE]
    assert total(eight, "operations") == pytest.approx(8 * total(one, "operations"))


def test_experts_are_read_as_far_as_tokens_reach_them():
    experts = Experts(128, 8)
    assert experts.touched(1) == experts.share == 8 / 128
    assert experts.touched(1) < experts.touched(4) < 1 and experts.touched(4) < 4 * experts.touched(1)
    row = [Row(Role.EXPERT_UP, 1000, 500, 10), Row(Role.EMBEDDING, 10, 20, 10)]
    (read,) = [o for o in step_operators(row, Cache(()), experts, F16, 1, 1) if o.type is OperatorType.EXPERTS]
    assert (read.n_bytes, read.least_bytes, read.operations) == (500 / 16, 500 / 16, 2 * 1000 / 16)
    (read,) = [o for o in step_operators(row, Cache(()), experts, F16, 1, 8) if o.type is OperatorType.EXPERTS]
    assert read.n_bytes == 500 * experts.touched(8) and read.least_bytes == 500 / 16, "the texts may share them all"


def test_what_is_no_part_of_the_text_model_is_not_read():
    image = [Row(Role.OTHER, 1000, 2000, 10, kept_out=True)]
    assert total(step_operators(rows() + image, CACHE, Experts(), F16, 1, 1)) == total(
        step_operators(rows(), CACHE, Experts(), F16, 1, 1)
    )


def test_every_role_has_an_operator_and_every_operator_a_group():
    formats = operator_formats((role, "Q4_K") for role in Role)
    assert len(OperatorType) == 18, "the specification's seventeen, and state spaces"
    grouped = [kind for kinds in GROUPS.values() for kind in kinds]
    assert sorted(grouped) == sorted(OperatorType) and len(set(grouped)) == len(grouped)
    assert set(formats) <= set(OperatorType)


def test_layers_that_only_draft_cost_no_step():
    drafting = [*rows(), Row(Role.MTP, 1000, 500, 10)]
    assert prompt_operations(drafting, CACHE, Experts(), 64) == prompt_operations(rows(), CACHE, Experts(), 64)
    steps = [step_operators(tensors, CACHE, Experts(), F16, 64, 1) for tensors in (drafting, rows())]
    assert steps[0] == steps[1]


def test_a_prompt_attends_to_half_of_its_pairs():
    tokens = 4096
    weights = 2 * IN_LAYERS * tokens
    attention = LAYERS * 2 * 2 * 32 * 128 * tokens * tokens / 2
    assert prompt_operations(rows(), CACHE, Experts(), tokens) == pytest.approx(weights + attention)
    windowed = Cache((AttentionLayer(32, 8, 128, 128, window=64),) * LAYERS)
    assert prompt_operations(rows(), windowed, Experts(), tokens) < weights + attention / 16
