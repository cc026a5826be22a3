"""Write a copy of a model's folder with its weights in float16: `python -m harness.assets.kit.half FOLDER TARGET`."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

_DTYPES = ("dtype", "torch_dtype")
"""Keys of config.json for the dtype of the weights, of transformers 5 and of older versions."""


def main(folder: Path, target: Path) -> None:
    """Copy the model folder `folder` to `target`. Each floating-point weight is rounded once to float16.

    Raises OverflowError if a weight is too large for float16.
    """
    import torch
    from safetensors.torch import load_file, save_file

    target.mkdir(parents=True)
    for file in sorted(folder.iterdir()):
        if file.suffix == ".safetensors":
            tensors = {name: t.half() if t.is_floating_point() else t for name, t in load_file(file).items()}
            if bad := [name for name, t in tensors.items() if not torch.isfinite(t).all()]:
                raise OverflowError(f"{bad[0]} exceeds float16")
            save_file(tensors, target / file.name, metadata={"format": "pt"})
        elif file.is_file():
            shutil.copy(file, target / file.name)
    config = json.loads((target / "config.json").read_text())
    changed = {key: "float16" for key in _DTYPES if key in config} or {_DTYPES[0]: "float16"}
    (target / "config.json").write_text(json.dumps(config | changed, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
