"""Planted faults of loaders that hold several adapters, or that add, merge, swap or copy them.

A comment such as `vllm#42008` names a public issue about the same fault.
"""

from __future__ import annotations

from harness.conformance.faults import Fault, line_fault

_NAMED = "parts = self.merged if name is None else self.adapters[name]"
_APPLIED = "adapter_file.combine(model, sums)"
_COMBINED = "replace(one, weight=one.weight * weight) for name, weight in pairs for one in self.adapters[name]"
_MERGED = "self.merged = [one for name in names for one in self.adapters[name]]"
_DELETED = "del self.adapters[name]"
_REFUSED = 'raise Unsupported("hotswap: an adapter is merged")'
_SWAPPED = '            raise Unsupported("hotswap: an adapter is merged")\n        self.load(folder, name)'
_SCALED = "[replace(one, factor=factor) for one in self.adapters[name]]"
_COPIED = "other.adapters, other.merged = dict(self.adapters), list(self.merged)"
_LOADED = 'self.adapters[name] = [_Part(settings, load_file(folder / "adapter_model.safetensors"))]'


def _fault(name: str, check: str, *lines: str, adapter: str = "plain") -> Fault:
    return line_fault("adapter_files", name, [check], *lines, adapter=adapter)


def _swap(change: str) -> str:
    """Return source lines that load a new adapter under the name of a loaded one, and then run `change`.

    change: a wrong statement. It can use `old` and `new`, the parts of the old and of the new adapter.
    """
    kept = "        old = self.adapters[name]\n        self.load(folder, name)\n        new = self.adapters[name]\n"
    return f"            {_REFUSED}\n{kept}        {change}"


