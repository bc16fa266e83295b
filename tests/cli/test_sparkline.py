from __future__ import annotations

import torch

from eckart.cli._sparkline import sparkline


def test_height_is_the_mean_of_a_part():
    assert sparkline([torch.linspace(1, 0, 800)]) == "█▇▆▅▄▃▂▁"
    assert sparkline([torch.tensor([5.0, 1.0, 0.0])]) == "█▂ "
    assert sparkline([torch.ones(3)], ascii_only=True) == "888"
    assert sparkline([torch.zeros(16)]) == " " * 8


def test_several_show_their_median():
    flat, steep = torch.ones(8), torch.tensor([1.0] + [0.0] * 7)
    assert sparkline([flat, steep, steep * 3]) == "█       "
    assert sparkline([flat, steep, flat * 3]) == "█" * 8
