"""A budget is met from below, by the best choice, with its constraints kept and its failures explained."""

from dataclasses import replace
from unittest.mock import ANY

import numpy as np
import pytest

from bitwright.formats.errors import ConvertError
from bitwright.formats.files.gguf import TensorEntry, lay_out, padded
from bitwright.formats.registry import get_format
from bitwright.profiles.evidence import Evidence
from bitwright.profiles.planning.assign import assign
from bitwright.profiles.planning.plan import Plan
from bitwright.profiles.reading.rules import parse_override
from bitwright.profiles.reading.schema import load_profile, parse_profile, preset_names
from bitwright.profiles.vocabulary import Role, TensorSpec
from tests.profiles.models import KINDS, evidence, matrices, model_map
from tests.profiles.planning.test_knapsack import least_cost

HEAD = 'description = "d"\ngood_for = "g"\n'
ALL = 'formats = ["*"]\n'
FIXED = [name for name in preset_names() if load_profile(name).base and load_profile(name).target == "gguf"]


def file_bytes(plan: Plan, shard_bytes: int | None = None) -> int:
    """The size of a GGUF with some metadata."""
    from gguf.constants import GGUFValueType
    from gguf.gguf_writer import GGUFValue

    entries = [
        TensorEntry(p.tensor.name, p.tensor.shape, get_format(p.format).ggml_type, p.n_bytes) for p in plan.tensors
    ]
    metadata = {"general.architecture": GGUFValue("llama", GGUFValueType.STRING)}
    return sum(layout.n_bytes for layout in lay_out("m.gguf", metadata, entries, shard_bytes))


def profile(budget: str, rules: str = ""):
    return parse_profile(f"{HEAD}{rules}\n[budget]\n{budget}", "mine", "mine.toml")


def within(budget: str, of=None, rules: str = "", overrides=(), measured: Evidence | None = None, count=file_bytes):
    of = of or model_map()
    everything = {t.name for t in of.tensors}
    measured = measured or evidence(of)
    return assign(profile(budget, rules), of, overrides, "best", measured, everything, count)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1_500_000, 2_345_678, 5_000_000])
def test_a_size_is_met_from_below_and_the_choice_is_the_best(kind, size):
    of, of_float = model_map(kind), assign(load_profile("fp16-baseline"), model_map(kind))
    size = size * file_bytes(of_float) // 12_000_000
    measured = evidence(of)
    budget = f'size = "{size}"\nformats = ["IQ*", "Q*", "MXFP4", "F16"]'
    plan = within(budget, of, measured=measured)
    assert 0.99 * size < file_bytes(plan) <= size
    assert plan.spent is not None and plan.spent.exact
    # By dynamic programming over units of 32 bytes, to which every tensor is padded.
    costs = [measured.losses[t.name] | {"F16": 0.0} for t in matrices(of)]
    formats = profile(budget).budget.formats
    floors = [2 if t.role.startswith("shared_expert_") else 0 for t in matrices(of)]  # of the role, in any budget
    names = [
        [f for f in formats if get_format(f).fits(t.n_columns) and get_format(f).bits_per_weight >= floor]
        for t, floor in zip(matrices(of), floors, strict=True)
    ]
    weights = [units(t, of_tensor) for t, of_tensor in zip(matrices(of), names, strict=True)]
    rest = file_bytes(plan) - 32 * sum(int(units(t, [f])[0]) for t, f in chosen(plan))
    least = least_cost(
        weights, [np.array([c[f] for f in n]) for c, n in zip(costs, names, strict=True)], (size - rest) // 32
    )
    assert plan.predicted_kld == pytest.approx(least, rel=1e-9)


