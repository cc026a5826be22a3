"""AdaLoRA that does not depend on peft-harness: an adapter with state, a term of the loss, and work after every step."""

import copy

import torch
from torch import nn

LETTERS = "AEB"


class AdaLinear(nn.Module):
    """y = W0 x + scaling B diag(E) A x. Triplet i is (column i of B, E[i], row i of A)."""

    def __init__(self, base, config, generator):
        super().__init__()
        self.base, self.config = base, config
        self.scaling = config.alpha / (config.rank + 1e-5)
        like = {"dtype": base.weight.dtype, "device": base.weight.device}

        def drawn(*shape):  # in float64, so that every dtype starts from the same numbers
            return nn.Parameter((0.02 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(**like))

        self.A = drawn(config.rank, base.in_features)
        self.B = drawn(base.out_features, config.rank)
        self.E = nn.Parameter(torch.zeros(config.rank, 1, **like))
        # Buffers, so that the model's state_dict has them: smoothed |w dL/dw|, and its smoothed change, in float32 or wider.
        for letter in LETTERS:
            zeros = torch.zeros_like(getattr(self, letter), dtype=torch.promote_types(base.weight.dtype, torch.float32))
            self.register_buffer(f"exp_avg_ipt_{letter}", zeros)
            self.register_buffer(f"exp_avg_unc_{letter}", zeros.clone())
        self.register_buffer("mask", torch.ones(config.rank, 1, dtype=torch.bool, device=base.weight.device))
        self.train(base.training)

    def averages(self, letter):
        return getattr(self, f"exp_avg_ipt_{letter}"), getattr(self, f"exp_avg_unc_{letter}")

    def forward(self, x):
        low = nn.functional.dropout(x, self.config.dropout, self.training) @ self.A.T
        return self.base(x) + (low * self.E[:, 0]) @ self.B.T * self.scaling

    def update(self):
        return self.scaling * (self.B * self.E[:, 0]) @ self.A

    def off_orthogonal(self):
        gaps = [gram - torch.eye(len(gram)).to(gram) for gram in (self.B.T @ self.B, self.A @ self.A.T)]
        return torch.stack(
            [gap.norm() if self.config.regularization == "mean-norm" else (gap**2).sum() for gap in gaps]
        )

    @torch.no_grad()
    def observe(self):
        for letter in LETTERS:
            ipt, unc = self.averages(letter)
            w = getattr(self, letter)
            new = (w.to(ipt) * w.grad.to(ipt)).abs() if w.grad is not None else torch.zeros_like(ipt)
            ipt.lerp_(new, 1 - self.config.beta1)
            unc.lerp_((new - ipt).abs(), 1 - self.config.beta2)

    def scores(self):
        s = {letter: torch.mul(*self.averages(letter)) for letter in LETTERS}
        return s["E"][:, 0] + s["A"].mean(1) + s["B"].mean(0)


class AcmeAdapted:
    """What `attach` returns: the protocol `harness.methods.spec.Adapted`, written out."""

    can_merge = True

    def __init__(self, model, layers, config):
        self.model, self.layers, self.config, self.merged = model, layers, config, False

    def tensors(self):  # what trains, by the names of `peft-harness explain adalora`
        return {f"{path}.{letter}": getattr(layer, letter) for path, layer in self.layers.items() for letter in LETTERS}

    def state(self):  # what does not train but must be saved; the tensors themselves, so that loading reaches them
        return {
            f"{path}.{name}": value
            for path, layer in self.layers.items()
            for name, value in layer.named_buffers(recurse=False)
        }

    def parameters(self):
        return list(self.tensors().values())

    def regularizer(self):  # a scalar with a graph, which the trainer adds to the loss
        if not self.config.orthogonality:
            return None
        gaps = torch.cat([layer.off_orthogonal() for layer in self.layers.values()])
        mean = self.config.regularization == "mean-norm"
        return self.config.orthogonality * (gaps.mean() if mean else gaps.sum())

    def optimizer(self, lr, weight_decay):  # None: the trainer chooses. GaLore returns an optimizer of its own here
        return None

    @torch.no_grad()
    def after_step(self, step):  # after optimizer step number `step`, from 1, and before zero_grad
        c, layers = self.config, list(self.layers.values())
        end = c.total_steps - c.tfinal
        if step < end:
            for layer in layers:
                layer.observe()
        if step == end or (c.tinit < step < end and step % c.delta_t == 0):
            first, last = c.rank * len(layers), c.target_rank * len(layers)
            left = last + (first - last) * (end - step) ** 3 // max(1, end - c.tinit) ** 3
            order = torch.cat([layer.scores() for layer in layers]).sort(descending=True, stable=True).indices
            kept = torch.zeros(first, dtype=torch.bool, device=order.device).index_fill_(0, order[:left], True)
            for layer, mine in zip(layers, kept.split(c.rank), strict=True):
                layer.mask.copy_(mine[:, None])
        if step >= end or (c.tinit < step and step % c.delta_t == 0):
            for layer in layers:
                layer.E.masked_fill_(~layer.mask, 0)

    def _replace(self, chosen):
        for path, layer in self.layers.items():
            parent, _, name = path.rpartition(".")
            training = self.model.get_submodule(path).training  # of the layer that is there now
            setattr(self.model.get_submodule(parent), name, chosen(layer).train(training))

    def merge(self):  # the base stays as it is, so that unmerge is exact
        if self.merged:  # what is merged stays as it is
            return
        self.merged = True

        def merged(layer):
            dense = copy.deepcopy(layer.base)
            with torch.no_grad():
                dense.weight += layer.update()
            return dense

        self._replace(merged)

    def unmerge(self):
        self.merged = False
        self._replace(lambda layer: layer)

    def detach(self):
        self.merged = False
        self._replace(lambda layer: layer.base)


def adapt(model, layers, config, generator):  # layers: path -> linear layer
    model.requires_grad_(False)
    adapted = AcmeAdapted(model, {path: AdaLinear(base, config, generator) for path, base in layers.items()}, config)
    adapted._replace(lambda layer: layer)
    return adapted
