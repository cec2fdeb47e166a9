"""Short measurements of what this machine and our own runtime reach."""