def units(tensor: TensorSpec, formats: list[str]) -> np.ndarray:
    return np.array([padded(tensor.n_rows * get_format(f).row_bytes(tensor.n_columns)) // 32 for f in formats], float)


def chosen(plan: Plan) -> list[tuple[TensorSpec, str]]:
    return [(row.tensor, row.format) for row in plan.tensors if len(row.tensor.shape) > 1 and row.format != "F32"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("preset", FIXED)
def test_it_never_loses_to_a_fixed_mix_of_the_same_size(kind, preset):
    of = model_map(kind)
    measured = evidence(of, seed=3)
    fixed = assign(load_profile(preset).by_rules(), of, evidence=measured)
    plan = within(f'{ALL}size = "{file_bytes(fixed)}"', of, measured=measured)
    assert file_bytes(plan) <= file_bytes(fixed)
    assert plan.predicted_kld <= fixed.predicted_kld * (1 + 1e-12)


@pytest.mark.parametrize("bits", [2.0, 3.3, 4.5, 8.0])
def test_bits_per_weight_count_the_tensors_data(bits):
    plan = within(f"bpw = {bits}")
    assert 0.99 * bits < plan.bits_per_weight <= bits


@pytest.mark.parametrize("kld", [0.001, 0.01, 0.1])
def test_a_divergence_is_met_by_the_smallest_file(kld):
    plan = within(f"kld = {kld}")
    assert 0.9 * kld < plan.predicted_kld <= kld
    smaller = within(f'size = "{file_bytes(plan) - 32}"')
    assert smaller.predicted_kld > kld


def test_second_level_scales_are_counted():
    """Sizes between two steps of a budget of NVFP4 and Q8_0 only are met to less than the smallest step."""
    for size in range(3_000_000, 3_200_000, 33_333):
        plan = within(f'formats = ["NVFP4", "MXFP4", "Q8_0"]\nsize = "{size}"')
        assert any(row.format == "NVFP4" for row in plan.tensors)
        assert any(row.tensor.role is Role.SCALE for row in plan.tensors)
        assert 0.98 * size < file_bytes(plan) <= size


def test_second_level_scales_that_no_runtime_applies_are_not_planned():
    tensors = tuple(replace(tensor, scale_applied=tensor.role is Role.MLP_UP) for tensor in model_map().tensors)
    of = replace(model_map(), tensors=tensors)
    plan = within('formats = ["NVFP4"]\nsize = "9M"', of)
    named = {row.tensor.name for row in plan.tensors if row.tensor.role is Role.SCALE}
    assert named == {f"blk.{layer}.ffn_up.scale" for layer in range(of.n_layers)}
    assert within(f'formats = ["NVFP4"]\nsize = "{file_bytes(plan)}"', of) == replace(plan, spent=ANY)


def test_a_size_of_split_files_is_met():
    def split(plan: Plan) -> int:
        return file_bytes(plan, 200_000)

    plan = within('size = "2M"', count=split)
    assert 1_980_000 < split(plan) <= 2_000_000


def test_rules_and_overrides_stay():
    rule = '[[rule]]\nroles = ["attention_value"]\nformat = "Q8_0"'
    plan = within('size = "2M"', rules=rule, overrides=[parse_override("blk.3.ffn_up.weight=Q6_K")])
    rows = {row.tensor.name: row for row in plan.tensors}
    assert {row.format for row in plan.tensors if row.tensor.role is Role.ATTENTION_VALUE} == {"Q8_0"}
    assert rows["blk.3.ffn_up.weight"].format == "Q6_K"
    assert rows["blk.3.ffn_up.weight"].reason == "--set 'blk.3.ffn_up.weight=Q6_K'"
    assert rows["blk.3.attn_v.weight"].reason == "mine.toml, rule 1"
    assert file_bytes(plan) <= 2_000_000


def test_floors_by_role_hold_for_what_a_tied_embedding_stands_for():
    budget = 'size = "1800K"\nfloors = { "attention_*" = "Q4_K", output = "Q6_K" }'
    tied = within(budget, model_map(tied=True))
    for row in tied.tensors:
        bits = get_format(row.format).bits_per_weight
        assert not row.tensor.role.startswith("attention_") or bits >= 4.5
        assert row.tensor.role is not Role.EMBEDDING or bits >= 6.5
    untied = within(budget)
    assert any(get_format(row.format).bits_per_weight < 4 for row in untied.tensors)


def test_what_rules_decide_binds_what_is_to_be_like_it():
    rule = '[[rule]]\nroles = ["mlp_up"]\nlayers = ["first:2"]\nformat = "Q5_K"\n'
    plan = within('bpw = 4\nalike = [["mlp_gate", "mlp_up"]]', rules=rule)
    formats = {row.tensor.name: row.format for row in plan.tensors}
    for layer in range(8):
        assert formats[f"blk.{layer}.ffn_gate.weight"] == formats[f"blk.{layer}.ffn_up.weight"]
    assert formats["blk.1.ffn_gate.weight"] == "Q5_K"
    both = rule + rule.replace("mlp_up", "mlp_down").replace("Q5_K", "Q4_K")
    with pytest.raises(
        ConvertError, match=r"should share a format cannot: rules give Q5_K to blk\.0\.ffn_up\.weight, Q4_K"
    ):
        within('bpw = 4\nalike = [["mlp_gate", "mlp_up", "mlp_down"]]', rules=both)


def test_any_profile_with_a_target_has_the_floors_of_the_preset():
    def least_in_attention(plan: Plan) -> float:
        rows = [row for row in plan.tensors if row.tensor.role.startswith("attention_")]
        return min(get_format(row.format).bits_per_weight for row in rows)

    of = model_map()
    profile = load_profile("uniform-8bit").aiming_at(None, 2.4, None, "test")
    plan = assign(profile, of, evidence=evidence(of), with_importance={t.name for t in of.tensors})
    assert least_in_attention(plan) > 2 > least_in_attention(within("bpw = 2.4"))


def test_groups_that_are_to_be_alike_are():
    groups = '[["attention_query", "attention_key", "attention_value"], ["mlp_gate", "mlp_up"]]'
    plan = within(f'size = "2M"\nalike = {groups}')
    free = within('size = "2M"')
    by_layer: dict[tuple, set[str]] = {}
    for row in plan.tensors:
        name = row.tensor.name.split(".")[-2]
        if row.format != "F32" and name in ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up"):
            by_layer.setdefault((row.tensor.layer, name[:3]), set()).add(row.format)
            assert "alike" in row.reason
    assert all(len(formats) == 1 for formats in by_layer.values())
    assert free.predicted_kld < plan.predicted_kld
    assert 1_980_000 < file_bytes(plan) <= 2_000_000


def test_only_formats_that_fit_the_rows():
    of = model_map(width=288)
    plan = within('size = "4M"', of)
    assert all(get_format(row.format).fits(row.tensor.n_columns) for row in plan.tensors)
    with pytest.raises(ConvertError, match="no format of the budget suits rows of 288"):
        within('size = "4M"\nformats = ["Q*_K"]', of)


def test_formats_that_need_importance_only_where_there_is_one():
    of = model_map()
    plan = assign(profile('size = "1700K"'), of, (), "best", evidence(of), {"blk.0.ffn_up.weight"}, file_bytes)
    starved = [r for r in plan.tensors if get_format(r.format).needs_importance and r.tensor.layer is not None]
    assert {row.tensor.name for row in starved} <= {"blk.0.ffn_up.weight"}
    everywhere = within('size = "1700K"')
    assert sum(get_format(row.format).needs_importance for row in everywhere.tensors) > 5


def test_experts_count_all_their_bytes():
    of = model_map("experts")
    plan = within('size = "4M"', of)
    experts = [row for row in plan.tensors if row.tensor.role.startswith("expert_")]
    assert all(r.n_bytes == 4 * 256 * get_format(r.format).row_bytes(256) for r in experts)


def test_a_row_says_what_the_next_step_would_buy():
    plan = within('size = "2M"')
    measured = evidence(model_map())
    for row in plan.tensors:
        if row.format == "F32":
            assert row.predicted_loss is None
            continue
        assert row.predicted_loss == measured.losses[row.tensor.name].get(row.format, 0.0)
        assert row.reason.startswith(f"budget: {row.format} {row.predicted_loss:.2g} nats")
        assert "would save" in row.reason or "no format of the budget costs less" in row.reason


@pytest.mark.parametrize(
    ("budget", "what"),
    [
        ('size = "500K"', "the smallest plan takes"),
        ("bpw = 1.1", "the smallest plan takes"),
        ("kld = 1e-9\nformats = ['Q*_K']", "the least predicted KL divergence is"),
        ('size = "2M"\nkld = 1e-4', "reach a predicted KL divergence of"),
    ],
)
def test_what_cannot_be_met_shows_the_frontier(budget, what):
    with pytest.raises(ConvertError) as raised:
        within(budget)
    assert what in raised.value.what
    assert raised.value.where == "mine.toml, key budget"
    assert raised.value.remedy.startswith("nearest: ")
    lines = raised.value.remedy.splitlines()[1:]
    divergences = [float(line.rpartition(" ")[2]) for line in lines]
    assert len(lines) >= 3 and divergences == sorted(divergences, reverse=True)


def test_the_two_nearest_points_are_feasible():
    with pytest.raises(ConvertError) as raised:
        within('size = "2M"\nkld = 0.001')
    nearest = raised.value.remedy.partition(";")[0]
    assert nearest.startswith("nearest: 1.9")
    other = nearest.rpartition(" or ")[2].partition(" MiB")[0]
    plan = within(f'size = "{other}MiB"\nkld = 0.001')
    assert plan.predicted_kld <= 0.001


@pytest.mark.parametrize("goal", ['size = "300K"', "bpw = 0.9", "kld = 1e-9\nformats = ['Q*_K']"])
def test_what_is_called_nearest_can_be_asked_for(goal):
    with pytest.raises(ConvertError) as raised:
        within(goal)
    for point in raised.value.remedy.partition(";")[0].removeprefix("nearest: ").split(" or "):
        size, unit, _, kld = point.replace(")", "").split()
        rest = goal.partition("\n")[2]
        retyped = f"bpw = {size}" if unit == "bpw" else f'size = "{size}{unit}"'
        within(f"kld = {kld}\n{rest}" if goal.startswith("kld") else f"{retyped}\n{rest}")


def test_a_size_and_a_divergence_that_agree():
    plan = within('size = "3M"\nkld = 5')
    assert plan.predicted_kld == within('size = "3M"').predicted_kld <= 5


def test_more_than_any_plan_takes_is_the_best_plan():
    plan = within('size = "1GB"')
    assert {row.format for row in plan.tensors} == {"F32", "F16"}
    assert plan.spent is not None and plan.spent.exact and plan.spent.gap == 0


def test_what_was_not_measured_is_an_error():
    of = model_map()
    measured = evidence(of)
    partial = {name: losses for name, losses in measured.losses.items() if "attn_k" not in name}
    with pytest.raises(ConvertError, match="attn_k") as raised:
        within('size = "2M"', of, measured=Evidence(partial, measured.layer_scores, "table.safetensors"))
    assert "table.safetensors" in raised.value.where
    no_q4 = {n: {f: loss for f, loss in losses.items() if f != "Q4_K"} for n, losses in measured.losses.items()}
    with pytest.raises(ConvertError, match="what Q4_K costs this tensor was not measured"):
        within('size = "2M"', of, measured=Evidence(no_q4, measured.layer_scores, "table"))


def test_equal_evidence_gives_equal_plans():
    assert within('size = "2M"') == within('size = "2M"')


@pytest.mark.parametrize("kind", KINDS)
def test_as_many_bytes_as_the_rules_take_are_spent_better(kind):
    of = model_map(kind)
    measured, named = evidence(of, seed=2), {t.name for t in of.tensors}
    text = f'{HEAD}base = "Q4_K"\n[[rule]]\nroles = ["mlp_*", "expert_*"]\nformat = "Q3_K"\n[budget]\nsize = "rules"\n'
    own = parse_profile(text, "mine", "mine.toml")
    by_rules, plan = (assign(p, of, evidence=measured, with_importance=named) for p in (own.by_rules(), own))
    assert 0.99 * by_rules.n_bytes < plan.n_bytes <= by_rules.n_bytes
    assert plan.predicted_kld < 0.9 * by_rules.predicted_kld
    assert plan.spent is not None and plan.spent.budget.data_bytes == by_rules.n_bytes
    set_by_hand = parse_override("output=Q8_0")
    kept = assign(own, of, [set_by_hand], evidence=measured, with_importance=named)
    (head,) = (row for row in kept.tensors if row.tensor.role is Role.OUTPUT)
    assert (head.format, head.reason) == ("Q8_0", set_by_hand.text)
    by_both = assign(own.by_rules(), of, [set_by_hand], evidence=measured, with_importance=named)
    assert 0.99 * by_both.n_bytes < kept.n_bytes <= by_both.n_bytes
