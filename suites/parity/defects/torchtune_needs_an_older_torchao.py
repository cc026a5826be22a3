"""torchtune: the last release cannot be imported with torchao 0.18, which moved the module of NF4.

torchtune's repository has imported the module from its new place since 2026, but no release followed. Seen in 0.6.1.
"""

from importlib.metadata import version

try:
    import torchtune  # noqa: F401

    print("imported with torchao", version("torchao"))
except ModuleNotFoundError as error:
    print("with torchao", version("torchao"), "raises", error)
