"""Engines: what draws steps. `base` holds the protocol; one module per engine."""
