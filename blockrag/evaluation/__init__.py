"""Measuring what block attention costs and what it gives: floating-point operations, times, answers.

Import from the modules; this package stays empty so that one measure does not load what another needs.
"""
