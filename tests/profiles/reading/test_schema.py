"""Profiles are read strictly: whatever is wrong is named, with the nearest right thing."""

from dataclasses import replace

import pytest

from bitwright.formats.errors import ConvertError
from bitwright.formats.registry import FORMATS
from bitwright.formats.schemes.registry import SCHEMES
from bitwright.profiles.mixes import MIXES
from bitwright.profiles.planning.assign import assign
from bitwright.profiles.planning.labels import expected_mix, mix_bits, mix_of, sized_like_its_mix
from bitwright.profiles.reading.known_names import other_names
from bitwright.profiles.reading.rules import in_range, parse_override
from bitwright.profiles.reading.schema import has_name, load_profile, parse_profile, preset_names, profile_names
from bitwright.profiles.reading.target import KEPT
from bitwright.profiles.reading.tiers import parse_tiers, tiers_of_layers
from bitwright.profiles.sizes import parse_size
from bitwright.profiles.vocabulary import Role
from tests.profiles.models import evidence, model_map

HEAD = 'description = "d"\ngood_for = "g"\nbase = "Q4_K"\n'


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_valid_and_described(name):
    profile = load_profile(name)
    assert profile.name == name
    assert profile.description and profile.good_for
    known = set(FORMATS) if profile.target == "gguf" else {*SCHEMES, *KEPT}
    assert {decision.format for decision in (*profile.rules, *profile.tiers)} | {profile.base} <= known | {None}
    assert (profile.base is None) == (name == "budget")


def test_the_four_presets_are_there():
    assert {"mlp-low-precision", "attention-high-precision", "balanced-4bit", "uniform-8bit"} <= set(preset_names())


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("all", range(10)),
        ("first:2", [0, 1]),
        ("last:2", [8, 9]),
        ("first:12.5%", [0, 1]),  # a share is rounded up
        ("first:1/3", [0, 1, 2, 3]),
        ("1/3-2/3", [4, 5, 6]),
        ("2/3-3/3", [7, 8, 9]),
        ("0%-40%", [0, 1, 2, 3]),
        ("95%-100%", []),
        ("last:1%", [9]),
        ("every:4", [0, 4, 8]),
        ("3-5", [3, 4, 5]),
        ("7", [7]),
    ],
)
def test_ranges(text, layers):
    assert [layer for layer in range(10) if in_range(layer, 10, text)] == list(layers)


