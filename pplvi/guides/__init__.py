"""Guide families on Pyro's ``AutoGuide`` contract, one a file. Any Pyro guide works with every objective as well."""

from pplvi.guides.flow import AutoFlow

__all__ = ["AutoFlow"]
