"""What runs have logged: read, summed up, drawn, and put beside each other."""
