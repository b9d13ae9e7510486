"""Importance tiers: the layers, ranked by how much they matter, in shares that get a format each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import floor

from bitwright.formats.errors import ConvertError
from bitwright.profiles.reading.strict import Table, known_keys, number, one_table
from bitwright.profiles.reading.target import Target, format_name

_TIER_KEYS = ("share", "format")
_SCORE_KEYS = ("gradient_magnitude", "activation_variance", "weight_magnitude")


@dataclass(frozen=True)
class Tier:
    """share: of the layers, from the most important one down; text: how a plan's reasons quote the tier."""

    share: float
    format: str
    text: str


def parse_tiers(tables: Sequence[Table], where: str, target: Target) -> tuple[Tier, ...]:
    """Tiers from their TOML tables, the most important layers first."""
    tiers = []
    for i, table in enumerate(tables):
        here = f"{where}, tier {i + 1}"
        known_keys(table, _TIER_KEYS, here)
        for key in _TIER_KEYS:
            if key not in table:
                raise ConvertError(f"a tier needs `{key}`", here, 'write for example share = 0.2 and format = "Q8_0"')
        share = number(table["share"], f"{here}, key share")
        tiers.append(Tier(share, format_name(table["format"], f"{here}, key format", target), here))
    if (total := sum(tier.share for tier in tiers)) > 1 + 1e-9:
        raise ConvertError(
            f"the shares of the tiers add up to {total:g}", f"{where}, key tier", "they are shares of 1: lower some"
        )
    return tuple(tiers)


def parse_score(table: object, where: str, inherited: Mapping[str, float]) -> dict[str, float]:
    """What a layer's score is blended from, name -> share, from its TOML table, on top of what it inherits. A share of
    0 leaves it out."""
    table = one_table(table, where, "score")
    known_keys(table, _SCORE_KEYS, where)
    shares = {key: 0.0 if value in (0, 0.0) else number(value, f"{where}, key {key}") for key, value in table.items()}
    if not any({**dict.fromkeys(_SCORE_KEYS, 1.0), **inherited, **shares}.values()):
        raise ConvertError("a score of nothing ranks no layers", where, "give one of the shares a number above 0")
    return {**inherited, **shares}


def tiers_of_layers(tiers: Sequence[Tier], scores: Mapping[int, float]) -> dict[int, Tier]:
    """Layer -> its tier; layers beyond the last tier are absent.

    scores: of every layer, the higher the more important; of two that are equal, the earlier layer comes first. A tier
    ends at the layer to which the sum of shares so far, rounded to whole layers, reaches.
    """
    ranked = sorted(scores, key=lambda layer: (-scores[layer], layer))
    chosen: dict[int, Tier] = {}
    reached = 0.0
    for tier in tiers:
        reached += tier.share
        for layer in ranked[len(chosen) : floor(reached * len(ranked) + 0.5 + 1e-9)]:
            chosen[layer] = tier
    return chosen
