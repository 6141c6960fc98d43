"""Stored runs judged by metrics: which attributions a data set's images speak for, and how surely."""

from .bootstrap import Ranking, rank_methods
from .scores import Scores, read_curves, read_scores, write_scores

__all__ = ["Ranking", "Scores", "rank_methods", "read_curves", "read_scores", "write_scores"]
