"""A torchtune config becomes one of puna's, and what cannot be carried over is named.

Components are read as names, never imported: torchtune need not be there.
"""
