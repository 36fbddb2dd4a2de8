"""The installed version."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("model-workbench")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.1.0"
