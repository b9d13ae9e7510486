"""Profiles are read strictly: whatever is wrong is named, with the nearest right thing."""

import pytest

from formats.errors import ConvertError
from formats.registry import FORMATS
from profiles.rules import in_range, parse_override
from profiles.schema import load_profile, parse_profile, preset_names
from profiles.vocabulary import Role

HEAD = 'description = "d"\ngood_for = "g"\nbase = "Q4_K"\n'


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_valid_and_described(name):
    profile = load_profile(name)
    assert profile.name == name
    assert profile.description and profile.good_for
    assert {rule.format for rule in profile.rules} | {profile.base} <= set(FORMATS)


def test_the_four_presets_are_there():
    assert {"mlp-low-precision", "attention-high-precision", "balanced-4bit", "uniform-8bit"} <= set(preset_names())


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("all", range(10)),
        ("first:2", [0, 1]),
        ("last:2", [8, 9]),
        ("first:12.5%", [0, 1]),  # a fraction is rounded up
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
        (HEAD + '[[rule]]\nformat = "Q4_K"', "a rule needs", "add what is missing"),
        (HEAD + '[[rule]]\nroles = "mlp_*"\ntensors = "blk.*"\nformat = "Q4_K"', "a rule needs", "add"),
        (HEAD + "[[rule]]\nroles = 3\nformat = 'Q4_K'", "a text or a list", "write"),
        ('good_for = "g"\nbase = "Q4_K"', "'description' is missing", "add description"),
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
