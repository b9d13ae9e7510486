"""Every scheme as a profile of its own name: all matrices of the layers in it, all else as it is kept anyway."""

from bitwright.formats.schemes.registry import SCHEMES, Scheme
from bitwright.formats.schemes.scheme import ActivationScheme, WeightScheme

_TYPES = {"int": "INT", "float": "FP"}


def scheme_toml(name: str) -> str:
    """The profile's text. Raises KeyError for a name that is no scheme's, spelt as in formats.schemes.registry."""
    return (
        f'description = "{scheme_description(SCHEMES[name])}"\n'
        'good_for = "this scheme throughout, as it is; docs/schemes.md compares them"\n'
        f'target = "safetensors"\nbase = "{name}"\n'
    )


def scheme_description(scheme: Scheme) -> str:
    return f"{_weights(scheme.weights)}; {_inputs(scheme.activations)}"


def _weights(scheme: WeightScheme) -> str:
    rows, columns = scheme.block_structure or (1, 1)
    sharing = {
        "tensor": "the matrix",
        "channel": "a row",
        "group": f"{scheme.group_size} columns",
        "tensor_group": f"{scheme.group_size} columns, and for the matrix",
        "block": f"{rows} x {columns}",
    }[scheme.strategy]
    zero_points = "" if scheme.symmetric else ", with zero points"
    return f"weights in {_TYPES[scheme.type]}{scheme.num_bits}, a scale for {sharing}{zero_points}"


def _inputs(scheme: ActivationScheme | None) -> str:
    if scheme is None:
        return "inputs as they are"
    scales = {True: "scales measured at run time", False: "a stored scale", "local": "a stored scale and measured ones"}
    zero_point = "" if scheme.symmetric else ", with a zero point"
    return f"inputs in {_TYPES[scheme.type]}{scheme.num_bits}, {scales[scheme.dynamic]}{zero_point}"
