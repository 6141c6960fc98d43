"""What is installed, what is missing and why, and whether it computes what it should: behind ``xaifast info``."""

from .checks import Check, self_test
from .installation import collect, operator_backends

__all__ = ["Check", "collect", "operator_backends", "self_test"]
