"""trexport: trained adapters of diffusion models to production. Merge, export, prove equal, measure.

The command line is `trexport`; every command is one function of this package.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("trexport")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"
