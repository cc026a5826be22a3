"""Planted faults of PiSSA."""

from __future__ import annotations

from functools import partial

from harness.conformance.faults import FaultCase, line_fault

_USUAL = {"rank": 3, "alpha": 8.0}
CASE = FaultCase(values=_USUAL)

_pissa = partial(line_fault, "pissa", values=_USUAL)

# fmt: off
FAULTS = [
    _pissa("iterates_without_orthonormal_products", ["svd"],
        "        Q = torch.linalg.qr(W_ED.T @ Q).Q\n        Q = torch.linalg.qr(W_ED @ Q).Q",
        "        Q = W_ED @ (W_ED.T @ Q)\n    Q = torch.linalg.qr(Q).Q", file="randomised_svd"),
    _pissa("divides_by_singular_values_of_zero", ["svd"],
        "    U, S, Vt = torch.linalg.svd(W_ED, full_matrices=False)\n    return U[:, :rank], S[:rank], Vt[:rank]",
        "    squares, V = torch.linalg.eigh(W_ED.double().T @ W_ED.double())\n"
        "    S, V = squares.flip(0).clamp(min=0).sqrt()[:rank], V.flip(1)[:, :rank]\n"
        "    U = W_ED.double() @ V / (S if S.any() else 1.0)\n"
        "    return U.to(W_ED.dtype), S.to(W_ED.dtype), V.T.to(W_ED.dtype)"),
    _pissa("accepts_a_rank_above_the_smaller_side", ["svd"], "if config.rank > min(D, E):", "if False:"),
    _pissa("merges_the_residual_of_its_own_start", ["merge"],
        'self.register_buffer("residual", residual)',
        'self.register_buffer("residual", residual)\n        self.start = residual.clone()',
        'as_stored(dense, self.get_buffer("residual") + self.delta())', "as_stored(dense, self.start + self.delta())",
        values={**_USUAL, "niter": 1}),
    _pissa("does_not_subtract_the_principal_part", ["residual"],
        "residual = W - scaling * (B.to(W.dtype) @ A.to(W.dtype))", "residual = W"),
    _pissa("subtracts_the_factors_before_they_are_rounded", ["residual"],
        "residual = W - scaling * (B.to(W.dtype) @ A.to(W.dtype))",
        "residual = W - scaling * ((U * root) @ (root[:, None] * Vt))", dtype="bfloat16"),
    _pissa("draws_its_sketch_from_torchs_own_generator", ["initial"],
        "rank, generator=generator, dtype=torch.float64", "rank, dtype=torch.float64", values={**_USUAL, "niter": 2}),
    _pissa("forgets_the_scaling_in_the_split", ["residual", "principal"],
        "root = (S / scaling).sqrt()", "root = S.sqrt()",
        "residual = W - scaling * (B", "residual = W - (B"),
    _pissa("takes_the_last_singular_vectors", ["principal"],
        "return U[:, :rank], S[:rank], Vt[:rank]", "return U[:, -rank:], S[-rank:], Vt[-rank:]"),
    _pissa("pairs_values_with_the_wrong_vectors", ["principal"],
        "return U[:, :rank], S[:rank], Vt[:rank]", "return U[:, :rank], S[1 : rank + 1], Vt[:rank]"),
    # Scale the factors so that their product stays right, but their gradients have another size.
    _pissa("gives_all_of_s_to_a", ["principal"],
        "(root[:, None] * Vt).to(dtype)", "(root[:, None] ** 2 * Vt).to(dtype)",
        "(U * root).to(dtype)", "U.to(dtype)"),
    _pissa("stops_after_two_subspace_iterations", ["principal"],
        "sketch(W_ED, rank, generator), niter)", "sketch(W_ED, rank, generator), min(niter, 2))",
        values={"rank": 16, "alpha": 16.0, "niter": 4}, inputs=128, outputs=48),
    _pissa("runs_on_the_original_weight", ["forward", "gradient"],
        'linear(x_TD, self.get_buffer("residual"), self.base.bias)', "self.base(x_TD)"),
    _pissa("merges_into_the_original_weight", ["merge"],
        'dense.weight.copy_(as_stored(dense, self.get_buffer("residual") + self.delta()))', "dense.weight += self.delta()"),
    _pissa("merges_a_square_conv1d_transposed", ["merge"],
        'W_ED.T if kind_of(base) in ("Conv1D", "embedding") else W_ED',
        "W_ED", file="layers", layer="conv1d", inputs=32, outputs=32),
    _pissa("splits_a_square_conv1d_transposed", ["identity"],
        "base.weight.T.contiguous()", "base.weight.detach().contiguous()", file="layers",
        layer="conv1d", inputs=32, outputs=32),
    _pissa("splits_the_weight_that_its_base_had_at_first", ["detach"],
        "split(dense_weight(base), config, floating_dtype(base), generator)",
        "(t.clone() for t in vars(base).setdefault(\n"
        "                'kept', split(dense_weight(base), config, floating_dtype(base), generator)))"),
    _pissa("leaves_the_residual_out_of_the_state_dict", ["save"],
        'self.register_buffer("residual", residual)', 'self.register_buffer("residual", residual, persistent=False)'),
]
# fmt: on
