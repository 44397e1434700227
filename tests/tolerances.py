"""The package's table of tolerances, under the name by which tests have it."""

from tc_deploy.tolerances import TOLERANCES, tolerance

__all__ = ["TOLERANCES", "tolerance"]
