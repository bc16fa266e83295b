"""The one check that an adapter does on a convolution and on a lookup what its Δ says."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from eckart.adapters import Adapter, AdapterMethod
from eckart.adapters.site import site_of


def every_kind(method: AdapterMethod, scale: float, atol: float = 1e-5) -> Iterator[Adapter]:
    """Give an adapter of rank 3 at its start, for a convolution and for an embedding, and check what becomes of it.

    The body of the loop moves the adapter away from its start; what the adapted layer then computes has to be what a
    layer with the weight W + Δ does.
    """
    torch.manual_seed(0)
    for module, x in (
        (nn.Conv2d(3, 8, 3, stride=2, padding=1), torch.randn(2, 3, 9, 9)),
        (nn.Embedding(20, 8), torch.randint(0, 20, (2, 5))),
    ):
        site = site_of("layer", module)
        assert site is not None
        matrix = module.weight.detach()
        matrix = matrix.mT if site.kind == "embedding" else matrix.flatten(1)
        adapter = method.build(site, 3, scale)
        adapter.initialize(matrix, None, torch.Generator().manual_seed(0))
        yield adapter
        changed = matrix + adapter.delta(matrix).detach()
        twin = type(module)(*((20, 8) if site.kind == "embedding" else (3, 8, 3, 2, 1)))
        twin.load_state_dict(module.state_dict())
        twin.weight.data = (changed.mT if site.kind == "embedding" else changed).reshape(module.weight.shape)
        assert torch.allclose(adapter(x, module), twin(x), atol=atol)
