"""The layer with the residual hook, the specs that put it into a model, and its initial weights."""
