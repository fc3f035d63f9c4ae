"""Merge operators against their formulas."""
