"""AdaLoRA: the layers compute as LoRA's do with A scaled by lambda, and the averages of all are carried on together."""

from __future__ import annotations

from typing import Any

from harness.registry import implements

DTYPES = ("float64", "float32", "bfloat16", "float16")


@implements("adalora", name="fused", dtypes=DTYPES)
def adalora(model: Any, config: Any, generator: Any) -> Any:
    """Attach AdaLoRA to what `config.targets` names; config as `reference.adalora.Config`."""
    from harness.kernels.adalora_importance import adalora_importance_
    from harness.kernels.dropout import keep_mask
    from harness.kernels.lora_linear import lora_linear_over
    from harness.kernels.lora_linears import factors_over
    from harness.kernels.orthogonality import orthogonality
    from harness.kernels.siblings import Family, meet
    from reference.adalora import AdaLoraAdapted, AdaLoraLinear, attach

    class FusedAdaLoraLinear(AdaLoraLinear):
        family: Family

        def forward(self, x: Any) -> Any:
            if self.training and self.dropout.p:
                mask, kept = keep_mask(x, self.dropout.p)
                return lora_linear_over(self.base, x, self.A * self.E, self.B, self.scaling / kept, mask)
            return self.family(self, x)

        def alone(self, x: Any) -> Any:
            return lora_linear_over(self.base, x, self.A * self.E, self.B, self.scaling)

        def factors(self, x: Any) -> Any:
            return factors_over(self.base, x, self.A * self.E, self.B, self.scaling)

        def held(self) -> Any:
            return self.A, self.E, self.B, self.base.weight

    class FusedAdaLora(AdaLoraAdapted):
        def observe(self) -> None:
            given: dict[str, Any] = {}
            for letter in ("A", "E", "B"):
                given[letter] = [layer.tensors()[letter] for layer in self.adalora.values()]
                given[f"grad_{letter}"] = [w.grad for w in given[letter]]
                for average, name in (("I", "exp_avg_ipt"), ("U", "exp_avg_unc")):
                    given[f"{average}_{letter}"] = [
                        layer.get_buffer(f"{name}_{letter}") for layer in self.adalora.values()
                    ]
            adalora_importance_(**given, beta1=self.config.beta1, beta2=self.config.beta2)

        def regularizer(self) -> Any:
            if self.config.orthogonality == 0:
                return None
            P, Q = [layer.B for layer in self.adalora.values()], [layer.A for layer in self.adalora.values()]
            return self.config.orthogonality * orthogonality(P, Q, self.config.regularization)

    adapted = attach(model, config, generator)
    for layer in adapted.adalora.values():
        layer.__class__ = FusedAdaLoraLinear
    meet(adapted.adalora)
    adapted.__class__ = FusedAdaLora
    return adapted