@pytest.mark.parametrize(
    ("toml", "what", "remedy"),
    [
        (HEAD + "bse = 1", "unknown key 'bse'", "did you mean 'base'?"),
        (HEAD.replace("Q4_K", "Q4_J"), "unknown format 'Q4_J'", "did you mean 'Q4_"),
        (
            HEAD + '[[rule]]\nroles = ["mlp_dwn"]\nformat = "Q4_K"',
            "no role matches 'mlp_dwn'",
            "did you mean 'mlp_down'?",
        ),
        (HEAD + '[[rule]]\nroles = ["mlp_*"]\nlayer = "all"\nformat = "Q4_K"', "unknown key 'layer'", "'layers'"),
        (HEAD + '[[rule]]\nroles = ["mlp_*"]\nlayers = "frist:2"\nformat = "Q4_K"', "no range of layers", "first:2"),
        (HEAD + '[[rule]]\nroles = ["mlp_*"]\nlayers = "7-3"\nformat = "Q4_K"', "no range of layers", "4-7"),
        (HEAD + '[[rule]]\nroles = ["mlp_*"]\nlayers = "12-"\nformat = "Q4_K"', "no range of layers", "4-7"),
        (HEAD + '[[rule]]\nformat = "Q4_K"', "a rule needs", "add what is missing"),
        (HEAD + '[[rule]]\nroles = "mlp_*"\ntensors = "blk.*"\nformat = "Q4_K"', "a rule needs", "add"),
        (HEAD + "[[rule]]\nroles = 3\nformat = 'Q4_K'", "a text or a list", "write"),
        ('good_for = "g"\nbase = "Q4_K"', "'description' is missing", "add description"),
        ('description = "d"\ngood_for = "g"', "'base' is missing", "add base"),
        (HEAD + 'extends = "balanced-4bits"', "no preset is called 'balanced-4bits'", "did you mean 'balanced-4bit'?"),
        (HEAD + "extends = 4", "no preset is called 4", "known"),
        (HEAD + 'target = "guff"', "unknown target 'guff'", "did you mean 'gguf'?"),
        (HEAD + 'target = "safetensors"', "unknown scheme 'Q4_K'", "W4A16"),
        (HEAD + 'target = "safetensors"\nextends = "uniform-8bit"', "has the target gguf", "extend"),
        (HEAD.replace('"Q4_K"', '"W4A16"') + 'extends = "w4a16"\ntarget = "gguf"', "'w4a16' has the target", "extend"),
        (HEAD.replace("base", 'extends = "w4a16"\nbase').replace("Q4_K", "W8A9"), "unknown scheme 'W8A9'", "'W8A8'?"),
        (HEAD + "tier = 3", "`tier` is a list of tables", "[[tier]]"),
        (HEAD + '[[tier]]\nshare = 0.2\nfromat = "Q4_K"', "unknown key 'fromat'", "did you mean 'format'?"),
        (HEAD + '[[tier]]\nformat = "Q4_K"', "a tier needs `share`", "share = 0.2"),
        (HEAD + '[[tier]]\nshare = -1\nformat = "Q4_K"', "a positive number", "0.05"),
        (HEAD + '[[tier]]\nshare = true\nformat = "Q4_K"', "a positive number", "0.05"),
        (HEAD + '[[tier]]\nshare = 0.7\nformat = "Q4_K"\n[[tier]]\nshare = 0.5\nformat = "F16"', "add up to 1.2", "1"),
        (HEAD + "budget = 3", "`budget` is a table", "[budget]"),
        (HEAD + "[budget]\nsiez = 3", "unknown key 'siez'", "did you mean 'size'?"),
        (HEAD + '[budget]\nsize = "big"', "'big' is no size", "1.5GiB"),
        (HEAD + "[budget]\nbpw = 0", "a positive number", "0.05"),
        (HEAD + "[budget]\nkld = nan", "a positive number", "0.05"),
        (HEAD + '[budget]\nsize = "1G"\nbpw = 2', "two sizes for one file", "one of them"),
        (HEAD + '[budget]\nformats = ["IQ9*"]', "no format matches 'IQ9*'", "known"),
        (HEAD + '[budget]\nformats = ["Q4_J"]', "no format matches 'Q4_J'", "did you mean 'Q4_"),
        (HEAD + '[budget]\nsize = "rules"\nbpw = 2', "two sizes for one file", "one of them"),
        (HEAD.replace('base = "Q4_K"', "") + '[budget]\nsize = "rules"', "there is no base", "add base"),
        (HEAD + '[budget.floors]\noutput = { "frist:2" = "Q4_K" }', "'frist:2' is no range of layers", "first:2"),
        (HEAD + '[budget.floors]\noutput = { "first:2" = 4 }', "is no format", "first:1/3"),
        (HEAD + "[budget]\nfloors = 3", "`budget.floors` is a table", "[budget.floors]"),
        (HEAD + '[budget.floors]\nattention = "Q4_K"', "no role matches 'attention'", "did you mean 'attention_"),
        (HEAD + '[budget.floors]\noutput = "Q9_K"', "unknown format 'Q9_K'", "did you mean"),
        (HEAD + "[budget.floors]\noutput = 4", "is no format", "Q3_K"),
        (HEAD + '[budget]\nalike = "mlp_*"', "a list of lists", "mlp_gate"),
        (HEAD + '[budget]\nalike = [["mlp_*"], ["mlp_up"]]', "'mlp_up' is in two groups", "once"),
        (HEAD.replace("Q4_K", "FP8") + 'target = "safetensors"\n[budget]\nbpw = 4', "formats of a GGUF", "gguf"),
        ("base = = 1", "not valid TOML", "line 1"),
    ],
)
def test_what_is_wrong_is_named(toml, what, remedy):
    with pytest.raises(ConvertError) as raised:
        parse_profile(toml, "mine", "mine.toml")
    assert what in raised.value.what
    assert "mine.toml" in raised.value.where
    assert remedy in raised.value.what + raised.value.remedy


def test_unknown_profile_names_the_nearest():
    with pytest.raises(ConvertError, match="balanced-4bit"):
        load_profile("balanced-4bits")


@pytest.mark.parametrize("name", list(SCHEMES))
def test_every_scheme_is_a_profile(name):
    profile = load_profile(name)
    assert (profile.name, profile.target, profile.base, profile.rules) == (name, "safetensors", name, ())
    assert profile.description.startswith("weights in ")


