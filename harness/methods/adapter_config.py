"""Convert a Cell's Method to the adapter_config.json with which HF peft trains this Method. Imports no torch.

The result has the keys that the Method determines. All other keys, such as `task_type`, keep peft's defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from harness.methods.peft_config import FILE, KEY, PEFT

Config = Mapping[str, Any]
_ATTENTION = "attention"
_ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class PeftEquivalent:
    """The config with which peft trains a Method, if peft has this Method."""

    keys: dict[str, Any] | None
    """Content of an adapter_config.json; None if there is no equivalent."""
    remark: str
    """Further steps for the user, or the reason why there is no equivalent. May be empty."""


def peft_equivalent(method: str, config: Config, quantization: str = "none") -> PeftEquivalent:
    """Return the adapter config with which peft trains a Method.

    method: name of the Method. config: the Method's config in a Cell. quantization: quantisation of the Cell's base
    weights, e.g. `nf4`, or `none`.
    """
    if method == PEFT.name:
        return PeftEquivalent(dict(config[KEY]), "")
    make = _EQUIVALENTS.get(method)
    if make is None:
        return PeftEquivalent(None, f"There is no {FILE} for {method}: peft has no such Method.")
    if refusal := _refusal(config):
        return PeftEquivalent(None, f"There is no {FILE} for {method}: {refusal}.")
    try:
        names, keys = list(config["targets"]), make(config)
    except KeyError as error:
        return PeftEquivalent(None, f"There is no {FILE} for {method}: the Cell's config lacks {error.args[0]}.")
    keys["target_modules"] = _ALL_LINEAR if names == [_ALL_LINEAR] else names
    twice = quantization == "nf4-dq" or (method == "qlora" and config.get("double_quant", True))
    how = "4 bits", "nf4, bnb_4bit_use_double_quant" if twice else "nf4"
    if method == "lora_int8":
        how = "8 bits", f"llm_int8_threshold={config.get('threshold', 6.0)}"
    packed = method in ("qlora", "lora_int8") or quantization != "none"
    remark = ""
    if packed:
        remark = f"Load the base model in {how[0]} first (`BitsAndBytesConfig` of transformers, {how[1]}). "
    if method == "oft":
        size = config["block_size"]
        remark += (
            f"If {size} does not divide the input features of a layer, peft takes the divisor nearest to {size} as block "
            f"size. This Cell took the largest divisor below {size}. "
        )
    return PeftEquivalent(keys, f"{remark}Add the `task_type` of your model.")


def _refusal(config: Config) -> str:
    """Return the reason why peft, which has this Method, cannot train it with this config. Empty if it can."""
    names = config.get("targets", ())
    if _ATTENTION in names or (_ALL_LINEAR in names and len(names) > 1):
        return f"peft needs the names of the layers, and this config says {', '.join(names)}"
    if config.get("per", "output") != "output" or not config.get("detach_norm", True):
        return "peft's DoRA has one magnitude per output feature, and its norm has no gradient"
    if config.get("block", 64) != 64:
        return "transformers quantises with blocks of 64 weights"
    if config.get("lora_bias") and config.get("init", "kaiming") != "kaiming":
        return "peft has lora_bias only with its usual start of A"
    if config.get("conv", "peft") != "peft":
        return "peft's LoRA of a convolution has other factors"
    if config.get("regularization", "mean-norm") != "mean-norm":
        return "peft's AdaLoRA has another regulariser"
    if config.get("cayley", "neumann") == "exact":
        return "peft's exact form of OFT turns the other way"
    if config.get("terms", 4) < 4:
        return "peft's OFT has another series for fewer than 4 terms"
    return ""


def _low_rank(config: Config) -> dict[str, Any]:
    return {
        "peft_type": "LORA", "r": config["rank"], "lora_alpha": config["alpha"],
        "lora_dropout": config.get("dropout", 0.0), **({"lora_bias": True} if config.get("lora_bias") else {}),
    }  # fmt: skip


def _lora(config: Config) -> dict[str, Any]:
    start = config.get("init", "kaiming")
    return {
        **_low_rank(config),
        "use_rslora": config.get("rslora", False),
        "init_lora_weights": True if start == "kaiming" else start,
    }


def _pissa(config: Config) -> dict[str, Any]:
    niter = config.get("niter", 0)
    return {**_low_rank(config), "init_lora_weights": f"pissa_niter_{niter}" if niter else "pissa"}


def _vera(config: Config) -> dict[str, Any]:
    return {
        "peft_type": "VERA", "r": config["rank"], "vera_dropout": config["dropout"],
        "projection_prng_key": config["projection_key"], "d_initial": config["d_initial"],
    }  # fmt: skip


def _lycoris(config: Config) -> dict[str, Any]:
    return {"r": config["rank"], "alpha": config["alpha"], "rank_dropout": config["rank_dropout"]}


def _lokr(config: Config) -> dict[str, Any]:
    return {
        "peft_type": "LOKR", **_lycoris(config), "rank_dropout_scale": True,
        "decompose_factor": config["factor"] or -1,
        "init_weights": True if config["init"] == "peft" else config["init"],
    }  # fmt: skip


def _oft(config: Config) -> dict[str, Any]:
    return {
        "peft_type": "OFT", "r": 0, "oft_block_size": config["block_size"], "use_cayley_neumann": True,
        "num_cayley_neumann_terms": config["terms"],
    }  # fmt: skip


def _adalora(config: Config) -> dict[str, Any]:
    return {
        "peft_type": "ADALORA", "init_r": config["rank"], "target_r": config["target_rank"],
        "lora_alpha": config["alpha"], "lora_dropout": config["dropout"], "total_step": config["total_steps"],
        "tinit": config["tinit"], "tfinal": config["tfinal"], "deltaT": config["delta_t"], "beta1": config["beta1"],
        "beta2": config["beta2"], "orth_reg_weight": config["orthogonality"],
    }  # fmt: skip


_EQUIVALENTS: dict[str, Callable[[Config], dict[str, Any]]] = {
    "lora": _lora,
    "qlora": _low_rank,
    "lora_int8": _low_rank,
    "dora": lambda config: {**_low_rank(config), "use_dora": True},
    "pissa": _pissa,
    "vera": _vera,
    "loha": lambda config: {"peft_type": "LOHA", **_lycoris(config)},
    "lokr": _lokr,
    "oft": _oft,
    "adalora": _adalora,
}
"""Method -> function that converts the Method's config, except its targets, to keys of an adapter_config.json."""
