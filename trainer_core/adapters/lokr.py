"""LoKr with peft, and a forward that never builds the Kronecker product."""

from __future__ import annotations

from typing import Any, ClassVar

from peft.tuners.lokr import LoKrModel
from peft.tuners.lokr.layer import Linear
from torch import Tensor, nn
from torch.nn import functional


class LokrLinear(Linear):
    """peft's LoKr layer, computing y = s · (first [a, c] ⊗ second [b, d]) · x with two small products.

    peft's own forward builds the Kronecker product, which is as large as the layer's weight, and reshapes it to the
    shape of `weight`. That fails for nf4, whose packed codes have another shape.
    """

    def _get_delta_activations(self, adapter_name: str, input: Tensor, *_: Any, **__: Any) -> Tensor:  # noqa: A002
        first = self.lokr_w1[adapter_name]
        x = self._cast_input_dtype(input, first.dtype).unflatten(-1, (first.shape[1], -1))  # [..., c, d]
        if adapter_name in self.lokr_w2:
            x = functional.linear(x, self.lokr_w2[adapter_name])
        else:
            x = functional.linear(functional.linear(x, self.lokr_w2_b[adapter_name]), self.lokr_w2_a[adapter_name])
        x = functional.linear(x.transpose(-1, -2), first)  # [..., b, a]
        return x.transpose(-1, -2).flatten(-2) * self.scaling[adapter_name]


class LokrModel(LoKrModel):
    """peft's LoKr injection with LokrLinear as the layer."""

    layers_mapping: ClassVar[dict[type[nn.Module], type[LokrLinear]]] = {nn.Linear: LokrLinear}  # type: ignore[misc]
