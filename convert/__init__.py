"""How the numbers are chosen: one module a stage, in the order the data flows.

recipe -> source -> plan -> quantize -> export -> check -> report. ``pipeline.convert`` walks through all of them.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("octavo")
except PackageNotFoundError:  # run from a checkout that was never installed
    __version__ = "0+unknown"
