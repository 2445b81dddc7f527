"""Sets alpha on the layers of this rank, proves that all ranks agree, and logs it."""
