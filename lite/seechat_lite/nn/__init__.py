"""The networks in torch: what export is checked against and what the torch engine runs.

Nothing in the runtime imports this package unless torch is asked for.
"""
