"""What is said before the work begins."""

from tests.converter.commands import TEXT, convert


def test_ternary_formats_of_short_blocks_are_warned_of_where_no_long_block_fits(tiny, tmp_path):
    """gemma3's rows are shorter than the 256 weights of a block of TQ1_0."""
    formats = ["--set", "mlp_*=Q2_0", "--set", "attention_*=Q2_0"]
    result = convert(
        "--output", tmp_path / "m.gguf", "--judge", "off", "--profile", "fp16-baseline", *formats, *TEXT, tiny("gemma3")
    )
    assert result.exit_code == 0, result.stderr
    assert "of the weights go into ternary formats, and they are not ternary" in result.stderr
