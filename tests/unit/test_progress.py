"""What is shown while a run trains."""

import math

from llama_lab.progress import sparkline


def test_sparkline_is_as_high_as_the_values():
    assert sparkline([3.0, 2.0, 1.0]) == "█▅▁"
    assert sparkline([1.0, math.nan, 2.0]) == "▁█"
    assert sparkline([1.0, 1.0]) == "▁▁"
    assert sparkline([1.0]) == ""