# fmt: off
FAULTS = [
    # vllm#42008
    _fault("keeps_the_adapter_of_the_call_before", "switch", _NAMED,
        "parts = self.merged if name is None else self.adapters[name]\n"
        "        parts, self.last = parts or getattr(self, 'last', []), parts"),
    _fault("adds_all_loaded_adapters", "switch", _NAMED,
        "parts = self.merged if name is None else [one for parts in self.adapters.values() for one in parts]"),
    _fault("reads_a_second_adapter_into_the_rank_of_the_first", "switch", _LOADED,
        _LOADED + "\n        first = next(iter(self.adapters.values()))[0]\n"
        "        self.adapters[name] = [replace(one, tensors={key: t[:len(first.tensors[key])] if 'lora_A' in key\n"
        "            else t[:, :first.tensors[key].shape[1]] for key, t in one.tensors.items()},\n"
        "            settings=replace(settings, r=first.settings.r, lora_alpha=settings.lora_alpha * first.settings.r /\n"
        "            settings.r)) for one in self.adapters[name]]"),
    _fault("loads_a_file_once", "renamed", _LOADED,
        "known = any(one[0].settings == settings for one in self.adapters.values())\n"
        "        " + _LOADED + "\n        self.adapters[name] = [] if known else self.adapters[name]"),
    # peft#3761
    _fault("combines_with_the_scaling_of_plain_lora", "combine_one", _COMBINED,
        "replace(one, weight=one.weight * weight, settings=replace(one.settings, use_rslora=False))\n"
        "            for name, weight in pairs for one in self.adapters[name]", adapter="rslora"),
    _fault("combines_without_the_biases", "combine_one", _COMBINED,
        "replace(one, weight=one.weight * weight, settings=replace(one.settings, lora_bias=False))\n"
        "            for name, weight in pairs for one in self.adapters[name]", adapter="lora_bias"),
    _fault("combines_without_the_magnitude", "combine_one", _COMBINED,
        "replace(one, weight=one.weight * weight, settings=replace(one.settings, use_dora=False))\n"
        "            for name, weight in pairs for one in self.adapters[name]", adapter="dora"),
    _fault("combines_without_the_patterns", "combine_one", _COMBINED,
        "replace(one, weight=one.weight * weight, settings=replace(one.settings, alpha_pattern={}))\n"
        "            for name, weight in pairs for one in self.adapters[name]", adapter="alpha_pattern"),
    _fault("combines_without_the_saved_modules", "combine_one", _COMBINED,
        "replace(one, weight=one.weight * weight, tensors={key: t for key, t in one.tensors.items() if 'lora_' in key})\n"
        "            for name, weight in pairs for one in self.adapters[name]", adapter="modules_to_save"),
    _fault("combines_in_place", "combine_one", "self.adapters[new_name] = [\n",
        "self.adapters[new_name] = self.adapters[names[0]] = 2 * [\n"),
    _fault("applies_the_weight_to_both_factors", "combine_two", _COMBINED,
        _COMBINED.replace("* weight)", "* weight * weight)")),
    _fault("forgets_the_sign_of_a_weight", "combine_two", _COMBINED, _COMBINED.replace("* weight)", "* abs(weight))")),
    _fault("normalises_the_weights", "combine_two", _COMBINED, _COMBINED.replace("* weight)", "* weight / sum(weights))")),
    # peft#3608
    _fault("merges_the_second_adapter_onto_the_first", "merge_two", _APPLIED,
        "[adapter_file.combine(model, [one]) for one in sums]", adapter="dora"),
    _fault("merges_the_first_adapter_only", "merge_two", _MERGED,
        "self.merged = [one for name in names[:1] for one in self.adapters[name]]"),
    # peft#2777
    _fault("merges_into_both_tied_layers", "merge_training", _APPLIED, _APPLIED + "\n        if name is None and parts:\n"
        "            model.get_input_embeddings().weight = model.get_output_embeddings().weight", adapter="tied_head"),
    # peft#3586
    _fault("merges_the_dropout", "merge_training", _MERGED,
        _MERGED + "\n        mask = (lambda t: torch.rand_like(t) > 0.5) if self.training else torch.ones_like\n"
        "        self.merged = [replace(one, tensors={key: t * mask(t) for key, t in one.tensors.items()})\n"
        "            for one in self.merged]"),
    _fault("unmerges_half", "merge_undone", "        self.merged = []\n\n    def hotswap",
        "        self.merged = self.merged[1:] or [replace(one, weight=1e-4) for one in self.merged]\n\n    def hotswap"),
    _fault("drifts_with_every_merge", "merge_undone",
        _MERGED, _MERGED + "\n        self.merges = getattr(self, 'merges', 0) + 1",
        "        self.merged = []\n\n    def hotswap", "        self.merged = [\n"
        "            replace(one, weight=1e-5 * self.merges) for parts in self.adapters.values() for one in parts]\n\n"
        "    def hotswap"),
    # peft#3738
    _fault("swaps_without_the_patterns", "hotswap", _SWAPPED,
        _swap("self.adapters[name] = [replace(one, settings=replace(one.settings, alpha_pattern={})) for one in new]"),
        adapter="alpha_pattern"),
    _fault("swaps_the_tensors_but_not_the_scaling", "hotswap", _SWAPPED,
        _swap("self.adapters[name] = [replace(one, settings=replace(one.settings, lora_alpha=old[0].settings.lora_alpha))\n"
        "            for one in new]")),
    _fault("keeps_the_saved_modules_when_swapping", "hotswap", _SWAPPED,
        _swap("self.adapters[name] = [replace(one, tensors=one.tensors | {\n"
        "            key: t for key, t in old[0].tensors.items() if 'lora_' not in key}) for one in new]"),
        adapter="classifier"),
    # peft#3780
    _fault("zeroes_adapters_with_a_similar_name", "hotswap_beside", _SWAPPED,
        _swap("self.adapters = {key: [] if name in key and key != name else parts\n"
        "            for key, parts in self.adapters.items()}")),
    # peft#3581
    _fault("scales_by_the_alpha_of_the_adapter_before", "hotswap_scale", _SWAPPED,
        _swap("self.alpha = old[0].settings.lora_alpha"), _SCALED,
        "[replace(one, factor=factor * getattr(self, 'alpha', one.settings.lora_alpha) / one.settings.lora_alpha)\n"
        "            for one in self.adapters[name]]"),
    # peft#3581
    _fault("swaps_below_a_merged_adapter", "hotswap_merged", _REFUSED,
        "old = self.merged", "        self.merged = []\n\n    def hotswap",
        "        new = [one for parts in self.adapters.values() for one in parts]\n"
        "        self.merged = [*self.merged, *(replace(one, weight=-1.0) for one in new)]\n\n    def hotswap"),
    _fault("does_nothing_when_disabled", "disabled",
        "        self.is_disabled = True\n", "        self.is_disabled = False\n"),
    _fault("stays_disabled", "disabled", "            self.is_disabled = False\n", "            pass\n"),
    # the mistake of peft#2733
    _fault("sets_the_scaling_without_rslora", "scale", _SCALED,
        "[replace(one, factor=factor, settings=replace(one.settings, use_rslora=False)) for one in self.adapters[name]]",
        adapter="rslora"),
    # the mistake of unsloth-zoo#942
    _fault("multiplies_the_scaling_again", "scale", _SCALED,
        "[replace(one, factor=one.factor * (factor or 0.5)) for one in self.adapters[name]]"),
    _fault("leaves_an_update_at_scale_zero", "scale", _SCALED,
        "[replace(one, factor=factor or 1e-3) for one in self.adapters[name]]"),
    _fault("deletes_the_files_of_its_neighbour", "delete", _DELETED,
        "del self.adapters[name]\n        self.adapters = {key: parts[1:] for key, parts in self.adapters.items()}"),
    _fault("leaves_the_last_adapter_in_the_base", "delete_last", _DELETED,
        "parts = self.adapters.pop(name)\n        self.merged = [] if self.adapters else parts"),
    _fault("shares_its_state_with_its_copy", "deepcopy", _COPIED,
        "other = self"),
]
# fmt: on