def test_descriptions_tell_schemes_apart():
    assert len({load_profile(name).description for name in SCHEMES}) == len(SCHEMES)


def test_what_differs_in_letter_case_alone_makes_the_same():
    names: dict[str, list[str]] = {}
    for name in profile_names():
        names.setdefault(name.casefold(), []).append(name)
    for same in names.values():
        assert len({(load_profile(name).target, load_profile(name).base) for name in same}) == 1, same
    for name, meant in (("w8a16", "W8A16"), ("Balanced-4Bit", "balanced-4bit"), ("nvfp4", "NVFP4")):
        assert load_profile(name).name == meant


@pytest.mark.parametrize(
    ("name", "meant"),
    [("Q8_0", "uniform-8bit"), ("f16", "fp16-baseline"), ("fp8-dynamic", "fp8"), ("FP8-Static", "FP8_STATIC")],
)
def test_names_that_people_have_for_presets_and_schemes(name, meant):
    profile = load_profile(name)
    assert profile.name == meant and profile.asked_as == name and profile == load_profile(meant)
    assert load_profile(meant).asked_as == ""


@pytest.mark.parametrize(
    ("name", "mix"), [("Q4_K_M", "Q4_K_M"), ("iq2_m", "IQ2_M"), ("Q4_K", "Q4_K_M"), ("Q6_K", "Q6_K")]
)
def test_a_mix_is_a_budget_of_its_size(name, mix):
    profile, budget = load_profile(name), load_profile("budget").budget
    assert profile.name == mix and profile.needs_sensitivity
    assert profile.budget is not None and profile.budget.floors == budget.floors
    assert profile.budget.mix == mix and profile.budget.bpw == MIXES[mix].bits
    aimed = profile.aiming_at(None, 3.0, None, "test").budget
    assert aimed is not None and (aimed.bpw, aimed.mix) == (3.0, None)
    of = model_map(width=1024)
    sized = sized_like_its_mix(profile, of).budget
    assert sized is not None and sized.bpw == mix_bits(mix, of.tensors)
    plan = assign(sized_like_its_mix(profile, of), of, evidence=evidence(of))
    assert plan.bits_per_weight <= sized.bpw and expected_mix(profile, of) == mix_of(plan) == mix
    assert has_name(profile) and not has_name(replace(profile, text="another"))


def test_a_format_is_this_format_throughout():
    profile = load_profile("iq4_nl")
    assert (profile.name, profile.base, profile.rules, profile.target) == ("IQ4_NL", "IQ4_NL", (), "gguf")


def test_every_other_name_is_a_profile():
    assert all(load_profile(name).description for name in other_names())


@pytest.mark.parametrize(
    ("name", "meant"), [("Q4_KM", "Q4_K_M"), ("W8A16_CHANEL", "W8A16_CHANNEL"), ("balanced", "balanced-4bit")]
)
def test_an_unknown_name_gives_three_suggestions(name, meant):
    with pytest.raises(ConvertError) as caught:
        load_profile(name)
    suggested = caught.value.remedy.partition("?")[0]
    assert meant in suggested and len(suggested.replace(" or ", ", ").split(", ")) == 3


def test_a_mix_in_a_profile_is_one_of_llama_cpps():
    text = 'description = "d"\ngood_for = "g"\n[budget]\nmix = "{}"\n'
    assert parse_profile(text.format("IQ2_M"), "mine", "here").needs_sensitivity
    for table, message in (("Q9_K", "no mix 'Q9_K'"), ('IQ2_M"\nbpw = "2', "two sizes")):
        with pytest.raises(ConvertError, match=message):
            parse_profile(text.format(table).replace('"2"', "2"), "mine", "here")


def test_missing_profile_file(tmp_path):
    with pytest.raises(ConvertError, match="cannot be read"):
        load_profile(str(tmp_path / "mine.toml"))


def test_profile_from_a_file(tmp_path):
    (tmp_path / "mine.toml").write_text(HEAD)
    assert load_profile(str(tmp_path / "mine.toml")).name == "mine"


def test_overrides_speak_of_roles_or_tensors():
    assert parse_override("mlp_down=q6_k").roles == ("mlp_down",)
    assert parse_override("mlp_down=q6_k").format == "Q6_K"
    assert parse_override("blk.0.*=Q8_0").tensors == ("blk.0.*",)
    for text in ("Q8_0", "=Q8_0", "mlp_down="):
        with pytest.raises(ConvertError, match="PATTERN=FORMAT"):
            parse_override(text)


