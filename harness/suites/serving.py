"""Check the key `serve:` of an entry, which names the kinds of model servers for the trained adapters. Imports no torch.

A server loads the base from a folder and the adapters from files in the format of peft. So the base must not be
quantised, and the Method must be LoRA. For a model without weights (`shape:NAME`), random weights are saved in a folder
first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from harness.errors import UsageError
from harness.methods import servers
from harness.methods.spec import FieldProblem

if TYPE_CHECKING:
    from harness.assets.table import Source
    from harness.suites.schema import CellKeys

METHOD = "lora"
"""The Method whose adapters servers load."""


def problems(keys: CellKeys, models: Mapping[int, Source]) -> Iterator[FieldProblem]:
    """Yield a problem for each value of an entry that cannot be served.

    models: index in the entry's list of models -> source. Unknown models are left out.
    """
    for i, name in enumerate(keys.serve):
        if name:
            try:
                kind = servers.find(name)
            except UsageError as error:
                yield ("serve", i), error.what, error.hint
                continue
            for j, dtype in enumerate(keys.dtype):
                if dtype not in kind.dtypes:
                    yield ("dtype", j), f"`{name}` does not serve {dtype}", f"it serves {', '.join(kind.dtypes)}"
    if any(keys.serve):
        yield from _unserved(keys, models)


def _unserved(keys: CellKeys, models: Mapping[int, Source]) -> Iterator[FieldProblem]:
    """Yield a problem for each value that no server supports. keys: the keys of an entry that has `serve:`."""
    apart = "give it an entry without `serve:`"
    for i, method in enumerate(keys.method):
        if method != METHOD:
            yield ("method", i), f"`serve` needs `method: {METHOD}`, but the method is {method}", apart
    for i, base in enumerate(keys.base):
        if base.quantization != "none":
            yield ("base", i), f"`serve` needs a base that is not quantised, but base is {base.quantization}", apart
    for i, source in models.items():
        if source.kind != "causal":
            yield ("model", i), f"`serve` needs a model that generates text, but {source.name} is an encoder", apart
    if keys.latency == "never":
        what = "`serve` is measured in the Cells that have latencies, but `latency` is never"
        yield ("latency",), what, "write `latency: first-seed`, or remove `serve:`"
