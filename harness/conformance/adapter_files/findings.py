"""Findings about one adapter file: mistakes in its keys, shapes and values, with and without a base model to compare."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from harness.conformance.adapter_files.adapter_config import CONFIG
from harness.conformance.adapter_files.adapter_file import AdapterFile
from harness.errors import closest_match, first_names, plural
from harness.methods import peft_schema
from harness.methods.unsupported_adapters import unsupported
from reference.adapter_file import ALL_LINEAR, PREFIX, AdapterReading, AdapterSettings, LayerUpdate, read

if TYPE_CHECKING:
    from torch import Tensor, nn

KINDS = {
    "null": "a key of the config is null, but loaders need a value there",
    "empty": "the file has no tensors of an adapter",
    "prefix": f"a key does not begin with {PREFIX}, or holds the name of an adapter",
    "missing-half": "a layer has an A without a B, or a B without an A",
    "rank": "A and B have another rank than the config, or differ in rank",
    "dtype": "a tensor holds integers or 8-bit numbers",
    "not-finite": "a tensor holds NaN or infinity",
    "zero-update": "every B (or every A) is zero, so the adapter does nothing: it was not trained, or not saved",
    "scaling": "the scaling of a layer is 0, so its update does nothing",
    "magnitude": "use_dora and the lora_magnitude_vector tensors contradict each other",
    "lora-bias": "lora_bias and the lora_B.bias tensors contradict each other",
    "bias": "`bias` and the bias tensors contradict each other, or the file lacks a bias of the base",
    "unused-pattern": "an entry of rank_pattern or alpha_pattern fits no layer of the file",
    "unknown-key": "the installed peft does not have a key of the config, and ignores it",
    "no-target": "the config selects no layer of the file, so loaders drop every tensor",
    "other-base": "no tensor of the file fits the base: the adapter belongs to another model",
    "unmatched-key": "a tensor has no place in the base: loaders drop it or refuse the file",
    "missing-target": "the config targets a layer for which the file has no tensors",
    "missing-module": "the file has no tensors for a module that modules_to_save or the task names",
    "undeclared": "a tensor replaces a weight of the base that modules_to_save does not name",
    "shape": "a tensor does not fit the layer of the base",
    "vocabulary": "a tensor has another number of tokens than the base",
    "resized": "the file has whole embeddings of another number of tokens: the base must be resized first",
    "not-judged": "the reference does not implement a layer",
    "not-compared": "the config names no layers, or transformers has no class for the task: the base was not compared",
    "unsupported": "the config gives the tensors a meaning that the reference does not have, so nothing else was judged",
}
"""Name of a kind of finding -> its meaning."""
_NOTES = ("unused-pattern", "unknown-key", "missing-target", "resized", "not-judged", "not-compared", "unsupported")
"""Kinds of findings that are only notes: a file with such findings conforms."""
_LEAVE_ALL = ("not-compared", "unsupported")
"""Kinds of findings that prevent the comparison of the file with the base model."""
_NOT_NULL = ("r", "lora_alpha", "bias", "rank_pattern", "alpha_pattern")
"""Keys of the config for which peft 0.21.2 raises an exception if the value is null."""
_FLOATS = ("F64", "F32", "F16", "BF16")
_HALF = re.compile(r"(?P<start>.+)\.lora_(?P<embedding>embedding_)?(?P<half>[AB])(?:\.weight)?")
_NAMED = re.compile(r"\.lora_[AB]\.(?!weight$|bias$)|\.lora_embedding_[AB]\.|\.lora_magnitude_vector\.(?!weight$)")
"""Part of a key that contains the name of an adapter, as in the state_dict of a PeftModel."""
_EMBEDDING = re.compile(r".*\.(embed_tokens|lm_head|wte|embed_in|embed_out|word_embeddings|shared)\.(weight|bias)")
"""Key of the weight or bias of a whole embedding or output head."""
_WRAPPER = re.compile(r"\.(modules_to_save|original_module)\.")
"""Part of a key that marks a second copy of a bias. peft saves such copies with `bias="all"`, for biases inside a
module of modules_to_save."""


@dataclass(frozen=True)
class Finding:
    """One finding about an adapter file: a mistake, or a note."""

    kind: str
    """One of `KINDS`."""
    where: str
    """Key of the file, path of a layer, or key of the config."""
    message: str
    hint: str = ""

    @property
    def nonconforming(self) -> bool:
        """True if the file does not conform. Otherwise the finding is a note."""
        return self.kind not in _NOTES

    @property
    def leaves_all(self) -> bool:
        """True if the file was not compared with the base model because of this finding."""
        return self.kind in _LEAVE_ALL


def judge(adapter: AdapterFile, base: nn.Module | None = None) -> list[Finding]:
    """Return the findings about an adapter, in the order of `KINDS`.

    base: the base model, whose parameters may be on the device `meta`. If None, the file is not compared with a base
    model.
    """
    if found := unsupported(adapter.config):
        return [Finding("unsupported", CONFIG, f"{key}: {meaning}") for key, meaning in found.items()]
    judge = _Judge(adapter)
    findings = list(judge.alone())
    if base is not None and not (adapter.settings.target_modules or adapter.settings.target_parameters):
        what = "target_modules is empty, so each version of peft chooses layers; nothing was compared with the base"
        findings.append(
            Finding("not-compared", CONFIG, what, "write the names of the adapted layers into target_modules")
        )
    elif base is not None and not any(one.kind == "no-target" for one in findings):
        findings += judge.against(base)
    return sorted(findings, key=lambda one: list(KINDS).index(one.kind))


def is_saved_embedding(settings: AdapterSettings, key: str) -> bool:
    """Return whether a key belongs to a whole embedding or output head that modules_to_save does not name."""
    return _EMBEDDING.fullmatch(key) is not None and not any(f".{name}." in key for name in settings.replaced_modules)


@dataclass(frozen=True)
class _Judge:
    adapter: AdapterFile

    @cached_property
    def pairs(self) -> dict[str, dict[str, str]]:
        """Start of a key, up to `.lora_A` or `.lora_B` -> dict from `A` and `B` to whole keys."""
        found: dict[str, dict[str, str]] = {}
        for key in self.adapter.header:
            if match := _HALF.fullmatch(key):
                found.setdefault(match["start"], {})[match["half"]] = key
        return found

    def alone(self) -> Iterator[Finding]:
        """Yield the findings about the file that need no base model."""
        if not self.pairs:
            hint = "save the adapter by `save_pretrained` of the PeftModel, with gathered weights if it was sharded"
            yield Finding("empty", self.adapter.weights.name, f"{len(self.adapter.header)} tensors, no lora_A", hint)
        odd = [key for key in self.adapter.header if not key.startswith(PREFIX)]
        odd += [key for key in self.adapter.header if _NAMED.search(key)]
        if odd:
            hint = f"rename the keys to {PREFIX}<layer>.lora_A.weight"
            yield Finding("prefix", odd[0], f"{first_names(odd)}: no loader of this format finds them", hint)
        yield from self._of_pairs()
        yield from self._of_values()
        yield from self._of_config()

    def _of_pairs(self) -> Iterator[Finding]:
        settings, header = self.adapter.settings, self.adapter.header
        for start, halves in self.pairs.items():
            if len(halves) == 1:
                (half,) = halves
                yield Finding("missing-half", halves[half], f"there is no {'B' if half == 'A' else 'A'} for it")
                continue
            A, B = (header[halves[half]].shape for half in "AB")
            path = _path(start)
            if len(A) < 2 or len(A) != len(B) or set(B[2:]) - {1}:  # a convolution has more than two dimensions
                yield Finding("rank", halves["A"], f"A is {A} and B is {B}; they are no factors of a matrix")
            elif A[0] != B[1] and (len(A) == 2 or A[0] % B[1]):  # a convolution in groups has a smaller B
                yield Finding("rank", halves["A"], f"A is {A}, of rank {A[0]}, and B is {B}, of rank {B[1]}")
            elif not self._is_stack(path) and A[0] != settings.rank(path):
                hint = "write the rank into r, or an entry for this layer into rank_pattern"
                yield Finding(
                    "rank", halves["A"], f"rank {A[0]}, but the config gives rank {settings.rank(path)}", hint
                )
            if not math.isfinite(settings.scaling(path)) or settings.scaling(path) == 0:
                yield Finding("scaling", path, f"the config gives the scaling {settings.scaling(path):g}")

    def _selects_none(self) -> bool:
        """Return whether target_modules is not empty, but selects no layer of the file."""
        settings, paths = self.adapter.settings, [_path(start) for start in self.pairs]
        if not paths or not settings.target_modules:
            return False
        every = str(settings.target_modules).lower() == ALL_LINEAR
        return not any(
            (not settings.excludes(path) if every else settings.targets(path)) or self._is_stack(path) for path in paths
        )

    def _is_stack(self, path: str) -> bool:
        """Return whether `path` may be a module that holds a parameter of target_parameters, such as stacked experts."""
        parents = [name.rpartition(".")[0] for name in self.adapter.settings.target_parameters or ()]
        return any(path == parent or path.endswith(f".{parent}") or not parent for parent in parents)

    def _of_values(self) -> Iterator[Finding]:
        zero: dict[str, list[str]] = {"A": [], "B": []}
        for key, tensor in self.adapter.stream():
            if self.adapter.header[key].dtype not in _FLOATS:
                yield Finding("dtype", key, f"the dtype is {self.adapter.header[key].dtype}", "save it as F32 or BF16")
                continue
            if bad := int((~tensor.isfinite()).sum()):
                yield Finding("not-finite", key, f"{bad} of {tensor.numel()} elements are NaN or infinite")
            if (match := _HALF.fullmatch(key)) and not bool(tensor.any()):
                zero[match["half"]].append(key)
        keys = [*zero["B"], *zero["A"]]
        if keys and len({_HALF.fullmatch(key)["start"] for key in keys}) == len(self.pairs):  # type: ignore[index]
            hint = "train it; if it was trained, gather sharded weights before saving"
            found = f"A or B of all {len(self.pairs)} layers is zero: nothing was trained"
            yield Finding("zero-update", keys[0], found, hint)

    def _of_config(self) -> Iterator[Finding]:
        settings, keys = self.adapter.settings, list(self.adapter.header)
        for key in _NOT_NULL:
            if key in self.adapter.config and self.adapter.config[key] is None:
                what = f"it is null; this check takes {getattr(settings, key) or 'none'}, peft raises an exception"
                yield Finding("null", key, what, "write the value of the training run, or remove the key")
        known = peft_schema.keys_of("LORA")
        for key, value in self.adapter.config.items() if known else ():
            if key not in known and value is not None:  # releases write their new keys as null if they have no effect
                close = closest_match(key, known)
                hint = (
                    f"did you mean `{close}`?" if close else "install the peft that wrote the file, or remove the key"
                )
                yield Finding("unknown-key", key, "the installed peft does not have it and ignores it", hint)
        if self._selects_none():
            what = (
                f"target_modules and exclude_modules select none of the {plural(len(self.pairs), 'layer')} of the file"
            )
            hint = "name the layers in target_modules, and remove them from exclude_modules and modules_to_save"
            yield Finding("no-target", CONFIG, f"{what}, such as {_path(next(iter(self.pairs)))}", hint)
        magnitudes = [key for key in keys if ".lora_magnitude_vector" in key]
        own = [key for key in keys if key.endswith(".lora_B.bias")]
        weights = {key.removesuffix("weight") for key in keys if key.endswith(".weight")}
        biases = [key for key in keys if key.endswith(".bias") and key not in own and not self._is_saved(key)]
        if settings.bias == "none":
            biases = [key for key in biases if key.removesuffix("bias") not in weights]  # others belong to whole layers
        for kind, setting, there, tensors in (
            ("magnitude", "use_dora", settings.use_dora, magnitudes),
            ("lora-bias", "lora_bias", settings.lora_bias, own),
            ("bias", "bias", settings.bias != "none", biases),
        ):
            if tensors and not there:
                yield Finding(kind, tensors[0], f"the file has such tensors, but {setting} is off", f"set {setting}")
            if there and kind != "bias" and len(tensors) < len(self.pairs):
                found = f"{len(tensors)} such tensors for {len(self.pairs)} layers"
                yield Finding(kind, setting, f"{setting} is on, but the file has {found}")
        names = [_path(start) for start in self.pairs]
        stack = any(map(self._is_stack, names))
        for setting, patterns in (("rank_pattern", settings.rank_pattern), ("alpha_pattern", settings.alpha_pattern)):
            for pattern in patterns:
                if not stack and not any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):
                    yield Finding("unused-pattern", setting, f"{pattern!r} fits no layer of the file")

    def _is_saved(self, key: str) -> bool:
        return any(f".{name}." in key for name in self.adapter.settings.replaced_modules)

    def against(self, base: nn.Module) -> Iterator[Finding]:
        """Yield the findings from a comparison of the file with a base model."""
        reading = read(self.adapter.settings, list(self.adapter.header), base)
        tokens = self._tokens(reading, base)
        misfits = {update: list(self._misfits(update, base, tokens)) for update in reading.updates}
        if self.pairs and all(misfits.values()) and not reading.not_implemented:
            name = getattr(getattr(base, "config", None), "model_type", "model")
            first = next(
                (f"{one.where}: {one.message}" for some in misfits.values() for one in some),
                f"{len(reading.unused)} keys have no layer",
            )
            hint = "give the base that the adapter was trained on by --base-model"
            yield Finding(
                "other-base", self.adapter.weights.name, f"no layer fits this {name}; for example, {first}", hint
            )
            return
        for some in misfits.values():
            yield from some
        for key, reason in reading.unused.items():
            if key.startswith(PREFIX) and not self._is_copy(key):
                yield Finding("unmatched-key", key, reason)
        for key, name in reading.not_implemented.items():
            yield Finding("not-judged", key, f"the layer is a {name}, which the reference does not implement")
        if reading.absent:
            yield Finding("missing-target", reading.absent[0], f"no tensors for {first_names(reading.absent)}")
        if tokens:
            hint = f"call resize_token_embeddings({tokens}) on the base before loading the adapter"
            yield Finding("resized", self.adapter.weights.name, f"the embeddings have {tokens} tokens", hint)
        yield from self._of_biases(reading, base)
        yield from self._of_replaced(reading, base, tokens)

    def _is_copy(self, key: str) -> bool:
        """Return whether a key belongs to a second copy of a tensor. peft's loader ignores such copies."""
        return _WRAPPER.search(key) is not None and _WRAPPER.sub(".", key) in self.adapter.header

    def _tokens(self, reading: AdapterReading, base: nn.Module) -> int:
        """Return the number of tokens of the embeddings in the file, if it differs from that of the base model.

        Return 0 if the numbers are equal, or if the file does not resize all embeddings of the base model to one number.
        """
        sides = [_embeddings(base, side) for side in ("input", "output")]
        tables = {id(one.weight): one.weight for one in sides if one is not None}
        parameters = dict(base.named_parameters(remove_duplicate=False))
        shapes = {
            id(parameters[name]): self.adapter.header[key].shape
            for key, name in reading.replaced.items()
            if id(parameters[name]) in tables
        }
        counts = {shape[0] for shape in shapes.values() if shape}
        resized = [shape[1:] == tuple(tables[one].shape)[1:] for one, shape in shapes.items()]
        if len(counts) != 1 or shapes.keys() != tables.keys() or not all(resized):
            return 0
        (count,) = counts
        return 0 if count in {len(one) for one in tables.values()} else int(count)

    def _of_biases(self, reading: AdapterReading, base: nn.Module) -> Iterator[Finding]:
        """Yield a finding if the config's key `bias` promises biases of the base model that the file lacks."""
        setting = self.adapter.settings.bias
        adapted = {update.path for update in reading.updates}
        wanted = [name for name, _ in base.named_parameters(remove_duplicate=False) if name.endswith(".bias")]
        if setting == "lora_only":
            wanted = [name for name in wanted if name.removesuffix(".bias") in adapted]
        there = set(reading.replaced.values())
        missing = [name for name in wanted if name not in there and not self._is_saved(f".{name}")]
        if setting != "none" and missing:
            yield Finding("bias", "bias", f"bias is {setting}, but the file has no {first_names(missing)}")

    def _misfits(self, update: LayerUpdate, base: nn.Module, resized: int) -> Iterator[Finding]:
        """Yield a finding for each tensor of `update` whose shape is wrong.

        resized: a number of tokens that is allowed too, from `_tokens`.
        """
        module = base.get_submodule(update.path)
        is_head = module is _embeddings(base, "output")
        if update.kind != "stack":  # `rank` reports a rank that differs from the config
            update = replace(update, rank=next(iter(self.adapter.header[update.A].shape), 0))
        for key, shape in update.shapes(module).items():
            have = self.adapter.header[key].shape if key in self.adapter.header else None
            if have is None or have == shape:  # `magnitude` and `lora-bias` report a tensor that is missing
                continue
            tokens = (update.kind == "embedding" and key == update.A) or (is_head and key == update.B)
            if not (tokens and resized in have):
                yield Finding("vocabulary" if tokens else "shape", key, f"{have}, should be {shape}")

    def _of_replaced(self, reading: AdapterReading, base: nn.Module, resized: int) -> Iterator[Finding]:
        parameters: Mapping[str, Tensor] = dict(base.named_parameters(remove_duplicate=False))
        sides = [_embeddings(base, side) for side in ("input", "output")]
        tables = {id(one) for side in sides if side is not None for one in side.parameters()}
        there = set(reading.replaced.values()) | {f"{one.path}.{one.parameter}" for one in reading.updates}
        if missing := [name for name in parameters if self._is_named(name) and name not in there]:
            hint = "save the adapter by `save_pretrained` of the PeftModel, which adds these modules"
            yield Finding("missing-module", missing[0], f"no tensors for {first_names(missing)}", hint)
        for key, name in reading.replaced.items():
            have, want = self.adapter.header[key].shape, tuple(parameters[name].shape)
            table = id(parameters[name]) in tables
            if have != want and not (table and have == (resized, *want[1:])):
                yield Finding("vocabulary" if table else "shape", key, f"{have}, should be {want}")
            # peft's `save_pretrained` adds whole embeddings and heads without naming them in modules_to_save.
            if not (table or ".base_layer." in key or key.endswith(".bias") or self._is_named(name)):
                hint = "name the module in modules_to_save, or remove the tensor"
                yield Finding("undeclared", key, f"it replaces {name} of the base", hint)

    def _is_named(self, parameter: str) -> bool:
        path = parameter.rpartition(".")[0]
        saved = self.adapter.settings.replaced_modules
        return bool(saved) and any(part.endswith(saved) for part in _parents(path))


def _parents(path: str) -> Iterator[str]:
    while path:
        yield path
        path = path.rpartition(".")[0]


def _path(start: str) -> str:
    return start.removeprefix(PREFIX).replace(".base_layer", "")


def _embeddings(base: nn.Module, side: str) -> Any:
    """Return a model's embedding (side `input`) or output head (side `output`), or None if the model has none."""
    try:
        return getattr(base, f"get_{side}_embeddings", lambda: None)()
    except (NotImplementedError, AttributeError):  # transformers raises this for a model without tokens
        return None