def test_every_role_can_be_spoken_of():
    for role in Role:
        assert parse_override(f"{role}=Q8_0").roles == (role.value,)


def formats(profile) -> list[str]:
    return [rule.format for rule in profile.rules]


def test_a_profile_that_extends_a_preset_comes_after_it():
    parent = load_profile("balanced-4bit")
    text = 'description = "d"\ngood_for = "g"\nextends = "balanced-4bit"\n[[rule]]\nroles = "mlp_up"\nformat = "Q3_K"'
    profile = parse_profile(text, "mine", "mine.toml")
    assert profile.base == parent.base and profile.text == text and profile.inherited == (parent.text,)
    assert formats(profile) == [*formats(parent), "Q3_K"]
    assert [rule.text for rule in profile.rules][-2:] == ["balanced-4bit.toml, rule 2", "mine.toml, rule 1"]
    assert parse_profile(f'base = "Q5_K"\n{text}', "mine", "mine.toml").base == "Q5_K"


def test_a_file_may_have_the_name_of_the_preset_it_extends(tmp_path):
    path = tmp_path / "uniform-8bit.toml"
    path.write_text('description = "d"\ngood_for = "g"\nextends = "uniform-8bit"\n')
    assert load_profile(str(path)).base == "Q8_0"


def test_presets_that_extend_each_other_are_refused(tmp_path, monkeypatch):
    for name, parent in (("a", "b"), ("b", "a")):
        (tmp_path / f"{name}.toml").write_text(f'description = "d"\ngood_for = "g"\nextends = "{parent}"\n')
    monkeypatch.setattr("bitwright.profiles.reading.schema.PRESETS", tmp_path)
    with pytest.raises(ConvertError, match="would extend itself"):
        load_profile("a")


def test_own_tiers_take_the_place_of_inherited_ones():
    text = 'description = "d"\ngood_for = "g"\nextends = "importance-tiers"\n'
    assert parse_profile(text, "mine", "mine.toml").tiers == load_profile("importance-tiers").tiers
    (tier,) = parse_profile(f'{text}[[tier]]\nshare = 1\nformat = "q5_k"', "mine", "mine.toml").tiers
    assert (tier.share, tier.format, tier.text) == (1.0, "Q5_K", "mine.toml, tier 1")


def test_a_budget_inherits_floors_and_adds_its_own():
    text = 'description = "d"\ngood_for = "g"\nextends = "budget"\n[budget]\nsize = "1GiB"\nformats = "q*_k"\n'
    budget = parse_profile(f'{text}floors = {{ "output" = "q6_k" }}', "mine", "mine.toml").budget
    assert budget is not None and budget.size == 1 << 30 and budget.has_goal
    assert budget.formats == ("Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K")
    assert budget.least_bits([Role.OUTPUT]) == 6.5625
    assert budget.least_bits([Role.ATTENTION_KEY]) == 2.0625
    assert budget.least_bits([Role.MLP_UP]) == 0


def test_a_goal_from_outside_takes_the_place_of_the_profiles():
    text = 'description = "d"\ngood_for = "g"\n[budget]\nsize = "1GiB"\n'
    profile = parse_profile(text, "mine", "mine.toml")
    assert profile.needs_sensitivity
    aimed = profile.aiming_at(None, None, 0.05, "--target-kld").budget
    assert (aimed.size, aimed.kld, aimed.where) == (None, 0.05, "--target-kld")
    assert profile.aiming_at(None, None, None, "nothing") is profile
    with pytest.raises(ConvertError, match="two sizes"):
        profile.aiming_at(1 << 20, 2.4, None, "--target-size, --target-bpw")
    fixed = load_profile("uniform-8bit")
    assert not fixed.needs_sensitivity and fixed.aiming_at(1 << 20, None, None, "--target-size").needs_sensitivity


@pytest.mark.parametrize(
    "text", ["first:3/0", "first:-1", "first:120%", "2/3-1/3", "1/3-", "every:50%", "first:1/x", ""]
)
def test_what_is_no_range(text):
    with pytest.raises(ValueError):
        in_range(0, 4, text)


