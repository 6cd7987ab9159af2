"""weightcast keeps inference engines in step with a Megatron-Core trainer.

Four rooms: `weightcast.sync` moves versions of weights, `weightcast.bridges` maps Hugging Face names to
Megatron tensors, `weightcast.trainer` trains, `weightcast.adapters` plugs into engines.
"""

from pathlib import Path

__version__ = "0.1.0"
__all__ = ["__version__"]

# The rooms are relative links in this folder. A zip download, or a clone without `core.symlinks`, turns
# links into text files; the install then succeeds and `import weightcast.sync` fails without a reason.
if (Path(__file__).parent / "sync").is_file():
    raise ImportError(
        "weightcast: the folders of this package are links, and in this copy they became text files "
        "(a zip download, or git with core.symlinks=false). "
        "Use `git clone`, a tar.gz, or `pip install git+https://...` instead of a zip."
    )
