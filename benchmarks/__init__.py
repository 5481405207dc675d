"""Measurements of the README's tables, run by ``make bench``."""