def test_tiers_rank_layers_by_score():
    tiers = parse_tiers([{"share": s, "format": f} for s, f in ((0.2, "F16"), (0.4, "Q8_0"))], "mine.toml", "gguf")
    scores = {layer: [5, 1, 9, 1, 3][layer] for layer in range(5)}
    found = tiers_of_layers(tiers, scores)
    assert {layer: tier.format for layer, tier in found.items()} == {2: "F16", 0: "Q8_0", 4: "Q8_0"}
    many = tiers_of_layers(load_profile("importance-tiers").tiers, {layer: -layer for layer in range(30)})
    assert [sum(tier.format == f for tier in many.values()) for f in ("F16", "Q8_0", "Q4_K")] == [6, 12, 12]
    assert many[0].format == "F16" and many[29].format == "Q4_K"


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("500M", 500_000_000), ("20GB", 20_000_000_000), ("1.5GiB", 1_610_612_736), ("1kib", 1024), ("7", 7)],
)
def test_sizes(text, n_bytes):
    assert parse_size(text, "--split-size") == n_bytes


@pytest.mark.parametrize("text", ["", "GB", "-1G", "1.2.3M", "five", "0"])
def test_what_is_no_size(text):
    with pytest.raises(ConvertError, match="is no size"):
        parse_size(text, "--split-size")


def test_a_score_of_its_own_is_on_top_of_the_inherited_one():
    head = 'description = "d"\ngood_for = "g"\nextends = "importance-tiers"\n'
    profile = parse_profile(f"{head}[score]\ngradient_magnitude = 1\nweight_magnitude = 0\n", "p", "p.toml")
    assert profile.score == {"gradient_magnitude": 1.0, "weight_magnitude": 0.0}
    for keys, what in (
        ("gradient = 1", "unknown key 'gradient'"),
        ("gradient_magnitude = -1", "a positive number"),
        ("gradient_magnitude = 0\nactivation_variance = 0\nweight_magnitude = 0", "ranks no layers"),
    ):
        with pytest.raises(ConvertError, match=what):
            parse_profile(f"{head}[score]\n{keys}\n", "p", "p.toml")


MEASURED = 'description = "d"\ngood_for = "g"\nextends = "balanced-4bit"\n'


def test_rules_of_a_file_that_extends_a_measured_preset_stand():
    parent = load_profile("balanced-4bit")
    assert parent.has_rules_instead and parent.n_rules_of_size == len(parent.rules) == 2
    profile = parse_profile(f'{MEASURED}[[rule]]\nroles = "mlp_up"\nformat = "Q3_K"', "mine", "mine.toml")
    assert profile.has_rules_instead and profile.needs_sensitivity
    assert formats(profile.beyond_size()) == ["Q3_K"] and profile.beyond_size().base is None
    by_rules = profile.by_rules()
    assert formats(by_rules) == [*formats(parent), "Q3_K"] and by_rules.base == "Q4_K"
    assert not by_rules.needs_sensitivity


def test_a_size_of_its_own_takes_the_place_of_the_rules_that_told_it():
    own = parse_profile(f'{MEASURED}[budget]\nbpw = 4.5\n[[rule]]\nroles = "output"\nformat = "Q8_0"', "mine", "m.toml")
    asked = load_profile("balanced-4bit").aiming_at(None, 4.5, None, "--target-bpw")
    for profile, rules in ((own, ["Q8_0"]), (asked, [])):
        assert not profile.has_rules_instead and profile.base is None and formats(profile) == rules
        assert profile.budget.bpw == 4.5 and profile.budget.floors == load_profile("balanced-4bit").budget.floors
    again = parse_profile(
        f'{MEASURED}[budget]\nsize = "rules"\n[[rule]]\nroles = "output"\nformat = "Q8_0"', "m", "m.toml"
    )
    assert again.has_rules_instead and formats(again.beyond_size()) == []


def test_a_floor_may_be_for_a_range_of_layers():
    text = (
        'description = "d"\ngood_for = "g"\n[budget.floors]\n"mlp_*" = { "first:1/3" = "Q6_K", "1/3-3/3" = "Q3_K" }\n'
    )
    budget = parse_profile(text, "mine", "mine.toml").budget
    assert [budget.least_bits([Role.MLP_UP], layer, 9) for layer in (0, 2, 3, 8)] == [6.5625, 6.5625, 3.4375, 3.4375]
    assert budget.least_bits([Role.MLP_UP], None, 9) == budget.least_bits([Role.OUTPUT], 0, 9) == 0
