"""Data-dependent initialisation (section 3): ``data_init`` and the report it returns."""

from weightnorm.data_dependent.init import data_init
from weightnorm.data_dependent.report import DataInitReport, LayerReport

__all__ = ["DataInitReport", "LayerReport", "data_init"]
