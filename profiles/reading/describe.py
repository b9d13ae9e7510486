"""A profile in words: what decides about which tensors, in the order in which it is asked."""

from bitwright.profiles.reading.activations import ActivationRules
from bitwright.profiles.reading.budget import Budget, Floor
from bitwright.profiles.reading.schema import QuantizationProfile


def profile_lines(profile: QuantizationProfile) -> list[str]:
    """The lines that `bitwright profiles check` prints."""
    lines = [f"{profile.name}: {profile.description}", f"target {profile.target}"]
    if profile.base is not None:
        lines.append(f"{profile.base} for what nothing below names")
    for tier in profile.tiers:
        lines.append(
            f"{tier.format} for the next {tier.share:.4g} of the layers, the most important first ({tier.text})"
        )
    for rule in profile.rules:
        layers = "" if rule.layers == ("all",) else f" in layers {', '.join(rule.layers)}"
        lines.append(f"{rule.format} for {', '.join(rule.roles + rule.tensors)}{layers} ({rule.text})")
    lines += [] if profile.budget is None else _budget_lines(profile.budget)
    if profile.target == "safetensors":
        return [*lines, _activation_line(profile.activations)]
    protection = profile.protection
    return [*lines, f"super weights: {protection.super_weights}, within {protection.tolerance:.4g} of their magnitude"]


def _activation_line(rules: ActivationRules) -> str:
    smoothing = f"smoothed first, alpha {rules.alpha}" if rules.smooth else "as they are"
    fallback = "replaced" if rules.adapt else "kept"
    return f"activations: {smoothing}; static scales by {rules.scales}; a scheme that they cannot bear is {fallback}"


def _layers(floor: Floor) -> str:
    return "" if floor.layers == "all" else f" in layers {floor.layers}"


def _budget_lines(budget: Budget) -> list[str]:
    goals = [
        f"{budget.size} bytes" if budget.size is not None else "",
        f"{budget.bpw:g} bits per weight" if budget.bpw is not None and budget.mix is None else "",
        f"as many bits per weight as llama.cpp's {budget.mix} takes of the model" if budget.mix is not None else "",
        f"a predicted KL divergence of {budget.kld:g}" if budget.kld is not None else "",
        "as many bytes as base and rules take, which decide where nothing is measured," if budget.as_rules else "",
    ]
    goal = " and ".join(filter(None, goals)) or "what --target-size, --target-bpw or --target-kld says"
    free = "every matrix" if budget.as_rules else "what no rule names"
    lines = [f"a budget of {goal} for {free}, among {' '.join(budget.formats)}"]
    lines += [f"no fewer bits than {floor.format} for {floor.roles}{_layers(floor)}" for floor in budget.floors]
    return lines + [f"one format a layer for {', '.join(group)}" for group in budget.alike]
