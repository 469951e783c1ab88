"""The networks in torch: an export is checked against them, and the torch engine runs them.

Nothing in the runtime imports this package unless torch is asked for.
"""
